"""A plant: a deliberate bug, put into the real stack for the length of a `with`,
that one gate must catch.

Plants are data, one file per subsystem in `plants/`. Most are edits of one function. The others
name a generator function of this package that puts the bug in place, yields and takes it out again.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from stackproof.museum.edit import Edit, edited
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Frozen
from stackproof.spec.records import GateId, PlantId
from stackproof.spec.tables import read_tables

FOLDER = Path(__file__).parent / "plants"
Trainer = Literal["stack", "script"]
_touches = 0


class _Change(Frozen):
    """`Edit` as it stands in TOML."""

    target: str
    old: str
    new: str
    imports: tuple[str, ...] = ()


class _Entry(Frozen):
    """A plant as it stands in TOML: with `target`, `old`, `new` and perhaps `imports`, with a list
    of such tables as `edits`, or with `function`.
    """

    id: PlantId
    gate: GateId
    title: str
    story: str
    sources: tuple[str, ...]
    museum: dict[str, Any] = {}
    edits: tuple[_Change, ...] = ()
    function: str = ""
    target: str | None = None
    old: str | None = None
    new: str | None = None
    imports: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_form(self) -> "_Entry":
        own = [self.target, self.old, self.new]
        forms = [None not in own, bool(self.edits), bool(self.function)]
        if sum(forms) != 1 or (not forms[0] and (any(own) or self.imports)):
            raise ValueError("it needs target, old and new, or edits, or function")
        return self

    def plant(self) -> "Plant":
        changes = self.edits or ([self] if self.target is not None else [])
        return Plant(
            edits=tuple(Edit(c.target, c.old, c.new, c.imports) for c in changes),
            story=" ".join(self.story.split()),
            **self.model_dump(include={"id", "gate", "title", "sources", "function", "museum"}),
        )


@dataclass(frozen=True)
class Plant:
    """One exhibit of the museum: an edit, several, or the name
    "module:function" of a generator function. `museum` holds values of the configuration, by dotted
    key, that the plant needs beside those of its gate.
    """

    id: str
    gate: str
    title: str
    story: str
    sources: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    function: str = ""
    museum: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> Trainer:
        """The trainer that the plant changes: `stack train`, or the script of another trainer."""
        script = f"{__package__}.script:"
        places = (*(e.target for e in self.edits), f"{__package__}.{self.function}")
        return "script" if any(place.startswith(script) for place in places) else "stack"

    def apply(self) -> AbstractContextManager[None]:
        """Put the bug in place until the context ends.
        Raises IntegrityError if what it changes is not there.
        """
        return edited(self.edits, touch) if self.edits else contextmanager(self._generator())()

    @property
    def sha256(self) -> str:
        """Hash of what the plant changes, and of its own configuration."""
        change: Any = [[e.target, e.old, e.new, list(e.imports)] for e in self.edits]
        change = change or self.generator_text
        return sha256_json([change, dict(self.museum)] if self.museum else change)

    @property
    def generator_text(self) -> str:
        """The source text of the generator function."""
        return inspect.getsource(self._generator())

    def _generator(self) -> Callable[[], Iterator[None]]:
        module, name = self.function.split(":")
        found = getattr(importlib.import_module(f"{__package__}.{module}"), name, None)
        if found is None:
            raise IntegrityError(f"plant {self.id} names {self.function}, which does not exist")
        return found


def read_plants(folder: Path = FOLDER) -> dict[str, Plant]:
    """All plants by id, in order of file and place. Imports nothing that they change.
    Raises IntegrityError naming a broken entry.
    """
    found: dict[str, Plant] = {}
    for path in sorted(folder.glob("*.toml")):
        for entry in read_tables(path, "plant", _Entry):
            if entry.id in found:
                raise IntegrityError(f"{path.name}: plant id {entry.id} is used twice")
            found[entry.id] = entry.plant()
    return found


@cache
def load_museum() -> dict[str, Plant]:
    """All plants of the stack by id."""
    return read_plants()


@contextmanager
def swap(owner: object, name: str, replacement: object, *, counted: bool = True) -> Iterator[None]:
    """Replace `owner.name` for the length of the context and count each call of the replacement.

    With `counted` false the plant calls `touch()` itself when the bug strikes: for replacements
    that mostly do as the original does.
    """
    original = inspect.getattr_static(owner, name)
    placed = replacement
    if counted and inspect.isfunction(replacement):

        @functools.wraps(replacement)
        def placed(*args, **kwargs):
            touch()
            return replacement(*args, **kwargs)

    setattr(owner, name, placed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def touch() -> None:
    """Count that the planted code ran.
    Called by edits and by `swap`; a plant that replaces data calls it itself.
    """
    global _touches
    _touches += 1


def touches() -> int:
    """How often planted code has run in this process."""
    return _touches
