"""A plant as a difference: the text of what it replaces beside the text it puts there.
Read as text, nothing is imported.
"""

import ast
import difflib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tools.site_pages.exhibits import Exhibit

Definition = ast.FunctionDef | ast.ClassDef


def plant_diff(root: Path, plant: Exhibit) -> str:
    """Unified diff of every replacement in a plant whose original is source text of this
    repository; empty if there is none.
    """
    room = (root / plant.path).read_text("utf-8")
    module, body = ast.parse(room), ast.parse(plant.source).body[0]
    imports, parts = _imports(module), []
    for call in _swaps(body):
        owner, name = ast.unparse(call.args[0]).split("."), call.args[1].value
        if owner[0] not in imports:
            continue
        path, original = _definition(root, imports[owner[0]], [*owner[1:], name])
        placed = _placed(room, module, plant.source, body, call.args[2])
        if original and placed:
            headings = f"{path}: {name}", f"{plant.path}: {plant.id}"
            parts += difflib.unified_diff(
                original.splitlines(), placed.splitlines(), *headings, n=2, lineterm=""
            )
    return "\n".join(parts)


def _swaps(body: ast.AST) -> Iterator[ast.Call]:
    calls = (
        n
        for n in ast.walk(body)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "swap"
    )
    return (c for c in calls if len(c.args) >= 3 and isinstance(c.args[1], ast.Constant))


def _imports(module: ast.Module) -> dict[str, str]:
    """Name in a file → dotted path, by folders, of what comes from stack/ or contracts/."""
    found = {}
    for node in (n for n in module.body if isinstance(n, ast.ImportFrom)):
        match str(node.module).split("."):
            case ["stackproof", "contracts", *rest]:
                home = ["contracts", *rest]
            case ["stackproof", *rest] if rest[:1] != ["spec"]:
                home = ["stack", *rest]
            case _:
                continue
        found |= {a.asname or a.name: ".".join([*home, a.name]) for a in node.names}
    return found


def _definition(root: Path, dotted: str, inside: list[str]) -> tuple[str, str]:
    """(file, text) of a function or class: of `inside` a module, or of a name and `inside` that.
    Empty where there is none.

    A name that a module has from elsewhere in the repository is followed to where it comes from.
    """
    path = dotted.replace(".", "/") + ".py"
    if not (root / path).is_file():
        dotted, _, name = dotted.rpartition(".")
        path, inside = dotted.replace(".", "/") + ".py", [name, *inside]
    if not (root / path).is_file():
        return "", ""
    text = (root / path).read_text("utf-8")
    module = ast.parse(text)
    if (elsewhere := _imports(module).get(inside[0])) is not None:
        return _definition(root, elsewhere, inside[1:])
    node: ast.AST = module
    for name in inside:
        node = next(
            (n for n in getattr(node, "body", ()) if isinstance(n, Definition) and n.name == name),
            None,
        )
    return (path, _text(text, node)) if node is not None else ("", "")


def _text(source: str, node: ast.AST) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))


def _placed(
    room: str, module: ast.Module, source: str, body: ast.AST, replacement: ast.expr
) -> str:
    """Text of the function that is put in place, of the helper of the room that makes it,
    or of the expression.
    """
    name = replacement.func if isinstance(replacement, ast.Call) else replacement
    if not isinstance(name, ast.Name):
        return ast.unparse(replacement)
    inner = next(
        (
            n
            for n in ast.walk(body)
            if isinstance(n, Definition) and n.name == name.id and n is not body
        ),
        None,
    )
    if inner is not None:
        return _text(source, inner)
    made = f"# {ast.unparse(replacement)}\n" if isinstance(replacement, ast.Call) else ""
    helper = next((n for n in module.body if isinstance(n, Definition) and n.name == name.id), None)
    return made + _text(room, helper) if helper is not None else ast.unparse(replacement)
