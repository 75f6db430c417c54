"""One run under the gates of other trainers: which gates are installed, and what a red one does."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

import torch
from torch import nn

from stackproof.contracts.callbacks.probe import untouched
from stackproof.contracts.callbacks.ranks import ALONE, Ranks
from stackproof.contracts.callbacks.record import Cost, End, RunRecord, append_line
from stackproof.contracts.callbacks.subject import foreign_subject
from stackproof.contracts.events import StepTaken
from stackproof.contracts.gate import Verdict, judge
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import SavedCheckpoint, Subject
from stackproof.contracts.vector_math import select_vector_functions
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.gates import Gate, load_spec
from stackproof.spec.records import GateResult

KIND = "foreign"
ROWS_GATES = ("data.fresh-rows", "distributed.rows")
Mode = Literal["raise", "log"]
logger = logging.getLogger("stackproof.gates")


def timed(method: Callable) -> Callable:
    """Count the time of a method, of an object with a `session`, in the cost of that session.
    Nested calls count once.
    """

    @wraps(method)
    def counted(self, *args, **kwargs):
        session = self.session
        if session.in_gates:
            return method(self, *args, **kwargs)
        session.in_gates, began = True, time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            session.in_gates = False
            session.watching_s += time.perf_counter() - began

    return counted


class Options(TypedDict, total=False):
    """Options of every adapter beside its mode. `log_path` takes the verdicts as JSON lines. `skip`
    leaves out gates by id, `only` all others. `record` names a folder for the record of the run.
    `reuses_rows`: rows come again in their order, or trained rows are scored, on purpose.
    """

    log_path: str | Path | None
    skip: Iterable[str]
    only: Iterable[str] | None
    record: str | Path | None
    reuses_rows: bool


class Session:
    """The gates of kind `foreign` in one run. In mode `raise` a red gate that halts calls `on_halt`
    and raises GateFailed; in mode `log` nothing is raised.

    Every verdict of a preflight or artifact gate, and every red one of a runtime gate, is written
    to the option `log_path` as one line, and to logging. Raises ConfigError for an unknown mode or
    gate.

    On several ranks each judges what it computes. A red gate is raised at the next `exchange`, on
    all of them, so that none waits for another; rank 0 alone writes.
    """

    def __init__(
        self, mode: Mode, options: Options, on_halt: Callable[[], None], ranks: Ranks = ALONE
    ):
        if mode not in ("raise", "log"):
            raise ConfigError("mode is neither raise nor log", value=mode, allowed="raise | log")
        skip, only = options.get("skip", ()), options.get("only")
        log_path = options.get("log_path")
        self.spec = spec = load_spec()
        known = {g.id for g in spec.required(KIND)}
        if odd := sorted({*skip, *(only or ())} - known):
            spec.gate(odd[0])
            raise ConfigError(
                f"other trainers have no gate {odd[0]}", allowed=", ".join(sorted(known))
            )
        installed = (known if only is None else set(only)) - set(skip)
        self.mode, self.on_halt, self.ranks = mode, on_halt, ranks
        self.log_path = Path(log_path) if log_path and ranks.is_main else None
        self.keeper = Gatekeeper(
            spec,
            kind=KIND,
            only=installed,
            n_ranks=max(ranks.world_size, ranks.n_started),
            on_verdict=self._log,
        )
        # Red verdicts since the last exchange, and the first of them that halts.
        self._defers = ranks.world_size > 1
        self._red: list[tuple[str, int | None, Verdict]] = []
        self._halting: GateFailed | None = None
        self.left_out = known - installed
        self.record: RunRecord | None = None
        self.configured: Mapping[str, Any] = {}  # what the trainer states of itself
        self.preflight_s, self.watching_s, self.steps, self.in_gates = 0.0, 0.0, 0, False
        self._absent: list[GateResult] = []
        if options.get("reuses_rows"):
            for gate_id in ROWS_GATES:
                self.leave_out(gate_id, "reuses_rows: rows come again on purpose")

    def leave_out(self, gate_id: str, why: str) -> None:
        """Remove a gate that has no meaning in this run; its verdict is `not_run` with the
        reason.
        """
        if self.keeper.states.pop(gate_id, None):
            fingerprint = self.spec.fingerprint(gate_id)
            self._absent.append(
                GateResult(
                    id=gate_id, fingerprint=fingerprint, verdict="not_run", checks=0, message=why
                )
            )

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
            logger.warning("a check raised and is not_run: %s: %s", type(e).__name__, e)
        finally:
            self.preflight_s += time.perf_counter() - began

    def observe(self, event: Any) -> None:
        """Pass an event to the gates. Raises GateFailed in mode `raise`."""
        if self.record and isinstance(event, StepTaken):
            self.record.step(event)
        self._guard(lambda: self.keeper.observe(event))

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Within it all ranks judge the same, so that each raises at once what is red."""
        defers, self._defers = self._defers, False
        try:
            yield
        finally:
            self._defers = defers

    def alone(self) -> Ranks:
        """Exchange nothing any more, as where ranks have taken different numbers of steps."""
        self._defers, self.ranks = False, self.ranks.left()
        return self.ranks

    def artifact(self, saved: SavedCheckpoint, step: int) -> None:
        """Run the artifact gates on a checkpoint. Raises GateFailed in mode `raise`."""
        self._guard(lambda: self.keeper.artifact(Subject(saved=saved), step=step))

    def exchange(self, document: Any = None) -> list[Any]:
        """The documents of all ranks, in order of rank; all must call this together. Red verdicts
        are exchanged with them.

        In mode `raise`, raises GateFailed on every rank if a gate that halts is red on one.
        """
        if self.ranks.world_size == 1:
            return [document]
        error = self._halting
        halting = error and (error.gate_id, error.what, error.value, error.allowed, error.next_step)
        found = self.ranks.gathered((self._red, halting, document))
        self._red, self._halting = [], None
        for rank, (red, _, _) in enumerate(found):
            for gate_id, step, verdict in red if rank != self.ranks.rank else ():
                stated = replace(verdict, message=f"rank {rank}: {verdict.message}")
                if gate_id in self.keeper.states:
                    self.keeper.carry(gate_id, step or 0, stated)
                self._write(gate_id, step, stated)
        halted = [(rank, parts) for rank, (_, parts, _) in enumerate(found) if parts]
        if halted and self.mode == "raise":
            self._halt(error if halted[0][0] == self.ranks.rank else _on_rank(*halted[0]))
        return [one for _, _, one in found]

    def end(self, end: End) -> None:
        """The run has ended: nothing is exchanged any more, and its record is written. A second
        call does nothing.
        """
        self.alone()
        if self.record:
            record, self.record = self.record, None
            record.close(end, self.results(), self.cost())

    def cost(self) -> Cost:
        """Time spent on gates so far."""
        return Cost(self.preflight_s, self.watching_s, self.steps)

    def results(self) -> list[GateResult]:
        """The result of every gate that is not left out by the user; `not_run` for one whose check
        was not called.
        """
        return sorted([*self.keeper.results(), *self._absent], key=lambda g: g.id)

    def _guard(self, judge: Callable[[], None]) -> None:
        try:
            judge()
        except GateFailed as e:
            if self._defers:
                self._halting = self._halting or e
            elif self.mode == "raise":
                self._halt(e)

    def _halt(self, error: GateFailed) -> NoReturn:
        self.on_halt()
        self.end(End.of(error))
        raise error

    def _log(self, gate_id: str, step: int | None, verdict: Verdict) -> None:
        if verdict.outcome == "fail" and self._defers:
            self._red.append((gate_id, step, verdict))
        self._write(gate_id, step, verdict)

    def _write(self, gate_id: str, step: int | None, verdict: Verdict) -> None:
        if not self.ranks.is_main:
            return
        level = logging.WARNING if verdict.outcome == "fail" else logging.DEBUG
        logger.log(level, "%s %s at step %s: %s", gate_id, verdict.outcome, step, verdict.message)
        if self.log_path is not None:
            line = {
                "time": round(time.time(), 3),
                "gate": gate_id,
                "step": step,
                "verdict": verdict.outcome,
                "message": verdict.message,
                "measured": verdict.measured,
            }
            append_line(self.log_path, line)


def _on_rank(rank: int, parts: tuple) -> GateFailed:
    """The error of a gate that halts on another rank."""
    gate_id, what, value, allowed, next_step = parts
    what = what.removeprefix(f"gate {gate_id} failed: ")
    return GateFailed(
        gate_id, what=f"rank {rank}: {what}", value=value, allowed=allowed, next_step=next_step
    )


def preflight_gates() -> list[Gate]:
    """The gates that judge a live model before step 1."""
    return [g for g in load_spec().required(KIND) if g.moment == "preflight"]


def judge_model(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: Any = None,
    gates: Iterable[Gate] | None = None,
) -> dict[str, Verdict]:
    """Verdict of preflight gates on a live model, by default of all. None of them raises, and the
    model stays as it was.
    """
    select_vector_functions()
    gates = gates or preflight_gates()
    with untouched(model):
        subject = foreign_subject(model, optimizer, tokenizer)
        found = {gate.id: one for gate, one in judge(gates, subject)}
    if broken := [one.error for one in found.values() if one.error is not None]:
        raise broken[0]
    return {gate_id: one.verdict for gate_id, one in found.items()}
