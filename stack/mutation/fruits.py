"""All values that a command writes, so that two runs can be compared bit for bit."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LINES, DOCUMENT = ".jsonl", ".json"
SCORES = ".metrics."  # of a record: an evaluation writes its scores nowhere else
HASH, SIZE = ".sha256", ".bytes"
ENVIRONMENT = "::.environment."  # of the process, which forked ones take over from its parent
PLACE = "PLACE"  # what the path of the folder is replaced by
# Files that only state or show what was computed. A mutant that changes no other file changes no
# weight, score, sample, log of losses, or prepared datum.
STATEMENTS = (
    "metadata.json",
    "run.json",
    "events.jsonl",
    "gates.jsonl",
    "points.jsonl",
    "README.md",
    "output.txt",
    "ending.json",
)

Fruits = dict[str, str]  # by "file::place in it"


def fruits_of(folder: Path) -> Fruits:
    """All values below a folder: of JSON files each leaf, of others the SHA-256."""
    found: Fruits = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        name = str(path.relative_to(folder))
        data = path.read_bytes()
        if path.suffix in (LINES, DOCUMENT):
            text = data.decode("utf-8", "backslashreplace").replace(str(folder), PLACE)
            found |= {f"{name}::{key}": value for key, value in _leaves_of(path.suffix, text)}
        else:
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _leaves_of(suffix: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = (
            [json.loads(line) for line in text.splitlines()]
            if suffix == LINES
            else json.loads(text)
        )
    except ValueError:
        yield "", text
        return
    yield from _leaves(tree, "")


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    match tree:
        case dict():
            for name, value in tree.items():
                yield from _leaves(value, f"{key}.{name}")
        case list():
            for i, value in enumerate(tree):
                yield from _leaves(value, f"{key}[{i}]")
        case _:
            yield key, repr(tree)


def _any_place(key: str) -> str:
    """A key without the numbers of lines and list entries."""
    return re.sub(r"\[\d+\]", "[]", key)


class Reference:
    """What clean runs of one command bring forth, without the values in which they differ among
    each other: times, identifiers and what is measured of the machine. The size of a file whose
    hash differs is left out too, since numbers of other lengths stand in it.
    """

    def __init__(self, clean: Iterable[Fruits]):
        first, *others = clean
        self.fruits = first
        self.volatile = {_any_place(key) for other in others for key in _differing(first, other)}
        self.volatile |= {
            f"{key.removesuffix(HASH)}{SIZE}" for key in self.volatile if key.endswith(HASH)
        }

    def differing(self, found: Fruits) -> list[str]:
        """Sorted keys whose values differ from those of the clean runs."""
        differing = (k for k in _differing(self.fruits, found) if ENVIRONMENT not in k)
        return [k for k in differing if _any_place(k) not in self.volatile]


def _differing(one: Fruits, other: Fruits) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def is_statement(key: str) -> bool:
    """Whether a value only states what was computed; in a checkpoint, the state of gates."""
    file, _, place = key.partition("::")
    name = file.rsplit("/", 1)[-1]
    if name == "metadata.json" and place.startswith(SCORES):
        return False
    return name in STATEMENTS or (name == "state.json" and place.startswith(".gates."))
