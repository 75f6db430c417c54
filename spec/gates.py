"""The spec: gates with their limits, loaded from TOML and fingerprinted
together with their checks.
"""

import difflib
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stackproof.spec import ROOT
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import ConfigError, IntegrityError
from stackproof.spec.fingerprint import Carried, check_fingerprint, read_carried
from stackproof.spec.tables import read_tables, read_toml, validated

GATE_ID = r"^[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*$"
Moment = Literal["preflight", "runtime", "artifact", "repository"]
Severity = Literal["halt", "block-release", "warn"]
SUBSYSTEMS = (
    "corpus data tokenizer curriculum model kernel loss optim schedule checkpoint evaluation "
    "sampling precision distributed runtime moe export tuning evidence"
).split()


class Frozen(BaseModel):
    """Base of all models here: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Limit(Frozen):
    """One number a gate holds a measurement against, with its unit, direction and reason.

    `measured` names what the check reports for it, where that is not the limit's own name
    without `_max` or `_min`.
    """

    value: float
    unit: str
    direction: Literal["at-most", "at-least", "exactly"]
    why: str = Field(min_length=10)
    measured: tuple[str, ...] = ()

    def allows(self, measured: float) -> bool:
        """Whether a measurement is within the limit. NaN is never allowed."""
        match self.direction:
            case "at-most":
                return bool(measured <= self.value)
            case "at-least":
                return bool(measured >= self.value)
            case "exactly":
                return bool(measured == self.value)

    def looser_than(self, other: "Limit") -> bool:
        """Whether this limit admits something `other` refuses."""
        if self.direction != other.direction:
            return True
        match self.direction:
            case "at-most":
                return self.value > other.value
            case "at-least":
                return self.value < other.value
            case "exactly":
                return self.value != other.value


class Rates(Frozen):
    """How often a statistical gate is wrong in either direction,
    and where both figures were measured. Not normative.
    """

    false_alarm: float = Field(
        ge=0,
        le=1,
        description="share of looks, or of runs if `per` is run, at which a clean run is red",
    )
    per: Literal["look", "run"]
    power: float = Field(
        ge=0, le=1, description="share of runs with the effect in which the gate is red"
    )
    effect: str = Field(min_length=10, description="what has to be wrong, and how much")
    measured_by: str = Field(
        pattern=r"^(tests|benchmarks)/\S+$",
        description="the test or benchmark that measures both again",
    )


class Certain(Frozen):
    """Gates that chance cannot turn red on a clean run, and why. Not normative."""

    why: str = Field(min_length=40)
    gates: tuple[str, ...]


class Gate(Frozen):
    """An acceptance rule. `check` names the function or class that decides it,
    by its module below `stackproof`.

    A gate is installed in runs of its `kinds` whose configuration holds the values of `when`, by
    dotted key, and sets the keys in `needs` to more than 0, on `min_ranks` processes or more. In
    all others it is absent: neither a pass nor a gap. A list in `when` allows each of its values.
    `museum` holds further values under which the museum proves it, where its own run would not show
    it, and selects one of a list.
    `hint` is where a person looks first when it is red. Beside one of the gates in `yields_to` it
    is reported as a consequence.
    """

    id: str = Field(pattern=GATE_ID)
    title: str
    statement: str
    moment: Moment
    severity: Severity
    check: str = Field(pattern=r"^contracts(\.[a-z_]+)+:[A-Za-z_][A-Za-z0-9_]*$")
    plants: tuple[str, ...]
    tests: tuple[str, ...]
    since: str
    sources: tuple[str, ...]
    kinds: tuple[str, ...] = ("train",)
    when: dict[str, bool | int | float | str | tuple[str, ...]] = {}
    needs: tuple[str, ...] = ()
    min_ranks: int = Field(1, ge=1)
    museum: dict[str, bool | int | float | str] = {}
    limits: dict[str, Limit] = {}
    rates: Rates | None = None
    hint: str = ""
    yields_to: tuple[str, ...] = ()

    @property
    def subsystem(self) -> str:
        return self.id.split(".")[0]

    def applies_to(self, config: Mapping[str, Any], n_ranks: int = 1) -> bool:
        """Whether a resolved configuration on this many processes is one the gate is for.
        A key of another variant is absent, so the gate is not for it.
        """
        if n_ranks < self.min_ranks:
            return False
        set_ = all((_at(config, key) or 0) > 0 for key in self.needs)
        return set_ and all(
            _at(config, key) in allowed for key, allowed in _choices(self.when).items()
        )

    @model_validator(mode="after")
    def _consistent(self):
        if self.subsystem not in SUBSYSTEMS:
            raise ValueError(
                f"gate {self.id}: {self.subsystem} is not a subsystem; known: "
                f"{' '.join(SUBSYSTEMS)}"
            )
        if unset := [key for key in self.needs if not self.museum.get(key)]:
            raise ValueError(f"gate {self.id}: museum must set {unset[0]}, which the gate needs")
        for key, allowed in _choices(self.when).items():
            if self.museum.get(key, allowed[0] if len(allowed) == 1 else None) not in allowed:
                raise ValueError(
                    f"gate {self.id}: museum must hold one of the values of {key} in when: "
                    f"{', '.join(map(str, allowed))}"
                )
        return self

    def normative(self) -> dict:
        """The fields of which a change is a change of the gate's meaning."""
        return normative_fields(self.model_dump())


def normative_fields(entry: Mapping[str, Any]) -> dict:
    """Of a gate as it stands in TOML: id, statement, moment, severity, kinds,
    limits without their reasons, and conditions.
    """
    limits, when = entry.get("limits", {}), entry.get("when", {})
    fields = {k: entry[k] for k in ("id", "statement", "moment", "severity")}
    fields["kinds"] = list(entry.get("kinds", ("train",)))
    fields["limits"] = {
        name: {k: limits[name][k] for k in ("value", "unit", "direction")}
        for name in sorted(limits)
    }
    conditions = {
        "needs": list(entry.get("needs", ())),
        "when": {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(when.items())},
        # A gate of every run states no number of processes.
        "min_ranks": entry.get("min_ranks", 1) if entry.get("min_ranks", 1) > 1 else None,
    }
    return fields | {k: v for k, v in conditions.items() if v}


def _choices(when: Mapping[str, Any]) -> dict[str, tuple]:
    """The allowed values of each key of a condition."""
    return {key: value if isinstance(value, tuple) else (value,) for key, value in when.items()}


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or None where a table on the way is not there."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


class Tombstone(Frozen):
    """A gate that is no more, since a version of the spec, and the gates that see its failures."""

    id: str = Field(pattern=GATE_ID)
    successors: tuple[str, ...] = Field(min_length=1)
    retired: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    why: str = Field(min_length=1)


class Spec(Frozen):
    """The whole spec: version, title, scope, gates by id, and by id why a gate that
    states no rates needs none.
    """

    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    title: str
    scope: str
    gates: dict[str, Gate]
    certain: dict[str, str] = {}
    tombstones: dict[str, Tombstone] = {}
    carried: tuple[Carried, ...] = Field(default=(), exclude=True)
    root: Path = Field(default=ROOT, exclude=True)

    def gate(self, gate_id: str) -> Gate:
        """A gate by id. Raises ConfigError, which names the successors of a retired gate."""
        if gate_id in self.gates:
            return self.gates[gate_id]
        if (stone := self.tombstones.get(gate_id)) is not None:
            raise ConfigError(
                f"gate {gate_id} is retired since spec {stone.retired}: {stone.why}",
                allowed=", ".join(stone.successors),
                next_step=f"use {' and '.join(stone.successors)}",
            )
        near = difflib.get_close_matches(gate_id, self.gates, n=3)
        raise ConfigError(
            f"there is no gate {gate_id}",
            allowed=f"nearest: {', '.join(near)}" if near else ", ".join(sorted(self.gates)),
            next_step="stack gates list",
        )

    def fingerprint(self, gate_id: str) -> str:
        """sha256 over the gate's normative fields and the canonical form of its check;
        evidence binds to it.
        """
        gate = self.gates[gate_id]
        return check_fingerprint(gate.normative(), gate.check, self.root)

    def fingerprints(self, gate_id: str) -> frozenset[str]:
        """The gate's fingerprint in today's form and in the forms it was carried over from.
        Evidence for any of them is current.
        """
        current = {self.fingerprint(gate_id)}
        for row in reversed(self.carried):
            if row.gate == gate_id and row.new in current:
                current.add(row.old)
        return frozenset(current)

    def required(self, kind: str) -> list[Gate]:
        """The gates of runs of one kind, for every configuration."""
        return list(self.of_kinds.get(kind, ()))

    @cached_property
    def of_kinds(self) -> dict[str, tuple[Gate, ...]]:
        """The gates of runs of each kind, for every configuration, in the order of the spec."""
        gates = [g for g in self.gates.values() if g.moment != "repository"]
        kinds = {kind for g in gates for kind in g.kinds}
        return {kind: tuple(g for g in gates if kind in g.kinds) for kind in kinds}

    @property
    def sha256(self) -> str:
        """One hash of the version and every gate's fingerprint."""
        return sha256_json(
            {"version": self.version, "gates": {g: self.fingerprint(g) for g in sorted(self.gates)}}
        )


def load_spec(root: Path = ROOT) -> Spec:
    """Read `spec/spec.toml` and `spec/gates/*.toml` under `root`.
    Raises IntegrityError naming file and field.
    """
    return _load_spec(Path(root).resolve())


@cache
def _load_spec(root: Path) -> Spec:
    directory = root / "spec"
    gates: dict[str, Gate] = {}
    for path in sorted((directory / "gates").glob("*.toml")):
        for gate in read_tables(path, "gate", Gate):
            if gate.subsystem != path.stem:
                raise IntegrityError(
                    f"{path.name}: gate {gate.id} belongs into {gate.subsystem}.toml"
                )
            if gate.id in gates:
                raise IntegrityError(
                    f"gate id {gate.id} is used twice",
                    next_step="ids are never reused; choose another",
                )
            gates[gate.id] = gate
    if strange := [
        (g.id, other)
        for g in gates.values()
        for other in g.yields_to
        if other not in gates or other == g.id
    ]:
        raise IntegrityError(
            f"gate {strange[0][0]} yields to {strange[0][1]}, which is not another gate"
        )
    parts = {
        "gates": gates,
        "certain": _certain(directory / "chance.toml"),
        "tombstones": _tombstones(directory / "tombstones.toml", gates),
        "carried": read_carried(directory / "carried.jsonl"),
        "root": root,
    }
    return validated(Spec, read_toml(directory / "spec.toml") | parts, origin="spec.toml")


def _tombstones(path: Path, gates: Mapping[str, Gate]) -> dict[str, Tombstone]:
    """Retired gates by id. Raises IntegrityError for an id that is in use, or a successor that is
    no gate.
    """
    found: dict[str, Tombstone] = {}
    for stone in read_tables(path, "tombstone", Tombstone):
        if stone.id in gates or stone.id in found:
            raise IntegrityError(
                f"{path.name}: gate id {stone.id} is retired and used again",
                next_step="ids are never reused; choose another",
            )
        if lost := [s for s in stone.successors if s not in gates]:
            raise IntegrityError(
                f"{path.name}: the successor {lost[0]} of {stone.id} is not a gate"
            )
        found[stone.id] = stone
    return found


def _certain(path: Path) -> dict[str, str]:
    """Why a gate needs no rates, by gate id.
    Raises IntegrityError if one is listed twice or without a reason.
    """
    found: dict[str, str] = {}
    for certain in read_tables(path, "certain", Certain):
        if twice := [g for g in certain.gates if g in found or certain.gates.count(g) > 1]:
            raise IntegrityError(f"{path.name}: gate {twice[0]} is listed twice")
        found |= dict.fromkeys(certain.gates, certain.why)
    return found
