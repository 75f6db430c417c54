"""The catalogue of documented silent failures, and the plants, rules and tests that cover each.

A failure is *awaiting* if the part of the stack that it belongs to is not built yet. Signs of the
part in the tree decide this. An awaiting failure never counts as killed.
"""

import re
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from stackproof.spec import ROOT
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Frozen, Gate, Spec
from stackproof.spec.tables import read_toml, tables

Latency = Literal[
    "before step 1", "within k steps", "at checkpoint", "at evaluation", "at export", "in CI"
]
LATENCIES: tuple[Latency, ...] = get_args(Latency)


class Capability(Frozen):
    """A part of the stack that may not be built yet.
    A sign is a glob below the root, optionally with `::` and a pattern that a matching file must
    contain.
    """

    name: str
    signs: tuple[str, ...] = Field(min_length=1)
    why: str = Field(min_length=10, description="what counts as built")

    def exists(self, root: Path = ROOT) -> bool:
        """Whether a sign of the capability is in the tree."""
        return any(_is_there(root, sign) for sign in self.signs)


def _is_there(root: Path, sign: str) -> bool:
    glob, _, pattern = sign.partition("::")
    files = (p for p in root.glob(glob) if p.is_file())
    return any(not pattern or re.search(pattern, p.read_text("utf-8")) for p in files)


class Failure(Frozen):
    """One documented silent failure.

    `steps` is the allowed latency in steps, for the latency `within k steps`. It is covered by
    `plants` of the museum, by broken-repository tests of integrity `rules`, or by `tests`. Without
    the capability `awaiting` it cannot occur here. Its gates are those of its plants; one that has
    no plant states why no gate of a run can see it.
    """

    id: str = Field(pattern=r"^SF-[A-Z]+\d+$")
    name: str
    subsystem: str
    mechanism: str = Field(min_length=20)
    symptom: str = Field(min_length=5, description="the visible symptom, if any")
    latency: Latency
    steps: int | None = Field(None, ge=1)
    severity: int = Field(
        ge=1,
        le=5,
        description=(
            "5 run worthless or false claim; 4 materially wrong; 3 degraded; 2 cost; 1 cosmetic"
        ),
    )
    sources: tuple[str, ...] = Field(min_length=1)
    plants: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    awaiting: str | None = None
    no_gate: str | None = Field(None, min_length=20)

    @model_validator(mode="after")
    def _whole(self):
        if (self.steps is None) == (self.latency == "within k steps"):
            raise ValueError(
                f"{self.id}: steps belongs to the latency within k steps, and only to it"
            )
        if not (self.plants or self.rules or self.tests or self.awaiting):
            raise ValueError(
                f"{self.id}: name a plant, a rule, a test, or the capability it awaits"
            )
        if (self.no_gate is None) != bool(self.plants or self.awaiting):
            raise ValueError(f"{self.id}: no_gate belongs to failures that no plant makes")
        return self


class Catalogue(Frozen):
    """All failures and capabilities by name."""

    failures: dict[str, Failure]
    capabilities: dict[str, Capability]
    root: Path = Field(default=ROOT, exclude=True)

    @cached_property
    def missing(self) -> frozenset[str]:
        """Names of the capabilities that are not built yet, cached."""
        return frozenset(
            name
            for name, capability in self.capabilities.items()
            if not capability.exists(self.root)
        )

    def awaits(self, failure: Failure) -> bool:
        """Whether the failure's capability is not built yet."""
        return failure.awaiting in self.missing

    def awaiting(self) -> list[Failure]:
        """Failures that cannot occur yet, because their capability is not built."""
        return [f for f in self.failures.values() if self.awaits(f)]

    def of_plant(self, plant_id: str) -> list[Failure]:
        """Failures that a plant covers."""
        return [f for f in self.failures.values() if plant_id in f.plants]

    def deadline(self, gate: Gate, plant_id: str) -> tuple[Latency, int | None]:
        """The latest moment at which a kill of the plant counts, and its number of steps if it is
        counted in steps.

        The earliest latency of the plant's failures; without failures, the moment of the gate.
        """
        stated = [(LATENCIES.index(f.latency), f.steps) for f in self.of_plant(plant_id)]
        if stated:
            order, steps = min(stated, key=lambda s: (s[0], s[1] or 0))
            return LATENCIES[order], steps
        is_artifact = gate.moment == "artifact"
        return (moment_of_artifact(gate) if is_artifact else _MOMENTS[gate.moment]), None


_MOMENTS: dict[str, Latency] = {
    "preflight": "before step 1",
    "runtime": "within k steps",
    "repository": "in CI",
}


def moment_of_artifact(gate: Gate) -> Latency:
    """When an artifact gate looks: at a checkpoint, at an export, or when a command reads a
    checkpoint.
    """
    match gate.kinds[0]:
        case "evaluate" | "trace":
            return "at evaluation"
        case "export":
            return "at export"
    return "at checkpoint"


def answering_gates(spec: Spec, failure: Failure) -> tuple[str, ...]:
    """Ids of the gates that list a plant of the failure."""
    return tuple(g.id for g in spec.gates.values() if set(g.plants) & set(failure.plants))


def load_catalogue(root: Path = ROOT) -> Catalogue:
    """Read `spec/failures/*.toml` under `root`; a tree without them has an empty catalogue.
    Raises IntegrityError naming file and field.
    """
    return _load(Path(root).resolve())


@cache
def _load(root: Path) -> Catalogue:
    failures: dict[str, Failure] = {}
    capabilities: dict[str, Capability] = {}
    for path in sorted((root / "spec" / "failures").glob("*.toml")):
        document = read_toml(path)
        for capability in tables(document, "capability", Capability, origin=path.name):
            _enter(capabilities, capability.name, capability, path)
        for failure in tables(document, "failure", Failure, origin=path.name, subsystem=path.stem):
            _enter(failures, failure.id, failure, path)
        if unknown := document.keys() - {"capability", "failure"}:
            raise IntegrityError(
                f"{path.name}: unknown table {min(unknown)}", allowed="failure, capability"
            )
    for failure in failures.values():
        if failure.awaiting is not None and failure.awaiting not in capabilities:
            raise IntegrityError(
                f"{failure.id} awaits {failure.awaiting}, which is not a capability",
                allowed=", ".join(sorted(capabilities)),
            )
    return Catalogue(failures=failures, capabilities=capabilities, root=root)


def _enter(table: dict, key: str, value: object, path: Path) -> None:
    if key in table:
        raise IntegrityError(
            f"{path.name}: {key} is there twice", next_step="ids are never reused; choose another"
        )
    table[key] = value
