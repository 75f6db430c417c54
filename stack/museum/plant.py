"""A plant: a deliberate bug, put into the real stack for the length of a `with`,
that one gate must catch.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from stackproof.spec.canonical import sha256_bytes


@dataclass(frozen=True)
class Plant:
    """One exhibit of the museum. `apply()` puts the bug in place until the context ends."""

    id: str
    gate: str
    title: str
    story: str
    sources: tuple[str, ...]
    apply: Callable[[], AbstractContextManager[None]]
    sha256: str


ROOMS = (
    "corpus data tokenizer curriculum model model_hidden points moe kernel precision loss optim "
    "optim_steps schedule checkpoint evaluation sampling runtime figures wiring export foreign "
    "foreign_updates"
).split()
PLANTS: dict[str, Plant] = {}
_touches = 0


def plant(
    plant_id: str, *, gate: str, title: str, story: str, sources: tuple[str, ...]
) -> Callable:
    """Register a generator function (patch, `yield`, restore) as a plant.
    All arguments are literals: the site reads them as text.
    """

    def register(function: Callable[[], Iterator[None]]) -> Plant:
        if plant_id in PLANTS:
            raise ValueError(f"plant id {plant_id} is used twice")
        source = inspect.getsource(function)
        exhibit = Plant(
            plant_id,
            gate,
            title,
            story,
            sources,
            contextmanager(function),
            sha256_bytes(source.encode()),
        )
        PLANTS[plant_id] = exhibit
        return exhibit

    return register


@contextmanager
def swap(owner: object, name: str, replacement: object, *, counted: bool = True) -> Iterator[None]:
    """Replace `owner.name` for the length of the context and count each call of the replacement.

    With `counted` false the plant says by `touch()` itself when the bug struck: for replacements
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
    """Say that the planted line ran.
    Called by `swap`; a plant that replaces data calls it itself.
    """
    global _touches
    _touches += 1


def touches() -> int:
    """How often planted lines have run in this process."""
    return _touches


def load_museum() -> dict[str, Plant]:
    """Import every room and return all plants by id."""
    for room in ROOMS:
        importlib.import_module(f"stackproof.museum.{room}")
    return PLANTS
