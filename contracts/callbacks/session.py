"""One run under the gates of other trainers: which gates are installed, and what a red one does."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from stackproof.contracts.callbacks.probe import untouched
from stackproof.contracts.callbacks.subject import foreign_subject
from stackproof.contracts.events import StepTaken
from stackproof.contracts.gate import Verdict, judge, not_run
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import Subject
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.gates import load_spec

KIND = "foreign"
ROWS_GATE = "data.fresh-rows"
Mode = Literal["raise", "log"]
logger = logging.getLogger("stackproof.gates")


class Cost(NamedTuple):
    """Time spent on gates: seconds before step 1, seconds after it, and the number of optimizer
    steps.
    """

    preflight_s: float
    watching_s: float
    steps: int

    @property
    def per_step_s(self) -> float:
        return self.watching_s / max(1, self.steps)


class Stopwatch:
    """Seconds inside `with`; nested blocks count once."""

    def __init__(self):
        self.seconds, self._depth, self._began = 0.0, 0, 0.0

    def __enter__(self):
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_):
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began


def timed(method: Callable) -> Callable:
    """Count the time of a method, of an object with a `session`, on the session's clock."""

    @wraps(method)
    def counted(self, *args, **kwargs):
        with self.session.clock:
            return method(self, *args, **kwargs)

    return counted


class Session:
    """The gates of kind `foreign` in one run. In mode `raise` a red gate that halts raises
    GateFailed; in mode `log` nothing is raised.

    Every verdict of a preflight or artifact gate, and every red one of a runtime gate, is written
    to `log_path` as one line, and to logging. `skip` leaves out gates by id. `reuses_rows`: rows
    come again in their order, or trained rows are scored, on purpose. Raises ConfigError for an
    unknown mode or gate.
    """

    def __init__(
        self,
        mode: Mode = "raise",
        *,
        log_path: str | Path | None = None,
        skip: Iterable[str] = (),
        only: Iterable[str] | None = None,
        reuses_rows: bool = False,
    ):
        if mode not in ("raise", "log"):
            raise ConfigError("mode is neither raise nor log", value=mode, allowed="raise | log")
        spec = load_spec()
        known = {g.id for g in spec.gates.values() if KIND in g.kinds}
        if odd := sorted({*skip, *(only or ())} - known):
            spec.gate(odd[0])
            raise ConfigError(
                f"other trainers have no gate {odd[0]}", allowed=", ".join(sorted(known))
            )
        self.mode, self.log_path = mode, Path(log_path) if log_path else None
        self.only = (known if only is None else set(only)) - set(skip)
        self.keeper = Gatekeeper(spec, kind=KIND, only=self.only, on_verdict=self._note)
        self.absent: dict[str, Verdict] = {}
        self.left_out = known - self.only
        self.on_halt = lambda: None
        self.on_step: Callable[[StepTaken], None] = lambda event: None
        self.on_end: Callable[[str, str, int], None] = lambda status, reason, exit_code: None
        self.clock, self.steps, self._preflight_s = Stopwatch(), 0, 0.0
        if reuses_rows:
            self.forget(ROWS_GATE, "reuses_rows: rows come again on purpose")

    def observe(self, event: Any) -> None:
        """Pass an event to the gates. Raises GateFailed in mode `raise`."""
        if isinstance(event, StepTaken):
            self.on_step(event)
        self._guard(lambda: self.keeper.observe(event))

    def preflight(self, subject: Subject) -> None:
        """Run every preflight gate. Raises GateFailed in mode `raise`. A check that raises on this
        model is logged and has no verdict.
        """
        began = time.perf_counter()
        try:
            self._guard(lambda: self.keeper.preflight(subject))
        except GateFailed:
            raise
        except Exception as e:
            logger.warning(
                "a check raised an error on this model and is not_run: %s: %s",
                type(e).__name__,
                e,
            )
        finally:
            self._preflight_s += time.perf_counter() - began

    def artifact(self, subject: Subject, step: int) -> None:
        """Run the artifact gates. Raises GateFailed in mode `raise`."""
        self._guard(lambda: self.keeper.artifact(subject, step=step))

    def forget(self, gate_id: str, why: str) -> None:
        """Take out a gate that has no meaning in this run; its verdict is `not_run` with the
        reason.
        """
        if self.keeper.states.pop(gate_id, None):
            self.absent[gate_id] = not_run(why)

    def cost(self) -> Cost:
        """Time spent on gates so far."""
        return Cost(self._preflight_s, self.clock.seconds, self.steps)

    def verdicts(self) -> dict[str, Verdict]:
        """Verdict of every gate so far; `not_run` for one whose check was not called."""
        return self.absent | {
            r.id: Verdict(r.verdict, r.message, r.measured) for r in self.keeper.results()
        }

    def first_failures(self) -> dict[str, int | None]:
        """Step of the first red verdict by gate; a preflight gate's is 0."""
        return {r.id: r.first_failure_step for r in self.keeper.results() if r.verdict == "fail"}

    def _guard(self, ask) -> None:
        try:
            ask()
        except GateFailed as e:
            if self.mode == "raise":
                self.on_halt()
                self.on_end("halted", str(e).splitlines()[0], e.exit_code)
                raise

    def _note(self, gate_id: str, step: int | None, verdict: Verdict) -> None:
        level = logging.WARNING if verdict.outcome == "fail" else logging.DEBUG
        logger.log(level, "%s %s at step %s: %s", gate_id, verdict.outcome, step, verdict.message)
        if self.log_path is None:
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        measured = {
            k: str(v) if isinstance(v, float) and v - v != 0 else v
            for k, v in verdict.measured.items()
        }
        line = {
            "time": round(time.time(), 3),
            "gate": gate_id,
            "step": step,
            "verdict": verdict.outcome,
            "message": verdict.message,
            "measured": measured,
        }
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def ask_all(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: Any = None,
    only: str = "",
) -> dict[str, Verdict]:
    """Verdict of every preflight gate on a live model, or of one gate. None of them raises, and the
    model stays as it was.
    """
    gates = [
        g
        for g in load_spec().gates.values()
        if KIND in g.kinds and g.moment == "preflight" and only in ("", g.id)
    ]
    with untouched(model):
        subject = foreign_subject(model, optimizer, tokenizer)
        found = {gate.id: one for gate, one in judge(gates, subject)}
    if broken := [one.error for one in found.values() if one.error is not None]:
        raise broken[0]
    return {gate_id: one.verdict for gate_id, one in found.items()}
