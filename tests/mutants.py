"""Changes of single expressions of the kernels, for `mutation`: signs, terms, edges of masks, constants, addresses."""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mutation_equivalents import EQUIVALENT

KERNELS = Path(__file__).parents[1] / "kernels"

ENTRY_POINTS = {"kernel", "kernel_of_any_numbers"}
# A product becomes a sum, not a quotient: numbers of the same kind, which addresses too can be computed from.
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.RShift: ast.LShift,
}
EDGES: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
CALLS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}
NAN = ast.parse('float("nan")', mode="eval").body
# Their arguments are shapes, numbers of axes, and hints to the compiler.
OPAQUE_CALLS = ("tl.arange", "tl.program_id", "tl.num_programs", "tl.zeros")


@dataclass(frozen=True)
class Function:
    """A device function of a file of kernels."""

    file: str
    source: str
    node: ast.FunctionDef
    is_entry_point: bool

    @cached_property
    def names(self) -> set[str]:
        """Those in its body, of what it calls among others."""
        return {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All of them, each once."""
        found: dict[tuple[int, str], Mutant] = {}
        for statement in self.node.body:
            for node in expressions(statement):
                for operator, old, new in changes(node):
                    mutant = mutated(self, operator, old, new)
                    found.setdefault((mutant.line, mutant.after), mutant)
        return list(found.values())


@dataclass(frozen=True)
class Mutant:
    """One change of one expression: `before` and `after` are the lines that it spans, `source` is the whole file."""

    function: Function
    line: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """The same as long as the file is."""
        return digest(f"{self.function.source} {self.line} {self.after}")

    @property
    def reason(self) -> str | None:
        """Why it computes the same as what it was made from, if that is known."""
        return EQUIVALENT.get((self.function.node.name, self.before, self.after))

    def __str__(self) -> str:
        return f"kernels/{self.function.file}.py:{self.line}: {self.before} -> {self.after}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device_functions(files: Iterable[str]) -> dict[str, Function]:
    """By name, which no two share."""
    found: dict[str, Function] = {}
    for file in files:
        source = (KERNELS / f"{file}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if decorators & {"jit", *ENTRY_POINTS}:
                    assert node.name not in found, node.name
                    found[node.name] = Function(file, source, node, bool(decorators & ENTRY_POINTS))
    return found


def reached(function: str, functions: dict[str, Function]) -> set[str]:
    """The device functions that this one calls, and itself."""
    found, waiting = set(), [function]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += functions[name].names & functions.keys()
    return found


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one that are worth changing: no targets, shapes, axes, slices or annotations."""
    yield node
    below: list[ast.AST | None]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        below = [node.func.value if isinstance(node.func, ast.Attribute) else None]
        below += [] if name in OPAQUE_CALLS else node.args[:1] if name == "tl.multiple_of" else node.args
        below += [keyword.value for keyword in node.keywords if keyword.arg == "mask"]
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Subscript)):
        below = [node.value]
    elif isinstance(node, (ast.List, ast.Attribute)):
        below = []
    else:
        below = list(ast.iter_child_nodes(node))
    for child in below:
        if child is not None:
            yield from expressions(child)


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """What to do to a node: the name of the change, what is replaced, and by what."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield "operator", node, ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.BitAnd)):
            yield "term dropped", node, node.left
        if isinstance(node.op, (ast.Add, ast.Mult, ast.BitAnd)):
            yield "term dropped", node, node.right
    elif isinstance(node, ast.AugAssign):
        yield "operator", node, ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
        yield "term dropped", node, ast.Assign([node.target], node.value, lineno=node.lineno)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITES:
        yield "condition", node, ast.Compare(node.left, [OPPOSITES[type(node.ops[0])]()], node.comparators)
        if type(node.ops[0]) in EDGES:
            yield "edge", node, ast.Compare(node.left, [EDGES[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.UnaryOp):
        yield "sign", node, node.operand
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", node, ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield "constant", node, ast.Constant(node.value * 1.01 or 1.0)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield from _changes_of_call(node, node.func)
    operands = {ast.BinOp: ("left", "right"), ast.Compare: ("left",)}.get(type(node), ())
    for operand in [getattr(node, name) for name in operands] + getattr(node, "comparators", []):
        if isinstance(operand, ast.Constant) and isinstance(operand.value, int):
            yield "off by one", operand, ast.Constant(operand.value + 1)


def _changes_of_call(node: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    name = function.attr
    if name in CALLS:
        swapped = ast.Attribute(function.value, CALLS[name])
        yield "least or greatest", node, ast.Call(swapped, node.args, node.keywords)
    if name == "where":
        condition, first, second = node.args
        yield "choice dropped", node, first
        yield "choice dropped", node, second
        yield "choice swapped", node, ast.Call(function, [condition, second, first], [])
    if name in ("load", "store") and not isinstance(node.args[0], ast.List):
        moved = ast.BinOp(node.args[0], ast.Add(), ast.Constant(1))
        yield "off by one", node.args[0], moved
    for keyword in node.keywords:
        if keyword.arg == "other":
            value = getattr(keyword.value, "value", None)
            filling = NAN if isinstance(value, float) and not value else ast.Constant(int(not value))
            yield "filling", keyword.value, filling


def mutated(function: Function, operator: str, old: ast.AST, new: ast.AST) -> Mutant:
    """With the text of `old` replaced by that of `new`; all other text, and so most lines, stays."""
    assert isinstance(old, (ast.expr, ast.stmt)) and old.end_lineno and old.end_col_offset is not None
    lines = function.source.encode().splitlines(keepends=True)
    span = b"".join(lines[old.lineno - 1 : old.end_lineno])
    start, end = old.col_offset, len(span) - len(lines[old.end_lineno - 1]) + old.end_col_offset
    is_enclosed = span[start - 1 : start] + span[end : end + 1] == b"()"
    is_plain = is_enclosed or isinstance(new, (ast.stmt, ast.Constant, ast.Name, ast.Call))
    text = ast.unparse(new) if is_plain else f"({ast.unparse(new)})"
    after = span[:start] + text.encode() + span[end:]
    return Mutant(
        function,
        old.lineno,
        operator,
        " ".join(span.decode().split()),
        " ".join(after.decode().split()),
        b"".join((*lines[: old.lineno - 1], after, *lines[old.end_lineno :])).decode(),
    )


def shuffled(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """In an order that the seed decides, kinds of changes taking turns; without the equivalent ones."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, str, int, Mutant]] = []
    mutants = list(mutants)
    random.Random(seed).shuffle(mutants)
    for mutant in mutants:
        if mutant.reason is None:
            turns.append((seen[mutant.operator], mutant.operator, len(turns), mutant))
            seen[mutant.operator] += 1
    return [turn[-1] for turn in sorted(turns, key=lambda turn: turn[:3])]


def chosen(functions: dict[str, Function], per_kernel: int, seed: int) -> list[Mutant]:
    """So many mutants of every kernel, of its helpers where it has too few itself, and of a helper a third as many."""
    pools = {name: shuffled(function.mutants, seed) for name, function in functions.items()}
    counts = {name: per_kernel if functions[name].is_entry_point else -(-per_kernel // 3) for name in functions}
    for name, function in functions.items():
        helpers = sorted(reached(name, functions) - {name})
        missing = per_kernel - len(pools[name]) - sum(min(counts[helper], len(pools[helper])) for helper in helpers)
        if function.is_entry_point and missing > 0 and helpers:
            counts[max(helpers, key=lambda helper: len(pools[helper]) - counts[helper])] += missing
    return [mutant for name in functions for mutant in pools[name][: counts[name]]]
