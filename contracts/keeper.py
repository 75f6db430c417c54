"""The Gatekeeper: runs the checks of gates, routes events to runtime gates, counts heartbeats and
raises GateFailed.
"""

import datetime as dt
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    Event,
    Finished,
    Resumed,
    Saved,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import (
    Judgement,
    RuntimeCheck,
    Verdict,
    judge,
    limits_of,
    not_run,
    resolve,
)
from stackproof.contracts.subject import Subject
from stackproof.spec.canonical import to_jsonable
from stackproof.spec.errors import CheckpointError, ConfigError, GateFailed
from stackproof.spec.gates import Gate, Spec
from stackproof.spec.records import GateResult, Name, Scalar, Waiver

KEPT_MOMENTS = ("runtime", "artifact")  # whose verdicts belong to the steps before a checkpoint

# What code raises for values of another type or form than those it was written for.
UNFIT_VALUES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
# A count far enough below 2^53 for a resumed run to add to.
ResumedCount = Annotated[int, Field(ge=0, le=2**52)]


class GateDocument(BaseModel):
    """The counts and the verdict of a gate; former versions saved no verdict. What its check
    remembers is of a form of its own.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    checks: ResumedCount
    heartbeat: ResumedCount | None
    first_failure: ResumedCount | None = None
    outcome: Literal["pass", "fail", "not_run"] = "not_run"
    message: str = ""
    measured: dict[Name, Scalar] = {}
    not_run: ResumedCount = 0
    not_run_reason: str = ""
    watcher: dict[str, Any]

    @model_validator(mode="after")
    def _was_checked(self) -> Self:
        if self.outcome != "not_run" and self.checks == 0:
            raise ValueError(f"the outcome is {self.outcome} after 0 checks")
        return self


@dataclass
class GateState:
    """One gate as installed in one run. `watcher` is the check of a runtime gate. `checks` counts
    all calls of the check, `not_run` those of an artifact check without a verdict, with the last
    reason.
    """

    gate: Gate
    watcher: RuntimeCheck | None = None
    checks: int = 0
    seconds: float = 0.0
    heartbeat_last_step: int | None = None
    first_failure_step: int | None = None
    verdict: Verdict = field(default_factory=lambda: not_run("the check was not called"))
    not_run: int = 0
    not_run_reason: str = ""
    is_restored: bool = False

    def judged(self, found: Judgement, step: int | None) -> None:
        """Enter the verdict of a preflight or artifact check. The first red one is kept, since of
        many saves one may be bad and the next good; not_run replaces neither red nor green.
        """
        self.seconds += found.seconds
        self.checks += 1
        self.heartbeat_last_step = step
        if found.verdict.outcome == "not_run":
            self.not_run += 1
            self.not_run_reason = f"step {step}: {found.verdict.message}"
            if self.verdict.outcome != "not_run":
                return
        if self.first_failure_step is None:
            self.verdict = found.verdict
            if found.verdict.outcome == "fail":
                self.first_failure_step = step if step is not None else 0

    def observe(self, event: Event) -> Verdict | None:
        """The verdict of a runtime check on an event. Raises CheckpointError if the check cannot
        continue from what it remembers of a checkpoint.
        """
        try:
            return self.watcher.observe(event)
        except UNFIT_VALUES as e:
            if not self.is_restored:
                raise
            raise self._unfit(e) from e

    def _unfit(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"gate {self.gate.id} cannot continue from the state in the checkpoint: "
            f"{type(error).__name__}: {str(error)[:200]}",
            allowed="the state that a run has written",
            next_step="stack train --resume DIR --at STEP takes an older step folder; of a repro "
            "bundle, copy the whole folder again",
        )

    def state_dict(self) -> dict:
        """Counts, verdict and what the check remembers, JSON-ready."""
        return {
            "checks": self.checks,
            "heartbeat": self.heartbeat_last_step,
            "first_failure": self.first_failure_step,
            "outcome": self.verdict.outcome,
            "message": self.verdict.message,
            "measured": to_jsonable(dict(self.verdict.measured)),
            "not_run": self.not_run,
            "not_run_reason": self.not_run_reason,
            "watcher": self.watcher.state_dict() if self.watcher else {},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue with the state of a checkpoint, which may lack what is newer."""
        self.is_restored = True
        self.checks, self.heartbeat_last_step = saved["checks"], saved["heartbeat"]
        self.not_run = saved.get("not_run", 0)
        self.not_run_reason = saved.get("not_run_reason", "")
        if "outcome" in saved:
            self.first_failure_step = saved["first_failure"]
            self.verdict = Verdict(saved["outcome"], saved["message"], dict(saved["measured"]))
        if self.watcher:
            try:
                self.watcher.load_state_dict(saved["watcher"])
            except UNFIT_VALUES as e:
                raise self._unfit(e) from e

    @property
    def message(self) -> str:
        """The verdict's message. One that is red or green names the checks that were not_run."""
        if not self.not_run or self.verdict.outcome == "not_run":
            return self.verdict.message
        note = f"{self.not_run} of {self.checks} checks not_run, last at {self.not_run_reason}"
        return "; ".join(filter(None, (self.verdict.message, note)))


def begun(gate: Gate) -> GateState:
    """The state of a gate before its first check."""
    watches = gate.moment == "runtime"
    return GateState(gate, resolve(gate)(limits_of(gate)) if watches else None)


class Gatekeeper:
    """Holds every gate that applies to a kind of run, its resolved `config` and its number of
    processes, and passes each event to the runtime gates that watch its type.

    `on_verdict(gate_id, step, verdict)` is called for every preflight and artifact verdict that is
    not not_run, and of the runtime verdicts for each red one and each green one with a message;
    `event` is then the one that was judged. `only` installs just these gates. Raises ConfigError
    for a waiver of an unknown gate or one that has expired.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        kind: str = "train",
        waivers: Iterable[Waiver] = (),
        only: Iterable[str] | None = None,
        config: Mapping[str, Any] | None = None,
        n_ranks: int = 1,
        on_verdict: Callable[[str, int | None, Verdict], None] = lambda gate_id, step, verdict: (
            None
        ),
    ):
        self.spec, self.on_verdict = spec, on_verdict
        self.event: Event | None = None
        self._resumed_at: int | None = None  # None as soon as a step follows
        self.finished_at: int | None = None
        # Steps of the checkpoints of this process: those announced, and those judged.
        self._saved: set[int] = set()
        self._judged: set[int | None] = set()
        self.waivers = {w.id: w for w in waivers}
        for gate_id, waiver in self.waivers.items():
            spec.gate(gate_id)
            if dt.date.fromisoformat(waiver.expires) < dt.date.today():
                raise ConfigError(
                    f"the waiver of {gate_id} has expired",
                    value=waiver.expires,
                    next_step="renew it or fix the cause",
                )
        wanted = set(only) if only is not None else None
        self.states = {
            g.id: begun(g)
            for g in spec.required(kind)
            if (wanted is None or g.id in wanted) and g.applies_to(config or {}, n_ranks)
        }

    def preflight(
        self,
        subject: Subject,
        progress: Callable[[Gate, Verdict, float], None] = lambda *a: None,
    ) -> None:
        """Run all preflight checks, then raise GateFailed if a gate that halts is red.

        A check that raises has no verdict. Its error is raised after all checks have run, unless a
        red gate names the cause.
        """
        red, errors = [], []
        for state, found in self._judge("preflight", subject):
            if found.error is not None:
                state.verdict = found.verdict
                errors.append(found.error)
                continue
            state.judged(found, None)
            self._announce(state, None, found.verdict)
            progress(state.gate, found.verdict, state.seconds)
            if self._halts(state, found.verdict):
                red.append(state)
        if red:
            raise self._failure(red) from next(iter(errors), None)
        if errors:
            raise errors[0]

    def artifact(self, subject: Subject, *, step: int | None = None) -> None:
        """Run all artifact checks on what was saved. Raises GateFailed on the first red gate that
        halts.
        """
        self._judged.add(step)
        for state, found in self._judge("artifact", subject):
            if found.error is not None:
                raise found.error
            state.judged(found, step)
            self._announce(state, step, found.verdict)
            if self._halts(state, found.verdict):
                raise self._failure([state])

    def unjudged(
        self, kind: str, config: Mapping[str, Any], unasked: Iterable[str] = ()
    ) -> GateFailed | None:
        """The failure of the first gate of the spec for a command of this kind that has no verdict;
        None if all have one. Gates in `unasked` need none.
        """
        for gate in self.spec.required(kind):
            if gate.id in unasked or not gate.applies_to(config):
                continue
            verdict = self.states[gate.id].verdict if gate.id in self.states else None
            if verdict is None or verdict.outcome == "not_run":
                why = verdict.message if verdict else "it was not installed"
                return GateFailed(
                    gate.id,
                    verdict,
                    what=f"the command ended without its verdict: {why}",
                    allowed="a verdict of every gate of the command",
                    next_step=f"stack gates show {gate.id}",
                )
        return None

    def observe(self, event: Event) -> None:
        """Pass an event to every runtime gate that watches its type. Raises GateFailed on a red
        verdict that halts. After Finished, raises it for a runtime gate without a heartbeat, and
        for a checkpoint that the artifact gates have not judged. A run that was resumed at its
        last step takes none, so it needs no heartbeat.
        """
        red, self.event = [], event
        if isinstance(event, Resumed):
            self._resumed_at = event.step
        elif isinstance(event, StepTaken | BatchDrawn):
            self._resumed_at = None
        elif isinstance(event, Saved):
            self._saved.add(event.step)
        for state in self._of("runtime"):
            if not isinstance(event, state.watcher.events):
                continue
            started = time.perf_counter()
            verdict = state.observe(event)
            state.seconds += time.perf_counter() - started
            if verdict is None or self._is_repeated(state, verdict):
                continue
            state.checks += 1
            state.heartbeat_last_step = event.step
            if state.first_failure_step is None:
                state.verdict = verdict
            if verdict.outcome == "fail" or (verdict.passed and verdict.message):
                self.on_verdict(state.gate.id, event.step, verdict)
            if verdict.outcome == "fail":
                if state.first_failure_step is None:
                    state.first_failure_step, state.verdict = event.step, verdict
                if self._halts(state, verdict):
                    red.append(state)
        if red:
            raise self._failure(red)
        if isinstance(event, Finished):
            self.finished_at = event.step
            self._require_judged_saves()
            if event.step != self._resumed_at:
                self._require_heartbeats()

    def _is_repeated(self, state: GateState, verdict: Verdict) -> bool:
        """Whether a resumed run judges its declared plan again. It was counted when the run began;
        another outcome counts.
        """
        again = isinstance(self.event, Started) and self._resumed_at is not None
        return again and state.checks > 0 and verdict.outcome == state.verdict.outcome

    def charge(self, gate_id: str, seconds: float) -> None:
        """Count time that the run spent on measurements for a gate, outside of its check, as the
        gate's.
        """
        if gate_id in self.states:
            self.states[gate_id].seconds += seconds

    def results(self) -> list[GateResult]:
        """The result of every installed gate, ready for the record."""
        return [
            GateResult(
                id=gate_id,
                fingerprint=self.spec.fingerprint(gate_id),
                verdict=state.verdict.outcome,
                checks=state.checks,
                heartbeat_last_step=state.heartbeat_last_step,
                first_failure_step=state.first_failure_step,
                measured=dict(state.verdict.measured),
                limits=vars(limits_of(state.gate)),
                message=state.message,
                seconds=round(state.seconds, 4),
                waiver=self.waivers.get(gate_id) if state.verdict.outcome == "fail" else None,
            )
            for gate_id, state in sorted(self.states.items())
        ]

    def state_dict(self) -> dict:
        """State of the runtime and artifact gates, JSON-ready, for the checkpoint. Preflight gates
        are judged again by each process.
        """
        return {s.gate.id: s.state_dict() for m in KEPT_MOMENTS for s in self._of(m)}

    def load_state_dict(self, state: dict, moments: Sequence[str] = KEPT_MOMENTS) -> None:
        """Continue from a checkpoint's state, counts and verdicts. A gate that is not in it starts
        at 0, and one whose verdict an older version did not save stays not_run until its next.
        """
        for mine in (s for m in moments for s in self._of(m)):
            if saved := state.get(mine.gate.id):
                mine.load_state_dict(saved)

    def forget_evaluations(self) -> None:
        """Reset each runtime gate that compares evaluations with each other."""
        for state in self._of("runtime"):
            if Evaluated in state.watcher.events and StepTaken not in state.watcher.events:
                self.states[state.gate.id] = begun(state.gate)

    def carry(self, gate_id: str, step: int, verdict: Verdict) -> None:
        """Keep a red verdict of an earlier process, whose step is taken again."""
        state = self.states[gate_id]
        if state.first_failure_step is None:
            state.first_failure_step, state.verdict = step, verdict
            state.checks = max(1, state.checks)

    def _of(self, moment: str) -> list[GateState]:
        """The gates that are judged at one moment of a run."""
        return [s for s in self.states.values() if s.gate.moment == moment]

    def _judge(self, moment: str, subject: Subject) -> Iterator[tuple[GateState, Judgement]]:
        for gate, found in judge([s.gate for s in self._of(moment)], subject):
            yield self.states[gate.id], found

    def _announce(self, state: GateState, step: int | None, verdict: Verdict) -> None:
        if verdict.outcome != "not_run":
            self.on_verdict(state.gate.id, step, verdict)

    def _halts(self, state: GateState, verdict: Verdict) -> bool:
        return (
            verdict.outcome == "fail"
            and state.gate.severity == "halt"
            and state.gate.id not in self.waivers
        )

    def _require_heartbeats(self) -> None:
        silent = [
            s
            for s in self._of("runtime")
            if (s.checks == 0 or s.watcher.missing()) and s.gate.id not in self.waivers
        ]
        if silent:
            raise GateFailed(
                silent[0].gate.id,
                what=(
                    "the run ended without one verdict of this gate on "
                    + (
                        silent[0].watcher.missing()
                        or ", ".join(e.__name__ for e in silent[0].watcher.events)
                    )
                ),
                allowed="at least one verdict per run",
                next_step=(
                    "lower the interval of its events (eval.every, sample.every, "
                    "checkpoint.every, train.sdc_check_every), or waive the gate with a reason"
                ),
            )

    def _require_judged_saves(self) -> None:
        gates = [s for s in self._of("artifact") if s.gate.id not in self.waivers]
        if gates and (skipped := sorted(self._saved - self._judged)):
            raise GateFailed(
                gates[0].gate.id,
                what=f"the checkpoint of step {skipped[0]} was saved and not judged",
                value=f"{len(skipped)} of {len(self._saved)} checkpoints",
                allowed="a verdict on every checkpoint",
                next_step=f"stack gates show {gates[0].gate.id}",
            )

    def _failure(self, red: Sequence[GateState]) -> GateFailed:
        """The error that names the first cause among red gates: gates that yield to another red
        one come after it.
        """
        ids = {s.gate.id for s in red}
        state, *also = sorted(red, key=lambda s: len(ids.intersection(s.gate.yields_to)))
        gate = state.gate
        measured = ", ".join(
            f"{k} = {v:.6g}" if isinstance(v, float) else f"{k} = {v}"
            for k, v in state.verdict.measured.items()
        )
        allowed = ", ".join(
            f"{k} {v.direction} {v.value:g} {v.unit}".removesuffix(" 1")
            for k, v in gate.limits.items()
        )
        return GateFailed(
            gate.id,
            state.verdict,
            what=state.verdict.message
            + (f"; also red: {', '.join(s.gate.id for s in also)}" if also else ""),
            value=measured or None,
            allowed=allowed or gate.statement,
            next_step="; ".join(filter(None, (gate.hint, f"stack gates show {gate.id}"))),
        )
