"""Applies and reverts the rows of the patch table.

A row replaces one attribute: a method on a class, or a module-level function. Every replacement reads whether its
features are active at each call, so methods that someone captured before `unpatch()` fall back to stock too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

_ABSENT = object()
# Functions of ours that stand, or stood, in the place of a row's original.
replacements: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


class PatchError(RuntimeError):
    """A patch that cannot be applied, or that changed under a running backward."""


@dataclass
class Op:
    """One feature at one place: whether it runs, and how often it did."""

    feature: str
    target: str
    active: bool = False
    mode: bool | str = False  # what the user set the feature to
    state: str = "off"  # "active", "off" or "refused"
    reason: str | None = None
    fast_calls: int = 0
    note: str | None = None  # what to know of the fast calls
    fallbacks: Counter[str] = field(default_factory=Counter)
    release: Callable[[], None] | None = None  # gives back what it holds, when it is switched off

    def __post_init__(self) -> None:
        _ops[self.feature, self.target] = self

    def fast(self, calls: int = 1) -> None:
        """Counts calls that ran our path. Compiled code is not counted: a counter would be a graph break."""
        if not torch.compiler.is_compiling():
            self.fast_calls += calls

    def fallback(self, reason: str) -> None:
        """Counts a call that ran the original, and why; in compiled code only once, when it is compiled."""
        if torch.compiler.is_compiling():
            _count_compiled(self.feature, self.target, reason)
        else:
            self.fallbacks[reason] += 1


_ops: weakref.WeakValueDictionary[tuple[str, str], Op] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # so it runs while torch.compile traces what calls it, and never again
def _count_compiled(feature: str, target: str, reason: str) -> None:
    _ops[feature, target].fallbacks[reason] += 1


@dataclass(frozen=True)
class Row:
    """One place to patch.

    `make(original, ops)` returns the replacement; `ops` maps each of `features` to its `Op`. `parameters` are the
    names that the original must take for the replacement to be exact; `aliases` are module prefixes in which the same
    function may already have been imported by name. With `stands_in` the replacement computes what the original does,
    and does not call it: where somebody has replaced or wrapped that, it is refused.
    """

    features: tuple[str, ...]
    module: str
    attribute: str
    make: Callable[[Callable[..., Any], dict[str, Op]], Callable[..., Any]]
    parameters: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    requires: str | None = None  # distribution without which the row does not apply
    stands_in: bool = False

    @property
    def target(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.attribute}"


@dataclass
class _Site:
    row: Row
    ops: dict[str, Op]
    owner: Any = None
    name: str = ""
    raw: Any = _ABSENT  # what stood in the owner's __dict__, or _ABSENT where it was inherited
    original: Callable[..., Any] | None = None
    replacement: Any = None
    refusal: str | None = None  # why it could not be installed
    absent: bool = False  # the library that it patches is not there at all
    verified: bool = True  # its source is one that the row was tested with

    @property
    def installed(self) -> bool:
        return self.replacement is not None


def fingerprint(source: str) -> str:
    """Short hash of a function's source, blind to indentation and trailing blanks."""
    text = "\n".join(line.rstrip() for line in textwrap.dedent(source).strip().splitlines())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _source_fingerprint(function: Callable[..., Any]) -> str | None:
    try:
        return fingerprint(inspect.getsource(function))
    except (OSError, TypeError):
        return None


class Engine:
    """The state of all rows. `generation` changes whenever any row is switched."""

    def __init__(self, rows: Iterable[Row], fingerprints: Mapping[str, frozenset[str]] | None = None) -> None:
        """`fingerprints`: "module:attribute" -> sources that a row was tested with; rows not listed are not checked."""
        self._sites = [_Site(row, {feature: Op(feature, row.target) for feature in row.features}) for row in rows]
        self._fingerprints = fingerprints or {}
        self.generation = 0

    @property
    def ops(self) -> list[Op]:
        return [op for site in self._sites for op in site.ops.values()]

    def apply(self, enabled: dict[str, bool | str], strict: bool = False) -> None:
        """Brings every row into the state that `enabled` (feature -> False, or a mode) asks for.

        Whatever is raised, an interruption included, nothing is patched after it.

        Raises:
            PatchError: with `strict`, a row that was refused or could not be verified.
        """
        try:
            self._switch(enabled)
            if strict:
                self._check_all()
        except BaseException:
            self._switch({})
            raise

    def _switch(self, enabled: dict[str, bool | str]) -> None:
        before = [(op.active, op.mode) for op in self.ops]
        wanted = [{f for f in site.ops if enabled.get(f, False) is not False} for site in self._sites]
        if any(bool(features) != site.installed for features, site in zip(wanted, self._sites)):
            # All off, then all wanted ones on: several rows may share an attribute, and must nest in table order.
            for site in reversed(self._sites):
                if site.installed:
                    self._remove(site)
            for features, site in zip(wanted, self._sites):
                if features:
                    self._install(site)
        for features, site in zip(wanted, self._sites):
            for feature, op in site.ops.items():
                op.active = site.installed and feature in features
                op.mode = enabled.get(feature, False)
                if not op.active and op.release is not None:
                    op.release()
                if op.active:
                    op.state = "active"
                    op.reason = None if site.verified else "unverified: its source is not one fastgemma was tested with"
                elif feature in features:
                    op.state, op.reason = "refused", site.refusal
                else:
                    op.state, op.reason = "off", None
        if before != [(op.active, op.mode) for op in self.ops]:
            self.generation += 1

    def _check_all(self) -> None:
        bad = [
            op
            for site in self._sites
            for op in site.ops.values()
            if (op.state == "refused" and not site.absent) or (op.active and not site.verified)
        ]
        if bad:
            lines = "\n".join(f"  {op.feature} at {op.target}: {op.reason}" for op in bad)
            raise PatchError(f"fastgemma: strict patching failed, nothing was patched:\n{lines}")

    def refuse(self, feature: str, target: str, reason: str) -> None:
        """Marks an op as refused from outside the table (a seam captured before patching)."""
        for op in self.ops:
            if op.feature == feature and op.target == target:
                op.state, op.reason = "refused", reason

    def _install(self, site: _Site) -> None:
        row = site.row
        site.refusal, site.absent = None, False
        if row.requires is not None and importlib.util.find_spec(row.requires) is None:
            site.refusal, site.absent = f"{row.requires} is not installed", True
            return
        try:
            owner: Any = importlib.import_module(row.module)
            *path, name = row.attribute.split(".")
            for part in path:
                owner = getattr(owner, part)
            bound = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            site.refusal = f"not found in the installed version ({error})"
            return
        original = bound.__func__ if isinstance(bound, staticmethod | classmethod) else bound
        site.refusal = _signature_problem(original, row) or _foreign(original, row)
        if site.refusal is not None:
            return
        known = self._fingerprints.get(f"{row.module}:{row.attribute}")
        site.verified = known is None or _source_fingerprint(original) in known
        replacement = row.make(original, site.ops)
        functools.update_wrapper(replacement, original)
        replacements.add(replacement)
        replacement = staticmethod(replacement) if isinstance(bound, staticmethod) else replacement
        site.owner, site.name, site.original = owner, name, original
        site.raw = vars(owner).get(name, _ABSENT)
        site.replacement = replacement  # noted first: what is interrupted after it can be removed
        setattr(owner, name, replacement)
        for module, alias in _aliases(row, original):
            setattr(module, alias, replacement)

    def _remove(self, site: _Site) -> None:
        # Someone may have wrapped our replacement since: theirs stays, and ours in it is inert from here on.
        if vars(site.owner).get(site.name) is site.replacement:
            if site.raw is _ABSENT:
                delattr(site.owner, site.name)
            else:
                setattr(site.owner, site.name, site.raw)
        for module, alias in _aliases(site.row, site.replacement):
            setattr(module, alias, site.original)
        site.replacement = None


def _aliases(row: Row, function: Any) -> list[tuple[Any, str]]:
    """(module, name) wherever a loaded module of the row's aliases holds `function` under a name of its own."""
    found = []
    for module_name, module in list(sys.modules.items()):
        if module is None or not any(module_name == a or module_name.startswith(a + ".") for a in row.aliases):
            continue
        found += [(module, name) for name, value in list(vars(module).items()) if value is function]
    return found


def _foreign(function: Callable[..., Any], row: Row) -> str | None:
    """Why what stands in the library is not the library's, or None."""
    package = importlib.import_module(row.module.partition(".")[0])
    if not row.stands_in or package.__file__ is None or written_in(function, directory_of(package)):
        return None
    where = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    return f"it was replaced or wrapped before patch(), as {where}; fastgemma computes stock's formula"


def directory_of(package: ModuleType) -> str:
    """Where a package's files begin."""
    return os.path.join(os.path.dirname(package.__file__ or ""), "")


def written_in(function: Any, directory: str) -> bool:
    """Whether a function's own code, not that of what it wraps, is in a file whose path begins so."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(directory)


def _signature_problem(function: Callable[..., Any], row: Row) -> str | None:
    """Why the replacement cannot stand in for `function`, or None."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return "its signature cannot be read"
    missing = [name for name in row.parameters if name not in names]
    if not missing:
        return None
    package = row.module.partition(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"its signature changed in {package} {version}: no parameter {', '.join(missing)}"
