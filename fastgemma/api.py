"""`patch`, `unpatch`, `patched` and `status`: the whole state of the package in one table."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastgemma.kernels.workspace import workspace_bytes
from fastgemma.patches.engine import Engine, Op, PatchError
from fastgemma.report import PatchReport, summarise

# Feature -> (default, what it may be set to).
FEATURES: dict[str, tuple[bool | str, tuple[bool | str, ...]]] = {
    "rms_norm": (True, (True, False)),
    "rope": (True, (True, False)),
    "geglu": (True, (True, False)),
    "lora": (True, (True, False)),
    "attention": (True, (True, False)),
    "cross_entropy": (True, (True, False)),
    "per_layer_embeddings": ("auto", ("auto", "host", "gpu", True, False)),
    "checkpointing": (True, (True, False)),
    "cuda_graphs": ("auto", ("auto", "always", True, False)),
    "optimizer": (True, (True, False)),
    "fixes": (True, (True, False)),
}


@dataclass(eq=False)
class _Scope:
    """A `with patched()` block that was entered and not left."""

    thread: int
    previous: dict[str, bool | str]  # what it restores


_lock = threading.RLock()
_settings: dict[str, bool | str] = dict.fromkeys(FEATURES, False)
# Innermost last: nesting is last-in first-out, and in one thread.
_scopes: list[_Scope] = []


def _after_fork() -> None:
    """A forked child has one thread: blocks that others were inside are never left in it."""
    _scopes[:] = [scope for scope in _scopes if scope.thread == threading.get_ident()]
    _lock.release()


if hasattr(os, "register_at_fork"):
    # Held across a fork, so that the child finds neither a lock that nobody releases nor half a state.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


def _engine() -> Engine:
    # Imported late: the table imports transformers, which `import fastgemma` alone should not pay for.
    from fastgemma.patches.table import ENGINE

    return ENGINE


def _resolve(features: dict[str, Any]) -> dict[str, bool | str]:
    unknown = sorted(set(features) - set(FEATURES))
    if unknown:
        raise TypeError(f"fastgemma: no feature named {', '.join(unknown)}; the features are {', '.join(FEATURES)}.")
    settings = {}
    for name, (default, allowed) in FEATURES.items():
        value = features.get(name, default)
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
            choices = ", ".join(repr(choice) for choice in allowed)
            raise TypeError(f"fastgemma: {name}={value!r} is not one of {choices}.")
        settings[name] = value
    return settings


def _apply(settings: dict[str, bool | str], strict: bool = False) -> None:
    try:
        _engine().apply(settings, strict)
    except BaseException:
        _settings.update(dict.fromkeys(FEATURES, False))
        raise
    _settings.update(settings)
    if settings["cross_entropy"] is True:
        _report_captured()


def _report_captured() -> None:
    from fastgemma.patches.trl_head import TARGET, trainer_built_before

    if trainer_built_before():
        _engine().refuse("cross_entropy", TARGET, "a trainer built before patch() keeps TRL's own loss; build it after")


def _check_scope() -> None:
    if _scopes and _scopes[-1].thread != threading.get_ident():
        raise PatchError(
            "fastgemma: another thread is inside `with fastgemma.patched(...)`; changing patches now would change its "
            "training run. Patch before starting threads."
        )


def patch(*, strict: bool = False, **features: bool | str) -> PatchReport:
    """Sets the whole state: each feature as named, or to its default.

    Works at any time before a trainer is constructed, whether models and adapters exist yet or not; calling it again
    sets the state anew.

    Args:
        strict: raise where a feature is refused, or where an installed library's code is not one that fastgemma was
            tested with, instead of reporting it.
        **features: feature name -> True, False or one of the feature's modes.

    Returns:
        The state, as `status()` does.

    Raises:
        TypeError: an unknown feature or mode. PatchError: see `strict`; or another thread is inside `patched()`.
    """
    settings = _resolve(features)
    with _lock:
        _check_scope()
        _apply(settings, strict)
        return status()


def unpatch() -> None:
    """Restores stock behaviour everywhere, also in methods that were captured while patched. Counters stay readable.

    Raises:
        PatchError: another thread is inside `patched()`.
    """
    with _lock:
        _check_scope()
        _apply(dict.fromkeys(FEATURES, False))


@contextlib.contextmanager
def patched(*, strict: bool = False, **features: bool | str) -> Iterator[PatchReport]:
    """`patch(**features)` inside a `with` block, and the previous state after it, however it is left.

    Blocks nest last-in first-out within one thread. One that is left before a block inside it, as by a suspended
    generator, changes nothing: its previous state returns when that one is left.

    Raises:
        TypeError: an unknown feature or mode. PatchError: as `patch`, or a block that overlaps another thread's.
    """
    settings = _resolve(features)
    with _lock:
        _check_scope()
        scope = _Scope(threading.get_ident(), dict(_settings))
        _scopes.append(scope)
    try:
        with _lock:
            _apply(settings, strict)
        yield status()
    finally:
        with _lock:
            place = _scopes.index(scope)
            del _scopes[place]
            if place == len(_scopes):
                _apply(scope.previous)
            else:
                _scopes[place].previous = scope.previous


def settings() -> dict[str, bool | str]:
    """What each feature is set to; all False where nothing is patched."""
    with _lock:
        return dict(_settings)


def engine_ops() -> list[Op]:
    """Every feature at every place of the table, with its counters."""
    return _engine().ops


def status() -> PatchReport:
    """The state of every feature, with how often its fast path ran and why it did not where it did not."""
    ops = engine_ops()
    return PatchReport(
        {name: summarise([op for op in ops if op.feature == name]) for name in FEATURES}, workspace_bytes()
    )
