"""Checks of gates, their verdicts, and the decorator that binds a check to its gate."""

import importlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

from stackproof.contracts.events import Event
from stackproof.contracts.subject import NotOffered, Subject
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Gate

Outcome = Literal["pass", "fail", "not_run"]
Scalar = bool | int | float | str | None
Key = TypeVar("Key")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check, and the measurements it is based on. `not_run` is never a pass."""

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
    """The verdict of a check that could not be carried out, with the reason."""
    return Verdict("not_run", message)


def decide(ok: bool, message: str, **measured: Scalar) -> Verdict:
    """Green if `ok`, else red with `message`. A NaN among the measurements is always red."""
    if any(isinstance(v, float) and math.isnan(v) for v in measured.values()):
        return failed(f"{message} (a measurement is NaN)", **measured)
    return passed("", **measured) if ok else failed(message, **measured)


def decide_all(
    problems: Iterable[str | Literal[False]], where: str = "", **measured: Scalar
) -> Verdict:
    """Green if every problem is False, else red with the messages of all others, after `where`.
    A problem is written `condition and message`, where the condition is a bool.
    """
    wrong = [message for message in problems if message is not False]
    return decide(not wrong, where + "; ".join(wrong), **measured)


def worst(values: Iterable[float], default: float | None = None) -> float:
    """The largest value, infinite if any is NaN, which `max` may pass over. Of no values it is
    `default`; without one that is an error.
    """
    numbers = [math.inf if math.isnan(v) else v for v in values]
    return default if default is not None and not numbers else max(numbers)


def least(values: Iterable[float], default: float | None = None) -> float:
    """The smallest value, −infinite if any is NaN, which `min` may pass over. Of no values it is
    `default`; without one that is an error.
    """
    numbers = [-math.inf if math.isnan(v) else v for v in values]
    return default if default is not None and not numbers else min(numbers)


def worst_at(errors: Mapping[Key, float]) -> Key:
    """Where the largest error is, the first of equals; NaN counts as infinite."""
    return max(errors, key=lambda at: worst((errors[at],)))


def first_of(names: Sequence[str], n: int = 3) -> str:
    """The first few names of many, for a message."""
    return ", ".join(names[:n]) + (", …" if len(names) > n else "")


class RuntimeCheck:
    """Base of checks that watch `events`. One is built per run, with the gate's limits.

    `kept` names the attributes that a resumed run continues with: JSON values, or deques of JSON
    values or tuples.
    """

    events: tuple[type, ...]
    kept: tuple[str, ...] = ()

    def __init__(self, limits: SimpleNamespace):
        self.limits = limits

    def observe(self, event: Event) -> Verdict | None:
        """The verdict on an event. None where it only informs the check, as Started does; that is
        no heartbeat.
        """
        raise NotImplementedError

    def missing(self) -> str:
        """What every run has and this check has not judged yet; empty if nothing."""
        return ""

    def state_dict(self) -> dict:
        """What a resumed run continues with, JSON-ready. An infinite number is left out, since JSON
        has none.
        """
        state = {name: getattr(self, name) for name in self.kept}
        return {
            name: list(value) if isinstance(value, deque) else copy(value)
            for name, value in state.items()
            if not (isinstance(value, float) and math.isinf(value))
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue with the state of a checkpoint. What an older checkpoint does not have keeps its
        initial value.
        """
        for name in state.keys() & set(self.kept):
            now, value = getattr(self, name), copy(state[name])
            if isinstance(now, deque):
                items = (tuple(item) if isinstance(item, list) else item for item in value)
                value = deque(items, now.maxlen)
            setattr(self, name, value)


def decides(gate_id: str) -> Callable:
    """Bind a function or a runtime check to a gate. The spec must name the same check."""

    def mark(check):
        check.gate_id = gate_id
        return check

    return mark


def measured_by(*instruments: Callable) -> Callable:
    """Name the functions that measure what a check is given, by an event or by its subject. A check
    does not reach them by itself; named here, they are part of its gate's fingerprint.
    """
    return lambda check: check


def resolve(gate: Gate) -> Any:
    """The check that a gate names. Raises IntegrityError if it is missing or bound to another
    gate.
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
    yields `not_run` with its name. Any other exception is raised.
    """
    try:
        return resolve(gate)(limits_of(gate), subject)
    except NotOffered as e:
        return not_run(str(e))


@dataclass(frozen=True)
class Judgement:
    """The verdict of one check, the seconds that it took, and what it raised. A check that raised
    is not_run.
    """

    verdict: Verdict
    seconds: float
    error: Exception | None = None


def judge(gates: Iterable[Gate], subject: Subject) -> Iterator[tuple[Gate, Judgement]]:
    """Run the preflight or artifact checks of gates on a subject, each when it is its turn."""
    for gate in gates:
        started = time.perf_counter()
        try:
            verdict, error = call_check(gate, subject), None
        except Exception as e:
            verdict, error = not_run(f"the check raised {type(e).__name__}: {e}"), e
        yield gate, Judgement(verdict, time.perf_counter() - started, error)
