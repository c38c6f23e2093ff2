"""Adds the fingerprints of everything that the patch table replaces, in unpacked releases, to those on record.

    python tests/portability/fingerprint.py DIR [DIR ...]

Each DIR holds packages as a wheel unpacks them (`transformers/`, `peft/`, `trl/`, `accelerate/`, `bitsandbytes/`);
nothing in them is imported. Run it when a release is supported, after reading what changed and running the suite
against it. To drop those of old releases, empty the record first, and name every supported one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from fastgemma.patches import fingerprints
from fastgemma.patches.engine import fingerprint
from fastgemma.patches.table import ROWS


def source_of(path: Path, attribute: str) -> str | None:
    """The text of a function or method in a file, decorators included, or None where the file does not define it."""
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in attribute.split("."):
        bodies = getattr(node, "body", [])
        found = [n for n in bodies if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            return None
        node = found[-1]
    if not isinstance(node, ast.FunctionDef):
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def main() -> None:
    known = {target: set(hashes) for target, hashes in fingerprints.FINGERPRINTS.items()}
    for directory in map(Path, sys.argv[1:]):
        for row in ROWS:
            path = directory / (row.module.replace(".", "/") + ".py")
            source = source_of(path, row.attribute) if path.exists() else None
            if source is not None:
                known.setdefault(f"{row.module}:{row.attribute}", set()).add(fingerprint(source))
    lines = ['"""Sources that the patch table was tested with; written by tests/portability/fingerprint.py."""\n']
    lines.append("FINGERPRINTS: dict[str, frozenset[str]] = {")
    for target, hashes in sorted(known.items()):
        values = ", ".join(f'"{value}"' for value in sorted(hashes))
        line = f'    "{target}": frozenset({{{values}}}),'
        if len(line) > 120:
            inner = "\n".join(f'            "{value}",' for value in sorted(hashes))
            line = f'    "{target}": frozenset(\n        {{\n{inner}\n        }}\n    ),'
        lines.append(line)
    Path(fingerprints.__file__).write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
