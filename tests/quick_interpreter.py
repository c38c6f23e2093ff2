"""Spares Triton's interpreter what it repeats at every launch, and for every value inside a kernel.

Before a kernel runs, the interpreter looks through all of `triton.language` for functions to replace, replaces them
again for each helper that the kernel calls, and puts them back at its end; and for every intermediate result it works
out anew what follows from its type. Small launches, of which a training step of a tiny model makes a thousand, take
longer for that than for anything else. Here the language stays replaced, and what follows from a type is looked up.
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

    patched: set[Any] = set()

    def patch_once(fn: Any) -> Any:
        """Patches what `fn` sees of the language and nobody before it saw, for good."""
        seen = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not seen <= patched:
            patch_lang(fn)
            patched.update(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
    _look_up_types(tl.core, interpreter)


def _look_up_types(core: Any, interpreter: Any) -> None:
    """Each of these is replaced only if it then makes what it made before."""
    numpy_type, dtypes = getattr(interpreter, "_get_np_dtype", None), {}

    def known_numpy_type(dtype: Any) -> Any:
        found = dtypes.get(dtype.name)
        if found is None:
            found = dtypes[dtype.name] = numpy_type(dtype)
        return found

    if numpy_type is not None:
        interpreter._get_np_dtype = known_numpy_type

    shapes: dict[int, Any] = {}  # by the identity of a block's shape, of which there are few: equality takes long
    init_tensor = core.tensor.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        known = shapes.get(id(shape))
        if known is None:
            init_tensor(self, handle, type)
            shapes[id(shape)] = shape, self.shape, self.numel  # held, so that its identity stays its own
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = known

    blocks: dict[Any, Any] = {}
    init_block = core.block_type.__init__

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        try:
            key = element_ty.name, *shape
            known = blocks.get(key)
        except TypeError:  # sizes that are constexpr have no hash in some versions
            init_block(self, element_ty, shape)
            return
        if known is None:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known

    block = core.block_type(core.float32, [2, 4])
    for cls, quick, arguments in (
        (core.block_type, block_type, (core.float32, [2, 4])),
        (core.tensor, tensor, (None, block)),
    ):
        plain, first, again = cls(*arguments), cls.__new__(cls), cls.__new__(cls)
        quick(first, *arguments)
        quick(again, *arguments)
        if vars(plain).keys() == vars(again).keys():
            cls.__init__ = quick
