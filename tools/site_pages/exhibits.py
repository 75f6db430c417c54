"""Plants with their place in the repository.
Nothing that a plant changes is imported, so the site builds without torch.
"""

import ast
import difflib
import textwrap
from dataclasses import dataclass
from pathlib import Path

from stackproof.museum.edit import Edit
from stackproof.museum.plant import Plant, read_plants

FOLDER = "stack/museum"


@dataclass(frozen=True)
class Exhibit:
    """One plant, where its entry stands, and the text of its generator
    function if it is no edit.
    """

    plant: Plant
    path: str
    line: int
    source: str

    @property
    def id(self) -> str:
        return self.plant.id

    @property
    def gate(self) -> str:
        return self.plant.gate

    @property
    def title(self) -> str:
        return self.plant.title


def read_exhibits(root: Path) -> dict[str, Exhibit]:
    """All plants of a repository by id. Raises IntegrityError if an entry is broken."""
    folder = root / FOLDER
    lines = {
        line: (path.relative_to(root).as_posix(), number)
        for path in sorted((folder / "plants").glob("*.toml"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if line.startswith('id = "')
    }
    return {
        plant.id: Exhibit(plant, *lines[f'id = "{plant.id}"'], _function(folder, plant.function))
        for plant in read_plants(folder / "plants").values()
    }


def plant_diff(root: Path, plant: Plant) -> str:
    """Unified diff of what the edits of a plant change, function by function;
    empty if it is no edit.
    """
    parts: list[str] = []
    for target in dict.fromkeys(e.target for e in plant.edits):
        path, before = source_of(root, target)
        edits = [e for e in plant.edits if e.target == target]
        headings = f"{path}: {target.partition(':')[2]}", f"{path}: {plant.id}"
        parts += difflib.unified_diff(
            before.splitlines(), _after(before, edits).splitlines(), *headings, n=3, lineterm=""
        )
    return "\n".join(parts)


def _after(source: str, edits: list[Edit]) -> str:
    for edit in edits:
        imports = "".join(f"{line}\n" for line in edit.imports)
        source = imports + source.replace(edit.old, edit.new, 1)
    return source


def source_of(root: Path, target: str) -> tuple[str, str]:
    """(file, dedented text) of the function that "module:Class.name" names;
    an empty text if it is not there.
    """
    module, _, name = target.partition(":")
    path = module.removeprefix("stackproof.").replace(".", "/") + ".py"
    file = root / path if (root / path).is_file() else root / "stack" / path
    if not file.is_file():
        return path, ""
    text = file.read_text("utf-8")
    node: ast.AST | None = ast.parse(text)
    for part in name.split("."):
        found = (
            n
            for n in getattr(node, "body", ())
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part
        )
        node = next(found, None)
    return file.relative_to(root).as_posix(), _text(text, node) if node is not None else ""


def _function(folder: Path, name: str) -> str:
    """Text of a generator function "module:name" of the museum; empty for no name."""
    module, _, function = name.partition(":")
    return source_of(folder, f"{module}:{function}")[1] if name else ""


def _text(source: str, node: ast.AST) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
