"""Gate of the logs of a run: what was logged is what happened."""

from types import SimpleNamespace

from stackproof.contracts.events import (
    Evaluated,
    Event,
    LogsRead,
    Sampled,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide_all, decides, first_of

OF_STEP = ("loss_nats", "grad_norm", "lr", "tokens_seen")


@decides("runtime.logged")
class Logged(RuntimeCheck):
    """At the end of a run, read back from the disk: the last logged step is the last one taken,
    with its numbers; each step that is declared to be logged stands there once, and no other; every
    evaluation and sample of this process is there; the files are those that the marks in a
    checkpoint describe.
    """

    events = (Started, StepTaken, Evaluated, Sampled, LogsRead)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.began, self.last = 0, {}
        self.evaluated: dict[int, float] = {}
        self.sampled: dict[int, str] = {}

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case Started():
                self.began, self.evaluated, self.sampled = event.step, {}, {}
            case StepTaken():
                self.last = {name: getattr(event, name) for name in OF_STEP}
            case Evaluated():
                self.evaluated[event.step] = event.bits_per_byte
            case Sampled():
                self.sampled[event.step] = event.text
            case LogsRead():
                return self._judge(event.step, event)
        return None

    def _judge(self, step: int, logs: LogsRead) -> Verdict:
        steps = list(logs.steps)
        scores = {s: bits for s, bits in logs.bits_per_byte.items() if s > self.began}
        texts = {s: text for s, text in logs.texts.items() if s > self.began}
        every = range(logs.log_every, step + 1, logs.log_every)
        due = {s for s in {*every, *logs.bits_per_byte, step} if s > logs.began}
        own = {s for s in steps if s > logs.began}
        return decide_all(
            [
                (steps[-1:] or [None]) != [step]
                and f"the last logged step is {steps[-1] if steps else None}, taken was {step}",
                steps != sorted(set(steps)) and "a step is logged twice, or out of order",
                own != due
                and f"{len(due - own)} step(s) that are due have no line, and {len(own - due)} "
                f"that are not have one: {first_of([str(s) for s in sorted(own ^ due)])}",
                bool(logs.mismarked)
                and f"checkpoints state another length or hash of {first_of(logs.mismarked)}",
                any(logs.last.get(name) != value for name, value in self.last.items())
                and "the last line has other numbers than the last step",
                scores != self.evaluated and "the logged evaluations are not those of the run",
                texts != self.sampled and "the logged samples are not those of the run",
            ],
            f"step {step}: ",
            n_logged=len(steps),
            n_evaluations=len(logs.bits_per_byte),
            n_samples=len(logs.texts),
        )
