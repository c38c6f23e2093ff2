"""What a tree of modules holds, noted once and compared in some tens of microseconds.

Reading a decoder layer for its operations asks a few hundred questions of its modules, which takes the host longer than
launching the layer as a graph. The answers stay the same for as long as everything that they can depend on does: the
modules, their classes and the forwards of these, their attributes, hooks, parameters and buffers, and where tensors
lie. A snapshot notes all of that, so that it need not know which questions were asked. It looks into dicts and lists,
not into other objects that modules hold, and takes it that nobody replaces the dicts that torch keeps in every module.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn

# What torch keeps in every module.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_CONTENTS = ("_parameters", "_buffers", "_modules")
# Those that `guards.hooked` asks for.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MISSING = object()
# The attribute of a module in which notes on it are kept.
_NOTES = "_fastgemma_snapshots"
# A note costs several times what it spares. A module that changes before any use of so many is noted once in so many
# times, until one is used.
_CREDIT, _PAUSE = 4, 64


class Snapshot:
    """The state of `root`'s modules. Holds their dicts but that of `root` itself, and with them whatever is put there
    later: keep it where a cycle through `root` can be collected, as in an attribute of `root`."""

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self._modules = [module for module in root.modules() if module is not root]
        self._classes = list(map(type, self._modules))
        self._kinds: list[Any] = list(dict.fromkeys([type(root), *self._classes]))
        self._forwards = self._find_forwards()
        self._sized: list[Sized] = []
        self._filled: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._tensors: list[torch.Tensor] = []
        # A new attribute, such as a forward of a module's own, shows in the number of them.
        self._size = len(root.__dict__)
        own = self._note_module(root.__dict__)
        self._own_names, self._own_found = [name for name, _ in own], [value for _, value in own]
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []
        for module in self._modules:
            self._sized.append(module.__dict__)
            for name, value in self._note_module(module.__dict__):
                self._owners.append(module.__dict__)
                self._names.append(name)
                self._found.append(value)
        self._sizes = list(map(len, self._sized))
        self._values = list(self._find_values())
        self._places = self._find_places()

    def _note_module(self, attributes: dict[str, Any]) -> list[tuple[str, Any]]:
        """What the module has beside what torch keeps in all of them."""
        noted = []
        for name, value in attributes.items():
            if name not in _OWN and not isinstance(value, Snapshots):
                noted.append((name, value))
                self._note_inside(value)
        self._note_state(attributes.get("quant_state"))
        for name in _CONTENTS:
            self._note_inside(attributes[name])
        self._sized += [attributes[name] for name in _HOOKS]
        return noted

    def _note_inside(self, value: Any) -> None:
        if isinstance(value, dict):
            self._note_dict(value)
            for item in value.values():
                self._note_inside(item)
        elif isinstance(value, list):
            self._lists.append(value)
            self._sized.append(value)
        elif isinstance(value, torch.Tensor):
            self._tensors.append(value)
            # A 4-bit weight's scales, and the note of how to read it.
            self._note_state(getattr(value, "quant_state", None))

    def _note_dict(self, value: dict[Any, Any]) -> None:
        self._sized.append(value)
        if value:
            self._filled.append(value)

    def _note_state(self, state: Any) -> None:
        if state is not None:
            self._note_dict(state.__dict__)
            self._note_state(getattr(state, "state2", None))

    def _find_values(self) -> Iterator[Any]:
        return itertools.chain(
            itertools.chain.from_iterable(self._filled),  # keys
            itertools.chain.from_iterable(map(dict.values, self._filled)),
            *self._lists,
        )

    def _find_forwards(self) -> list[Any]:
        return [kind.forward for kind in self._kinds]

    def _find_places(self) -> list[tuple[Any, ...]]:
        # A 4-bit weight's class answers torch functions itself, which would cost more than all the rest.
        with torch._C.DisableTorchFunctionSubclass():
            return [(t.data_ptr(), t.requires_grad, t.dtype, t.stride()) for t in self._tensors]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        root = self._root()
        if root is None:
            return False
        own = root.__dict__
        return (
            len(own) == self._size
            and list(map(len, self._sized)) == self._sizes
            and _are(self._find_values(), self._values)
            and _are(map(dict.get, self._owners, self._names, itertools.repeat(_MISSING)), self._found)
            and _are(map(own.get, self._own_names, itertools.repeat(_MISSING)), self._own_found)
            and _are(map(type, self._modules), self._classes)
            and _are(self._find_forwards(), self._forwards)
            and self._find_places() == self._places
        )


class Snapshots(dict[Any, Any]):
    """Notes of a module, kept in an attribute of it, that its copies do not share."""

    def __init__(self, owner: nn.Module | None = None) -> None:
        super().__init__()
        # A shallow copy of a module has the same attributes.
        self._owner = None if owner is None else weakref.ref(owner)
        self.credit = _CREDIT

    def belong_to(self, module: nn.Module) -> bool:
        return self._owner is not None and self._owner() is module

    def __deepcopy__(self, memo: Any) -> Snapshots:
        return Snapshots()

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled module needs nothing of this package


class Notes:
    """What was found out about modules, known for as long as nothing in them changes.

    It is kept in an attribute of the module, beside the snapshot that it holds for: it goes with the module.
    """

    def __init__(self, most: int) -> None:
        """`most`: how many notes a module keeps, the newest ones."""
        self._most = most
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def find(self, module: nn.Module, key: Any) -> Any:
        """What `put` was given; None where that was nothing, or the module is not what it was then."""
        notes = module.__dict__.get(_NOTES)
        if notes is None or not notes.belong_to(module):
            return None
        snapshot, found = notes.get(key, (None, None))
        if snapshot is None:
            return None
        if snapshot.holds():
            notes.credit = _CREDIT
            return found
        notes.pop(key, None)
        return None

    def put(self, module: nn.Module, key: Any, found: Any) -> None:
        notes = module.__dict__.get(_NOTES)
        if notes is None or not notes.belong_to(module):
            notes = module.__dict__[_NOTES] = Snapshots(module)
            self._modules.add(module)
        notes.credit -= 1
        if notes.credit < 0:
            if notes.credit > -_PAUSE:
                return
            notes.credit = 0
        while len(notes) >= self._most:
            notes.pop(next(iter(notes), None), None)
        notes[key] = Snapshot(module), found

    def drop(self, module: nn.Module) -> None:
        """Forgets what is noted of a module."""
        module.__dict__.pop(_NOTES, None)

    def clear(self) -> None:
        for module in self._modules:
            self.drop(module)
        self._modules.clear()


def _are(actual: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(map(operator.is_, actual, expected))
