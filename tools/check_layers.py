"""Imports flow one way and never in a circle. Reads the source, runs nothing, needs no torch.

python tools/check_layers.py [--root DIR]
Exit code 0: nothing found. 6: an import against the arrow, or a circle.
"""

import argparse
import ast
import sys
from collections.abc import Collection, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The folder of a package, and the name it is imported by.
NAMES = {"spec": "stackproof.spec", "contracts": "stackproof.contracts", "stack": "stackproof"}
# Bottom to top. A package may import itself and everything before it. Modules directly in stack/
# stand with config; __init__.py and __main__.py, which offer what the others hold, stand with cli.
LAYERS = (
    "spec contracts kernels config evidence data model evaluate trace train replay export "
    "recipes museum cli"
)
ORDER = [f"stackproof.{layer}" for layer in LAYERS.split()]
# The trainer calls what checks a run before step 1, and that is made of the trainer's own parts.
TOGETHER = {"stackproof.subject": "stackproof.train"}
RANK = {name: rank for rank, name in enumerate(ORDER)}
# Nothing in these may import the named packages, at module level or anywhere.
FORBIDDEN = {
    "spec": ("torch", "numpy", "typer", "rich", "tokenizers", "safetensors"),
    "tools": ("torch", "numpy", "tokenizers", "safetensors"),
    "contracts": ("tools",),
    "stack": ("transformers", "tools"),
}
# All that tools may import of the package: it needs no torch.
TOOLS_IMPORT = (
    "stackproof.spec",
    "stackproof.config",
    "stackproof.cli",
    "stackproof.museum.plant",
    "stackproof.museum.edit",
)
# The other library is a witness in one place, and nowhere a part.
WITNESS = {"stack/export/parity.py": "transformers"}
# These are imported by commands that must answer without torch.
LIGHT_AT_IMPORT = (
    *(f"contracts/{name}.py" for name in ("gate", "keeper", "events", "conditions")),
    *("stack/config/load.py", "stack/kernels/table.py"),
)


def package_of(module: str) -> str | None:
    """The layer a dotted module belongs to; None for modules that are not ours."""
    if module.split(".")[0] != "stackproof":
        return None
    if module in ("stackproof", "stackproof.__main__"):
        return ORDER[-1]
    named = ".".join(module.split(".")[:2])
    named = TOGETHER.get(named, named)
    return named if named in RANK else "stackproof.config"


def module_of(path: Path) -> str:
    """The name that the file of a checkout is imported by."""
    folder, *parts = path.with_suffix("").parts
    return ".".join([NAMES.get(folder, folder), *(p for p in parts if p != "__init__")])


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted module, at module level) of every import,
    also inside functions and conditions.
    """
    top = {id(n) for n in ast.iter_child_nodes(tree)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name, id(node) in top) for a in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (
                    (
                        node.lineno,
                        f"{module}.{a.name}" if module == "stackproof" else module,
                        id(node) in top,
                    )
                    for a in names
                )
            case ast.ImportFrom(level=level) if level > 0:
                yield node.lineno, "." * level, id(node) in top


def check_file(root: Path, path: Path) -> Iterator[str]:
    """Problems of one file as `path:line message`."""
    relative = path.relative_to(root)
    own = package_of(module_of(relative))
    light = relative.parts[:2] == ("stack", "cli") or relative.as_posix() in LIGHT_AT_IMPORT
    for line, module, at_top in imports(ast.parse(path.read_text("utf-8"))):
        where, first = f"{relative.as_posix()}:{line}", module.split(".")[0]
        if module.startswith("."):
            yield f"{where} relative import; write the full name"
        witness = WITNESS.get(relative.as_posix()) == first and not at_top
        if first in FORBIDDEN.get(relative.parts[0], ()) and not witness:
            yield f"{where} {relative.parts[0]} must not import {first}"
        if light and at_top and first in ("torch", "numpy", "safetensors", "tokenizers"):
            yield f"{where} imports {first} at module level; commands must answer without it"
        if first in NAMES:
            yield f"{where} imports {module}; write {NAMES[first]}{module.removeprefix(first)}"
        target = package_of(module)
        if relative.parts[0] == "tools" and target and not module.startswith(TOOLS_IMPORT):
            yield f"{where} tools must not import {target}"
        if own and target and RANK[target] > RANK[own]:
            yield f"{where} {own} imports {target}, which stands above it"


def imported(tree: ast.AST, known: Collection[str]) -> set[str]:
    """The modules among `known` that a file imports, also inside functions."""
    found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if name in known else node.module for name in full}
    return found & set(known)


def check_circles(root: Path, files: Sequence[Path]) -> Iterator[str]:
    """One import circle, if there is any."""
    names = {module_of(p.relative_to(root)): p for p in files}
    graph = {
        name: imported(ast.parse(p.read_text("utf-8")), names) - {name} for name, p in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        circle = e.args[1][::-1]
        yield (
            f"{names[circle[0]].relative_to(root).as_posix()}: import circle {' -> '.join(circle)}"
        )


def check(root: Path) -> list[str]:
    """All problems of a checkout. An empty checkout is a problem."""
    files = [
        p
        for folder in ("spec", "contracts", "stack", "tools")
        for p in sorted((root / folder).rglob("*.py"))
    ]
    if not files:
        return [f"{root} holds no source file of spec, contracts, stack or tools"]
    return [
        *(problem for path in files for problem in check_file(root, path)),
        *check_circles(root, files),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_layers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    problems = check(parser.parse_args(arguments).root.resolve())
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problem(s) with imports; the arrow: {' < '.join(ORDER)}")
    return 6 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
