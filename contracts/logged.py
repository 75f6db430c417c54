"""Gates of the logs and the record of a run: what they state is what happened."""

from types import SimpleNamespace

from stackproof.contracts.events import (
    Evaluated,
    Event,
    LogsRead,
    Recorded,
    Sampled,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide_all, decides, first_of

OF_STEP = ("loss_nats", "grad_norm", "lr", "tokens_seen")


@decides("runtime.logged")
class Logged(RuntimeCheck):
    """At the end of a run, read back from the disk: the last logged step is the last one taken,
    with its numbers; each step of this process that is declared to be logged stands there once, and
    no other; every evaluation and sample of this process is there; the files are those that the
    marks in a checkpoint describe.
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
        due = {s for s in {*every, *logs.bits_per_byte, step} if s > self.began}
        own = {s for s in steps if s > self.began}
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


@decides("runtime.recorded")
class RecordStates(RuntimeCheck):
    """The record that is about to be written has the numbers of the last step, of the last
    evaluation and of the best one. It names the files of the data that were read, those of the
    latest checkpoint, and the machine, and its status follows from the steps.
    """

    events = (StepTaken, Evaluated, Recorded)
    kept = ("happened",)  # a kill may come between the last checkpoint and the record

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.happened: dict[str, float | None] = {}

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case StepTaken():
                self.happened |= {
                    "train_loss_nats": event.loss_nats,
                    "tokens_seen": event.tokens_seen,
                }
            case Evaluated():
                self.happened |= {
                    "val_loss_nats": event.loss_nats,
                    "val_bits_per_byte": event.bits_per_byte,
                    "best_val_loss_nats": event.best_loss_nats,
                    "best_step": event.best_step,
                }
            case Recorded():
                return self._judge(event)
        return None

    def _judge(self, record: Recorded) -> Verdict:
        truth = {**self.happened, "steps": record.step}
        wrong = [name for name, value in truth.items() if record.metrics.get(name) != value]
        baselines = [name for name in record.metrics if name.startswith("baseline_")]
        wrong += [n for n in baselines if record.counts[n] != record.held_out_bytes]
        missing = [f for f, sha256 in record.read.items() if record.inputs.get(f) != sha256]
        unsaid = [f for f, n_bytes in record.saved.items() if record.outputs.get(f) != n_bytes]
        machine, stated = record.machine, record.environment
        facts = [k for k, v in machine.items() if k not in stated or stated[k] != v]
        ended = "completed" if record.step == record.max_steps else "early_stopped"
        return decide_all(
            [
                len(wrong) > self.limits.wrong_max
                and f"the record states another {first_of(wrong)} than the run had",
                not baselines and "the record states no baseline",
                len(missing) > self.limits.missing_max
                and f"{first_of(missing)} was read and is not an input of the record as it is",
                len(unsaid) > self.limits.missing_max
                and f"{first_of(unsaid)} is in the latest checkpoint and not an output of the "
                "record as it is",
                not record.saved and "no checkpoint is left that the record could name",
                len(facts) > self.limits.wrong_max
                and f"the environment lacks {first_of(facts)}, or states it otherwise",
                record.status != ended
                and f"the status is {record.status} after {record.step} of {record.max_steps} "
                f"steps, it is to be {ended}",
            ],
            f"step {record.step}: ",
            wrong=len(wrong) + len(facts),
            judged=len(truth) + len(baselines) + len(machine),
            missing=len(missing) + len(unsaid),
        )
