"""Plants with their place and their text in a checkout, read without torch."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from stackproof.museum.edit import Edit
from stackproof.museum.plant import Plant, read_plants
from tools.source import definitions

FOLDER = "stack/museum"


@dataclass(frozen=True)
class Exhibit(Plant):
    """A plant with the file and line of its entry, and the text of its generator function if it has
    one.
    """

    path: str = ""
    line: int = 0
    source: str = ""

    @property
    def generator_text(self) -> str:
        return f"{self.source}\n"


def read_exhibits(root: Path) -> dict[str, Exhibit]:
    """All plants of a repository by id. Raises IntegrityError if an entry is broken."""
    folder = root / FOLDER
    places = {
        line: {"path": path.relative_to(root).as_posix(), "line": number}
        for path in sorted((folder / "plants").glob("*.toml"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if line.startswith('id = "')
    }
    return {
        name: Exhibit(
            **vars(plant), **places[f'id = "{name}"'], source=source_of(folder, plant.function)[1]
        )
        for name, plant in read_plants(folder / "plants").items()
    }


def plant_diff(root: Path, plant: Plant) -> str:
    """Unified diff of the functions that a plant edits; empty if it has a generator instead."""
    parts: list[str] = []
    for target, edits in edits_by_target(plant).items():
        path, before = source_of(root, target)
        headings = f"{path}: {target.partition(':')[2]}", f"{path}: {plant.id}"
        after = _edited(before, edits).splitlines()
        parts += difflib.unified_diff(before.splitlines(), after, *headings, n=3, lineterm="")
    return "\n".join(parts)


def edits_by_target(plant: Plant) -> dict[str, list[Edit]]:
    """The edits of a plant by the function that they change."""
    targets = dict.fromkeys(e.target for e in plant.edits)
    return {target: [e for e in plant.edits if e.target == target] for target in targets}


def _edited(source: str, edits: list[Edit]) -> str:
    for edit in edits:
        imports = "".join(f"{line}\n" for line in edit.imports)
        source = imports + source.replace(edit.old, edit.new, 1)
    return source


def source_of(root: Path, target: str) -> tuple[str, str]:
    """(file, text) of the function "module:Class.name"; an empty text without it."""
    module, _, name = target.partition(":")
    path = module.removeprefix("stackproof.").replace(".", "/") + ".py"
    if not (root / path).is_file() and (root / "stack" / path).is_file():
        path = f"stack/{path}"
    found = definitions(root / path).get(name)
    return path, found.text if found else ""
