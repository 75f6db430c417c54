"""Fingerprints in their first form, as records made before `commit` of
spec/carried.jsonl hold them.

The first form hashed the source text of a check, docstrings and comments included, of every
definition in `contracts` that it reached by name, and the check's module path. Only verification
reads it.
"""

import ast
from functools import cache
from pathlib import Path

from stackproof.spec.canonical import sha256_bytes, sha256_json
from stackproof.spec.files import text_lines

# left out of the first form
PLUMBING = {"contracts.gate", "contracts.keeper", "contracts.conditions"}


def first_form(normative: dict, check: str, root: Path) -> str:
    """Hex sha256 of a gate's normative fields, its check's path and the source text
    of the check below `root`.
    """
    seen: dict[tuple[str, str], str] = {}
    _collect(root, *check.split(":"), seen)
    text = "\n".join(seen[key] for key in sorted(seen))
    return sha256_json(
        {"normative": normative | {"check": check}, "check_source": sha256_bytes(text.encode())}
    )


def _collect(root: Path, module: str, name: str, seen: dict[tuple[str, str], str]) -> None:
    if module in PLUMBING or (module, name) in seen:
        return
    definitions, imports = _table(root / (module.replace(".", "/") + ".py"))
    if name in definitions:
        text, used = definitions[name]
        seen[(module, name)] = text
        for other in used:
            _collect(root, module, other, seen)
    elif name in imports:
        _collect(root, *imports[name], seen)


@cache
def _table(path: Path) -> tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, tuple[str, str]]]:
    """Top-level definitions (name: text, names used) and imports from `contracts` of one file."""
    if not path.is_file():
        return {}, {}
    text = path.read_text("utf-8")
    lines, definitions, imports = text_lines(text), {}, {}
    for node in ast.parse(text).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                names, first = (
                    [node.name],
                    min([node.lineno, *(d.lineno for d in node.decorator_list)]),
                )
            case (
                ast.Assign(targets=[ast.Name(id=target)])
                | ast.AnnAssign(target=ast.Name(id=target))
            ):
                names, first = [target], node.lineno
            case ast.ImportFrom(module=str(source)) if source.split(".")[0] == "contracts":
                imports |= {a.asname or a.name: (source, a.name) for a in node.names}
                continue
            case _:
                continue
        source = "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno])
        used = tuple(sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - set(names)))
        definitions |= dict.fromkeys(names, (source, used))
    return definitions, imports
