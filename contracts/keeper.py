"""The Gatekeeper: runs the checks of gates, routes events to runtime gates, counts heartbeats and
raises GateFailed.
"""

import datetime as dt
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stackproof.contracts.events import Event, Finished
from stackproof.contracts.gate import Verdict, call_check, limits_of, not_run, resolve
from stackproof.contracts.subject import Subject
from stackproof.spec.errors import ConfigError, GateFailed
from stackproof.spec.gates import Gate, Spec
from stackproof.spec.records import GateResult, Waiver


@dataclass
class _Seat:
    """One gate as installed in one run."""

    gate: Gate
    watcher: Any = None
    checks: int = 0
    seconds: float = 0.0
    heartbeat_last_step: int | None = None
    first_failure_step: int | None = None
    verdict: Verdict = field(default_factory=lambda: not_run("the check was not called"))


class Gatekeeper:
    """Holds every gate that applies to a kind of run and its resolved `config`, and passes each
    event to the runtime gates that watch its type.

    `on_verdict(gate_id, step, verdict)` is called for every preflight and artifact verdict that is
    not not_run, and of the runtime verdicts for each red one and each green one with a message;
    `shown` is then the event. `only` installs just these gates. Raises ConfigError for a waiver of
    an unknown gate or one that has expired.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        kind: str = "train",
        waivers: Iterable[Waiver] = (),
        only: Iterable[str] | None = None,
        config: Mapping[str, Any] | None = None,
        on_verdict: Callable[[str, int | None, Verdict], None] = lambda gate_id, step, verdict: (
            None
        ),
    ):
        self.spec, self.on_verdict = spec, on_verdict
        self.shown: Event | None = None
        self.waivers = {w.id: w for w in waivers}
        for gate_id, waiver in self.waivers.items():
            spec.gate(gate_id)
            if dt.date.fromisoformat(waiver.expires) < dt.date.today():
                raise ConfigError(
                    f"the waiver of {gate_id} has expired",
                    value=waiver.expires,
                    next_step="renew it or mend the cause",
                )
        wanted = set(only) if only is not None else None
        self.seats = {
            g.id: _Seat(g)
            for g in spec.required(kind)
            if (wanted is None or g.id in wanted) and g.applies_to(config or {})
        }
        for seat in self.seats.values():
            if seat.gate.moment == "runtime":
                seat.watcher = resolve(seat.gate)(limits_of(seat.gate))

    def preflight(
        self,
        subject: Subject,
        progress: Callable[[Gate, Verdict, float], None] = lambda *a: None,
    ) -> None:
        """Run all preflight checks, then raise GateFailed if a gate that halts is red.

        A check that raises has no verdict. Its error is raised after all checks have run, unless a
        red gate names the cause.
        """
        red, broken = [], []
        for seat in self._moment("preflight"):
            try:
                verdict = self._run(seat, subject)
            except Exception as e:
                seat.verdict = not_run(f"the check raised {type(e).__name__}: {e}")
                broken.append(e)
                continue
            progress(seat.gate, verdict, seat.seconds)
            if self._halts(seat, verdict):
                red.append(seat)
        if red:
            raise self._failure(red) from next(iter(broken), None)
        if broken:
            raise broken[0]

    def artifact(self, subject: Subject, *, step: int | None = None) -> None:
        """Run all artifact checks on what was saved. Raises GateFailed on the first red gate that
        halts. A check that cannot run on this subject keeps its earlier verdict.
        """
        for seat in self._moment("artifact"):
            before = seat.verdict
            verdict = self._run(seat, subject, step)
            if verdict.outcome == "not_run" and seat.checks > 1:
                seat.verdict, seat.checks = before, seat.checks - 1
            if self._halts(seat, verdict):
                raise self._failure([seat])

    def observe(self, event: Event) -> None:
        """Pass an event to every runtime gate that watches its type. Raises GateFailed on a red
        verdict that halts, and after Finished for a gate without a heartbeat.
        """
        red, self.shown = [], event
        for seat in self._moment("runtime"):
            if not isinstance(event, seat.watcher.events):
                continue
            started = time.perf_counter()
            verdict = seat.watcher.observe(event)
            seat.seconds += time.perf_counter() - started
            if verdict is None:
                continue
            seat.checks += 1
            seat.heartbeat_last_step = event.step
            if seat.first_failure_step is None:
                seat.verdict = verdict
            if verdict.outcome == "fail" or (verdict.passed and verdict.message):
                self.on_verdict(seat.gate.id, event.step, verdict)
            if verdict.outcome == "fail":
                if seat.first_failure_step is None:
                    seat.first_failure_step, seat.verdict = event.step, verdict
                if self._halts(seat, verdict):
                    red.append(seat)
        if red:
            raise self._failure(red)
        if isinstance(event, Finished):
            self._require_heartbeats()

    def charge(self, gate_id: str, seconds: float) -> None:
        """Count time that the run spent on measurements for a gate, outside of its check, as the
        gate's.
        """
        if gate_id in self.seats:
            self.seats[gate_id].seconds += seconds

    def results(self) -> list[GateResult]:
        """The result of every installed gate, ready for the record."""
        return [
            GateResult(
                id=gate_id,
                fingerprint=self.spec.fingerprint(gate_id),
                verdict=seat.verdict.outcome,
                checks=seat.checks,
                heartbeat_last_step=seat.heartbeat_last_step,
                first_failure_step=seat.first_failure_step,
                measured=dict(seat.verdict.measured),
                limits=vars(limits_of(seat.gate)),
                message=seat.verdict.message,
                seconds=round(seat.seconds, 4),
                waiver=self.waivers.get(gate_id) if seat.verdict.outcome == "fail" else None,
            )
            for gate_id, seat in sorted(self.seats.items())
        ]

    def state_dict(self) -> dict:
        """State of the runtime gates, JSON-ready, for the checkpoint."""
        return {
            s.gate.id: {
                "checks": s.checks,
                "heartbeat": s.heartbeat_last_step,
                "watcher": s.watcher.state_dict(),
            }
            for s in self._moment("runtime")
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue counting where a checkpoint left off. Gates that are not in the checkpoint start
        anew.
        """
        for seat in self._moment("runtime"):
            if saved := state.get(seat.gate.id):
                seat.checks, seat.heartbeat_last_step = saved["checks"], saved["heartbeat"]
                seat.watcher.load_state_dict(saved["watcher"])

    def _moment(self, moment: str) -> list[_Seat]:
        return [s for s in self.seats.values() if s.gate.moment == moment]

    def _run(self, seat: _Seat, subject: Subject, step: int | None = None) -> Verdict:
        """Run a check once. The first red verdict is kept, as for a runtime gate: of many saves one
        may be bad and the next good.
        """
        started = time.perf_counter()
        verdict = call_check(seat.gate, subject)
        seat.seconds += time.perf_counter() - started
        seat.checks += 1
        seat.heartbeat_last_step = step
        if seat.first_failure_step is None:
            seat.verdict = verdict
            if verdict.outcome == "fail":
                seat.first_failure_step = step if step is not None else 0
        if verdict.outcome != "not_run":
            self.on_verdict(seat.gate.id, step, verdict)
        return verdict

    def _halts(self, seat: _Seat, verdict: Verdict) -> bool:
        return (
            verdict.outcome == "fail"
            and seat.gate.severity == "halt"
            and seat.gate.id not in self.waivers
        )

    def _require_heartbeats(self) -> None:
        silent = [
            s
            for s in self._moment("runtime")
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
                    "checkpoint.every), or waive the gate with a reason"
                ),
            )

    def _failure(self, red: Sequence[_Seat]) -> GateFailed:
        """The error that names the first cause among red gates: gates that yield to another red
        one come after it.
        """
        ids = {s.gate.id for s in red}
        seat, *also = sorted(red, key=lambda s: len(ids.intersection(s.gate.yields_to)))
        measured = ", ".join(
            f"{k} = {v:.6g}" if isinstance(v, float) else f"{k} = {v}"
            for k, v in seat.verdict.measured.items()
        )
        allowed = ", ".join(
            f"{k} {v.direction} {v.value:g} {v.unit}" for k, v in seat.gate.limits.items()
        )
        return GateFailed(
            seat.gate.id,
            seat.verdict,
            what=seat.verdict.message
            + (f"; also red: {', '.join(s.gate.id for s in also)}" if also else ""),
            value=measured or None,
            allowed=allowed or seat.gate.statement,
            next_step="; ".join(filter(None, (seat.gate.hint, f"stack gates show {seat.gate.id}"))),
        )
