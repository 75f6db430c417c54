"""Imports flow one way and never in a circle. Reads the source, runs nothing, needs no torch.

python tools/check_layers.py [--root DIR]
Exit code 0: nothing found. 6: an import against the arrow, or a circle.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools/checkout")]

from stackproof.spec.visible import print_visible  # noqa: E402

# The folder of a package, and the name it is imported by.
NAMES = {"spec": "stackproof.spec", "contracts": "stackproof.contracts", "stack": "stackproof"}
# Bottom to top. A package may import itself and everything before it. Modules directly in stack/
# stand with config; __init__.py and __main__.py, which offer what the others hold, stand with cli.
LAYERS = (
    "spec contracts kernels config evidence data distributed model evaluate trace train "
    "replay export recipes museum mutation cli"
)
ORDER = [f"stackproof.{layer}" for layer in LAYERS.split()]
# The trainer calls what checks a run before step 1, and that is made of the trainer's own parts.
TOGETHER = {"stackproof.subject": "stackproof.train"}
RANK = {name: rank for rank, name in enumerate(ORDER)}
HEAVY = ("torch", "numpy", "tokenizers", "safetensors")
# Nothing in these may import the named packages, at module level or anywhere.
FORBIDDEN = {
    "spec": (*HEAVY, "typer", "rich"),
    "tools": HEAVY,
    "contracts": ("tools",),
    "stack": ("transformers", "tools"),
}
# All that tools may import of the package: it needs no torch.
TOOLS_IMPORT = (
    "stackproof.spec",
    "stackproof.config",
    "stackproof.cli",
    "stackproof.evidence",
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


class Import(NamedTuple):
    """An import statement of one name: `import module` if `name` is empty."""

    line: int
    module: str
    name: str
    is_at_top: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def imports(path: Path) -> list[Import]:
    """Every import of a file, also inside functions and conditions. A relative one begins with a
    dot.
    """
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(n) for n in ast.iter_child_nodes(tree)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [Import(node.lineno, a.name, "", id(node) in top) for a in names]
            case ast.ImportFrom(names=names, level=level):
                module = "." * level + (node.module or "")
                found += [Import(node.lineno, module, a.name, id(node) in top) for a in names]
    return found


def check_file(path: str, found: Sequence[Import]) -> Iterator[str]:
    """Problems of one file as `path:line message`."""
    folder, own = path.partition("/")[0], package_of(module_of(Path(path)))
    light = path.startswith("stack/cli/") or path in LIGHT_AT_IMPORT
    for each in found:
        module = each.full if each.module == "stackproof" else each.module
        where, first = f"{path}:{each.line}", module.partition(".")[0]
        if module.startswith("."):
            yield f"{where} relative import; write the full name"
        witness = WITNESS.get(path) == first and not each.is_at_top
        if first in FORBIDDEN.get(folder, ()) and not witness:
            yield f"{where} {folder} must not import {first}"
        if light and each.is_at_top and first in HEAVY:
            yield f"{where} imports {first} at module level; commands must answer without it"
        if first in NAMES:
            yield f"{where} imports {module}; write {NAMES[first]}{module.removeprefix(first)}"
        target = package_of(module)
        if folder == "tools" and target and not module.startswith(TOOLS_IMPORT):
            yield f"{where} tools must not import {target}"
        if own and target and RANK[target] > RANK[own]:
            yield f"{where} {own} imports {target}, which stands above it"


def check_circles(files: dict[str, list[Import]]) -> Iterator[str]:
    """The first import circle."""
    paths = {module_of(Path(path)): path for path in files}
    graph = {
        name: ({i.full if i.full in paths else i.module for i in files[path]} & paths.keys())
        - {name}
        for name, path in paths.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        circle = e.args[1][::-1]
        yield f"{paths[circle[0]]}: import circle {' -> '.join(circle)}"


def check(root: Path) -> list[str]:
    """All problems of a checkout. An empty checkout is a problem."""
    folders = ("spec", "contracts", "stack", "tools")
    paths = [p for folder in folders for p in sorted((root / folder).rglob("*.py"))]
    files = {p.relative_to(root).as_posix(): imports(p) for p in paths}
    if not files:
        return [f"{root} holds no source file of spec, contracts, stack or tools"]
    problems = dict.fromkeys(x for path, found in files.items() for x in check_file(path, found))
    return [*problems, *check_circles(files)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_layers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    problems = check(parser.parse_args(arguments).root.resolve())
    for problem in problems:
        print_visible(problem)
    print_visible(f"{len(problems)} problem(s) with imports; the arrow: {' < '.join(ORDER)}")
    return 6 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
