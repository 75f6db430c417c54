"""Check, verdict and the decorator that binds a check to its gate."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, Protocol

from stackproof.contracts.events import Event
from stackproof.contracts.subject import NotOffered, Subject
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Gate

Outcome = Literal["pass", "fail", "not_run"]
Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Verdict:
    """What a check decided and the numbers it decided on. `not_run` is never a pass."""

    outcome: Outcome
    message: str = ""
    measured: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.outcome == "pass"


def passed(message: str = "", **measured: Scalar) -> Verdict:
    """A green verdict with its measurements."""
    return Verdict("pass", message, measured)


def failed(message: str, **measured: Scalar) -> Verdict:
    """A red verdict with its measurements."""
    return Verdict("fail", message, measured)


def not_run(message: str) -> Verdict:
    """The check could not look; says why."""
    return Verdict("not_run", message)


def decide(ok: bool, message: str, **measured: Scalar) -> Verdict:
    """Green if `ok`, else red with `message`. A NaN among the measurements is always red."""
    if any(isinstance(v, float) and math.isnan(v) for v in measured.values()):
        return failed(f"{message} (a measurement is NaN)", **measured)
    return passed("", **measured) if ok else failed(message, **measured)


class RuntimeCheck(Protocol):
    """A check that watches events. Built once per run with the gate's limits;
    may keep JSON-ready state for resume.

    `observe` returns None for an event it only learns from (such as Started); that is no heartbeat.
    """

    events: tuple[type, ...]

    def __init__(self, limits: SimpleNamespace): ...
    def observe(self, event: Event) -> Verdict | None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def first_of(names: Sequence[str], n: int = 3) -> str:
    """The first few names of many, for a message."""
    return ", ".join(names[:n]) + (", …" if len(names) > n else "")


class Stateless:
    """Base for runtime checks that remember nothing."""

    def __init__(self, limits: SimpleNamespace):
        self.limits = limits

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None


def decides(gate_id: str) -> Callable:
    """Mark a function or runtime-check class as the one that decides `gate_id`;
    the spec must name it back.
    """

    def mark(check):
        check.gate_id = gate_id
        return check

    return mark


def resolve(gate: Gate) -> Any:
    """The check object a gate names.
    Raises IntegrityError if it is missing or bound to another gate.
    """
    module, name = f"stackproof.{gate.check}".split(":")
    check = getattr(importlib.import_module(module), name, None)
    if check is None or getattr(check, "gate_id", None) != gate.id:
        raise IntegrityError(
            f"gate {gate.id} names the check {gate.check}, which is bound to "
            f"{getattr(check, 'gate_id', 'nothing')}",
            next_step=f"decorate it with @decides({gate.id!r})",
        )
    return check


def limits_of(gate: Gate) -> SimpleNamespace:
    """The gate's limits as plain numbers: `limits.rel_error_max`."""
    return SimpleNamespace(**{name: limit.value for name, limit in gate.limits.items()})


def call_check(gate: Gate, subject: Subject) -> Verdict:
    """Run a preflight or artifact check on a subject. A capability that the trainer does not offer
    yields `not_run` with its name. Any other exception is no verdict and travels on.
    """
    try:
        return resolve(gate)(limits_of(gate), subject)
    except NotOffered as e:
        return not_run(str(e))
