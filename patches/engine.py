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
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

_ABSENT = object()


class PatchError(RuntimeError):
    """A patch that cannot be applied, or that changed under a running backward."""


@dataclass
class Op:
    """One feature at one place: whether it runs, and how often it did."""

    feature: str
    target: str
    active: bool = False
    state: str = "off"  # "active", "off" or "refused"
    reason: str | None = None
    verified: bool = True
    fast_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    def fast(self) -> None:
        """Counts a call that ran our path. Compiled code is not counted: a counter would be a graph break."""
        if not torch.compiler.is_compiling():
            self.fast_calls += 1

    def fallback(self, reason: str) -> None:
        """Counts a call that ran the original, and why."""
        if not torch.compiler.is_compiling():
            self.fallbacks[reason] += 1

    def reset(self) -> None:
        self.fast_calls = 0
        self.fallbacks.clear()


@dataclass(frozen=True)
class Row:
    """One place to patch.

    `make(original, ops)` returns the replacement; `ops` maps each of `features` to its `Op`. `parameters` are the
    names that the original must take for the replacement to be exact; `aliases` are module prefixes in which the same
    function may already have been imported by name.
    """

    features: tuple[str, ...]
    module: str
    attribute: str
    make: Callable[[Callable[..., Any], dict[str, Op]], Callable[..., Any]]
    parameters: tuple[str, ...] = ()
    fingerprints: frozenset[str] = frozenset()
    aliases: str | None = None
    requires: str | None = None  # distribution without which the row does not apply

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
    aliased: list[tuple[Any, str]] = field(default_factory=list)

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

    def __init__(self, rows: Iterable[Row]) -> None:
        self._sites = [
            _Site(row, {feature: Op(feature, row.target) for feature in row.features}) for row in rows
        ]
        self.generation = 0

    @property
    def ops(self) -> list[Op]:
        return [op for site in self._sites for op in site.ops.values()]

    def apply(self, enabled: dict[str, bool], strict: bool = False) -> None:
        """Brings every row into the state that `enabled` (feature -> wanted) asks for.

        Raises:
            PatchError: with `strict`, a row that was refused or could not be verified; nothing stays changed then.
        """
        self.generation += 1
        for site in self._sites:
            wanted = {feature for feature in site.ops if enabled.get(feature, False)}
            if wanted and not site.installed:
                self._install(site, wanted)
            elif not wanted and site.installed:
                self._remove(site)
            for feature, op in site.ops.items():
                if not site.installed and feature in wanted:
                    continue  # _install recorded the refusal
                op.active = feature in wanted
                op.state, op.reason = ("active" if op.active else "off"), (op.reason if op.active else None)
                if op.active and not op.verified:
                    op.reason = "unverified: the patched source is not one that fastgemma was tested with"
        if strict:
            bad = [op for op in self.ops if op.state == "refused" or (op.active and not op.verified)]
            bad = [op for op in bad if "is not installed" not in (op.reason or "")]
            if bad:
                lines = "\n".join(f"  {op.feature} at {op.target}: {op.reason}" for op in bad)
                self.apply({})
                raise PatchError(f"fastgemma: strict patching failed, nothing was patched:\n{lines}")

    def refuse(self, feature: str, target: str, reason: str) -> None:
        """Marks an op as refused from outside the table (a seam captured before patching)."""
        for op in self.ops:
            if op.feature == feature and op.target == target:
                op.state, op.reason = "refused", reason

    def _refuse(self, site: _Site, wanted: set[str], reason: str) -> None:
        for feature in wanted:
            op = site.ops[feature]
            op.active, op.state, op.reason = False, "refused", reason

    def _install(self, site: _Site, wanted: set[str]) -> None:
        row = site.row
        if row.requires is not None and importlib.util.find_spec(row.requires) is None:
            return self._refuse(site, wanted, f"{row.requires} is not installed")
        try:
            owner: Any = importlib.import_module(row.module)
            *path, name = row.attribute.split(".")
            for part in path:
                owner = getattr(owner, part)
            bound = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            return self._refuse(site, wanted, f"not found in the installed version ({error})")
        original = bound.__func__ if isinstance(bound, staticmethod | classmethod) else bound
        problem = _signature_problem(original, row)
        if problem is not None:
            return self._refuse(site, wanted, problem)
        known = not row.fingerprints or _source_fingerprint(original) in row.fingerprints
        for op in site.ops.values():
            op.verified = known
        replacement = row.make(original, site.ops)
        functools.update_wrapper(replacement, original)
        replacement = staticmethod(replacement) if isinstance(bound, staticmethod) else replacement
        site.owner, site.name, site.original = owner, name, original
        site.raw = vars(owner).get(name, _ABSENT)
        setattr(owner, name, replacement)
        site.replacement = replacement
        for module_name in list(sys.modules) if row.aliases else ():
            module = sys.modules.get(module_name)
            if module_name.startswith(row.aliases or "") and module is not owner:
                for alias, value in list(vars(module).items()) if module is not None else ():
                    if value is original:
                        setattr(module, alias, replacement)

    def _remove(self, site: _Site) -> None:
        # Someone may have wrapped our replacement since: theirs stays, and ours in it is inert from here on.
        if vars(site.owner).get(site.name) is site.replacement:
            if site.raw is _ABSENT:
                delattr(site.owner, site.name)
            else:
                setattr(site.owner, site.name, site.raw)
        for module_name in list(sys.modules) if site.row.aliases else ():
            module = sys.modules.get(module_name)
            if module is not None and module_name.startswith(site.row.aliases or ""):
                for alias, value in list(vars(module).items()):
                    if value is site.replacement:
                        setattr(module, alias, site.original)
        site.replacement = None


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
