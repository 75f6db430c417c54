"""The Gatekeeper: runs preflight gates, routes events to runtime gates,
counts heartbeats and raises GateFailed.
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
from stackproof.spec.runners import Runner, load_runners


@dataclass
class _Seat:
    """One gate as installed in one run."""

    gate: Gate
    watcher: Any = None
    checks: int = 0
    seconds: float = 0.0
    heartbeat_last_step: int | None = None
    first_failure_step: int | None = None
    verdict: Verdict = field(default_factory=lambda: not_run("was never asked"))


class Gatekeeper:
    """Holds every gate that applies to a kind of run and its resolved `config`.
    The caller announces events; this class decides who looks.

    `runner` names the entry of spec/runners.toml that asks (default: the one named like `kind`).
    One that is not entered there, is of another kind, or does not announce what an installed gate
    watches is refused here, before anything runs. `on_verdict(gate_id, step,     verdict)` is
    called for every preflight and artifact verdict, and of the runtime verdicts for each red one
    and each green one that has something to say; `shown` is then its event.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        kind: str = "train",
        runner: str | None = None,
        waivers: Iterable[Waiver] = (),
        only: Iterable[str] | None = None,
        config: Mapping[str, Any] | None = None,
        on_verdict: Callable[[str, int | None, Verdict], None] = lambda gate_id, step, verdict: (
            None
        ),
    ):
        self.spec, self.on_verdict, self.runner = (
            spec,
            on_verdict,
            _entered(spec, runner or kind, kind),
        )
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
            for g in spec.gates.values()
            if kind in g.kinds
            and g.moment != "repository"
            and (wanted is None or g.id in wanted)
            and g.applies_to(config or {})
        }
        for seat in self.seats.values():
            if seat.gate.moment == "runtime":
                seat.watcher = resolve(seat.gate)(limits_of(seat.gate))
                self._require_fed(seat)

    def preflight(
        self,
        subject: Subject,
        progress: Callable[[Gate, Verdict, float], None] = lambda *a: None,
    ) -> None:
        """Run all preflight gates on the user's own parts.
        Every gate is asked before the first red one raises.

        A check that breaks is no verdict: its error travels on after all were asked, unless a red
        gate says more about the cause.
        """
        red, broken = [], []
        for seat in self._moment("preflight"):
            try:
                verdict = self._ask(seat, subject)
            except Exception as e:
                seat.verdict = not_run(f"its check broke: {type(e).__name__}: {e}")
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
        """Run all artifact gates that the subject offers something for.
        Raises GateFailed on the first red one.
        """
        for seat in self._moment("artifact"):
            before = seat.verdict
            verdict = self._ask(seat, subject, step)
            if verdict.outcome == "not_run" and seat.checks > 1:
                seat.verdict, seat.checks = before, seat.checks - 1
            if self._halts(seat, verdict):
                raise self._failure([seat])

    def observe(self, event: Event) -> None:
        """Show an event to every runtime gate that watches its type.
        Raises GateFailed on a red verdict that halts.
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
        """Count time that the run spent on what a gate looks at, outside of its check,
        as the gate's.
        """
        if gate_id in self.seats:
            self.seats[gate_id].seconds += seconds

    def results(self) -> list[GateResult]:
        """What every installed gate said, ready for the record."""
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
        """Continue counting where a checkpoint left off.
        Gates the checkpoint does not know start afresh.
        """
        for seat in self._moment("runtime"):
            if saved := state.get(seat.gate.id):
                seat.checks, seat.heartbeat_last_step = saved["checks"], saved["heartbeat"]
                seat.watcher.load_state_dict(saved["watcher"])

    def _moment(self, moment: str) -> list[_Seat]:
        return [s for s in self.seats.values() if s.gate.moment == moment]

    def _ask(self, seat: _Seat, subject: Subject, step: int | None = None) -> Verdict:
        """Ask once. The first red verdict stays, as that of a runtime gate does: of many saves one
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

    def _require_fed(self, seat: _Seat) -> None:
        """A gate whose events nobody announces could never look; its runner does not start."""
        if missing := [
            e.__name__ for e in seat.watcher.events if e.__name__ not in self.runner.announces
        ]:
            raise GateFailed(
                seat.gate.id,
                what=(
                    f"the runner {self.runner.name} announces no {', '.join(missing)}, so it "
                    "could never look"
                ),
                value=f"announced: {', '.join(self.runner.announces) or 'nothing'}",
                allowed="a runner that feeds every gate of its kind",
                next_step=(
                    "stack gates list --runners; show the event to the Gatekeeper and enter it in "
                    "spec/runners.toml"
                ),
            )

    def _require_heartbeats(self) -> None:
        silent = [
            s for s in self._moment("runtime") if s.checks == 0 and s.gate.id not in self.waivers
        ]
        if silent:
            raise GateFailed(
                silent[0].gate.id,
                what=(
                    "it never looked at this run (its events: "
                    f"{', '.join(e.__name__ for e in silent[0].watcher.events)})"
                ),
                allowed="at least one heartbeat per run",
                next_step=(
                    "lower the interval that feeds it (eval.every, sample.every, "
                    "checkpoint.every), or waive it with a reason"
                ),
            )

    def _failure(self, red: Sequence[_Seat]) -> GateFailed:
        """The error that names the first cause among red gates; those that yield to
        another red one come after it.
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


def _entered(spec: Spec, name: str, kind: str) -> Runner:
    """A runner's entry. Raises ConfigError if there is none, or it is for another kind of run."""
    runners = load_runners(spec.root)
    if name not in runners or runners[name].kind != kind:
        raise ConfigError(
            f"no runner {name} for runs of kind {kind} is entered in spec/runners.toml, so "
            "nothing says what it feeds",
            allowed=", ".join(f"{r.name} ({r.kind})" for r in runners.values()),
            next_step="enter it with the events it announces, or run under one that is",
        )
    return runners[name]
