"""What the prover watches besides verdicts: when a bug began, the worst a clean run measured,
and what a run brings forth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackproof.contracts import keeper
from stackproof.contracts.events import Evaluated, Event, Sampled
from stackproof.contracts.gate import Scalar, Verdict, resolve
from stackproof.museum.plant import swap, touches
from stackproof.spec.failures import moment_of_artifact
from stackproof.spec.gates import Gate, Limit
from stackproof.spec.margins import measured_for
from stackproof.spec.records import Record
from stackproof.train.run_dir import RunDir
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, Trainer

TIMED = ("tokens_per_s", "wall_s", "at")


class Clock(Callback):
    """Notes the step of a run in which the planted line first ran."""

    def __init__(self) -> None:
        self.before, self.began, self.elsewhere = touches(), None, 0

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.began is None and self.ran():
            self.began = report.step

    def ran(self) -> int:
        """How often planted code ran since the clock was made, in this process and `elsewhere`."""
        return touches() - self.before + self.elsewhere

    def lived(self, step: int) -> int:
        """Steps from the first in which the line ran to this one, both counted.
        A gate may look before the step's own line is there.
        """
        return max(1, step - (step if self.began is None else self.began) + 1)


def moment_of(gate: Gate) -> str:
    """When a gate turns red, in the words of the catalogue."""
    if gate.moment == "preflight":
        return "before step 1"
    if gate.moment == "artifact":
        return moment_of_artifact(gate)
    looks = set(resolve(gate).events)
    return "at evaluation" if looks & {Evaluated, Sampled} else "within k steps"


class _Attentive:
    """A runtime check that remembers the worst it measured for each limit of its gate,
    and else the last.
    """

    def __init__(self, check: Any, limits: Mapping[str, Limit], worst: dict[str, Scalar]):
        self.check, self.limits, self.worst, self.events = check, limits, worst, check.events

    def observe(self, event: Event) -> Verdict | None:
        verdict = self.check.observe(event)
        if verdict is not None:
            known = dict(self.worst)
            self.worst.update(verdict.measured)
            for name, limit in self.limits.items():
                before, now = (measured_for(name, limit, m) for m in (known, verdict.measured))
                if before is not None and (
                    now is None or (before < now) is (limit.direction == "at-least")
                ):
                    names = limit.measured or (name.removesuffix("_max").removesuffix("_min"),)
                    self.worst.update({n: known[n] for n in names if n in known})
        return verdict

    def missing(self) -> str:
        return self.check.missing()

    def state_dict(self) -> dict:
        return self.check.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.check.load_state_dict(state)


@contextmanager
def watching() -> Iterator[dict[str, dict[str, Scalar]]]:
    """While it lasts, collects the worst measurements of every runtime gate by id."""
    found: dict[str, dict[str, Scalar]] = {}

    def attentive(gate: Gate) -> Any:
        check = resolve(gate)
        if gate.moment != "runtime":
            return check
        return lambda limits: _Attentive(check(limits), gate.limits, found.setdefault(gate.id, {}))

    with swap(keeper, "resolve", attentive, counted=False):
        yield found


def fruits_of_run(record: Record, run_dir: Path) -> list:
    """All that a run computed: its log without times, its samples,
    and the hashes of its weights.
    """
    directory = RunDir(run_dir)
    lines = [
        {k: v for k, v in line.items() if k not in TIMED}
        for n in ("metrics.jsonl", "samples.jsonl")
        for line in directory.lines(n)
    ]
    return [
        lines,
        sorted((o.name, o.sha256) for o in record.outputs if o.name.endswith(".safetensors")),
    ]
