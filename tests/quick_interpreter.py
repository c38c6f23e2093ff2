"""Spares Triton's interpreter what it repeats at every launch, and at every call of a helper inside a kernel.

Before a kernel runs, the interpreter looks through all of `triton.language` for functions to replace, and replaces them
again for each helper that the kernel calls. Small launches, of which a training step of a tiny model makes a thousand,
take longer for that than for anything else. What is replaced, and by what, stays the interpreter's own.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Does nothing where Triton's interpreter is not made as it was when this was written."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch_lang, is_builtin = interpreter._patch_lang, tl.core.is_builtin
        patch_attribute = interpreter._patch_attr
    except (ImportError, AttributeError):
        return

    @functools.cache
    def builtins_of(package: Any) -> tuple[tuple[str, Any], ...]:
        return tuple((name, member) for name, member in inspect.getmembers(package) if is_builtin(member))

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(package):
            patch_attribute(package, name, member, builder, scope)

    scopes: list[Any] = []
    patched: set[Any] = set()

    def patch_once(fn: Any) -> Any:
        """Patches what `fn` sees of the language and no caller of it saw; undone with the kernel's own."""
        seen = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen <= patched:
            return SimpleNamespace(restore=lambda: None)
        scopes.append(patch_lang(fn))
        patched.update(seen)
        return SimpleNamespace(restore=restore)

    def restore() -> None:
        while scopes:
            scopes.pop().restore()
        patched.clear()

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
