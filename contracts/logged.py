"""Gates of the logs and the record of a run: what they state is what happened."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    Event,
    LogsRead,
    MemorizationMeasured,
    Recorded,
    Sampled,
    Started,
    StepTaken,
)
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide_all, decides, first_of

OF_STEP = ("loss_nats", "grad_norm", "clipped_grad_norm", "lr", "tokens_seen")
DECAY = 0.98  # of the running mean of the training loss


@decides("runtime.logged")
class Logged(RuntimeCheck):
    """At the end of a run, read back from the disk: the last logged step is the last one taken,
    with its numbers and the running mean of the loss; each step of this process that is declared to
    be logged stands there once, and no other; every evaluation and sample of this process is there,
    and so are the rows of every source and the turns of a bandit; the files are those that the
    marks in a checkpoint describe.
    """

    events = (Started, BatchDrawn, StepTaken, Evaluated, MemorizationMeasured, Sampled, LogsRead)
    kept = ("mean_nats",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.began, self.last = 0, {}
        self.mean_nats: float | None = None
        self.n_rows: Counter[int] = Counter()
        self.evaluated: dict[int, dict[str, float]] = {}
        self.sampled: dict[int, dict[str, object]] = {}

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case Started():
                self.began, self.evaluated, self.sampled = event.step, {}, {}
                self.n_rows = Counter()
            case BatchDrawn():
                self.n_rows.update(event.sources)
            case StepTaken():
                self.last = {name: getattr(event, name) for name in OF_STEP}
                if event.step == 1:
                    self.mean_nats = event.loss_nats
                elif self.mean_nats is not None:
                    self.mean_nats = DECAY * self.mean_nats + (1 - DECAY) * event.loss_nats
            case Evaluated():
                own = {"val_loss_nats": event.loss_nats, "val_bits_per_byte": event.bits_per_byte}
                own["val_stderr_nats"] = standard_error(event.batch_nats)
                self.evaluated.setdefault(event.step, {}).update(own)
            case MemorizationMeasured():
                found = event.reported
                own = {"passages": found.n_windows, "recited": found.n_recited}
                own["matched_tokens"] = found.matched_tokens
                self.evaluated.setdefault(event.step, {}).update(own)
            case Sampled():
                own = {"text": event.text, "prompt": event.prompt, "loss_nats": event.loss_nats}
                self.sampled[event.step] = own
            case LogsRead():
                return self._judge(event.step, event)
        return None

    def _judge(self, step: int, logs: LogsRead) -> Verdict:
        steps = list(logs.steps)
        every = range(logs.log_every, step + 1, logs.log_every)
        due = {s for s in {*every, *logs.evaluations, step} if s > self.began}
        own = {s for s in steps if s > self.began}
        mean = logs.last.get("ema_loss_nats")
        turns = [s for s in logs.turns if s > self.began]
        every_turn = range(0, step + 1, logs.turn_every or step + 1)
        ended = [s for s in every_turn if s > self.began]
        rows = {logs.sources[source]: n for source, n in self.n_rows.items()}
        logged_rows = dict(logs.rows(self.began)) if len(logs.sources) > 1 else rows
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
                self.mean_nats is not None
                and not _same(mean, self.mean_nats)
                and f"the running mean of the loss is {mean}, of the steps {self.mean_nats}",
                bool(logs.unlogged)
                and f"gates.jsonl has no line of {first_of(logs.unlogged)}, which was judged",
                not self._are_own(logs.evaluations, self.evaluated)
                and "the logged evaluations are not those of the run",
                not self._are_own(logs.samples, self.sampled)
                and "the logged samples are not those of the run",
                logged_rows != rows
                and f"rows by source are {logged_rows} in the log, {rows} were drawn",
                turns != ended
                and f"turns of the bandit ended at {first_of([str(s) for s in ended])}, the log "
                f"has {first_of([str(s) for s in turns])}",
            ],
            f"step {step}: ",
            n_logged=len(steps),
            n_evaluations=len(logs.evaluations),
            n_samples=len(logs.samples),
        )

    def _are_own(
        self, logged: Mapping[int, Mapping[str, object]], seen: Mapping[int, Mapping[str, object]]
    ) -> bool:
        """Whether the lines of this process are those of the steps seen, with their values."""
        lines = {step: line for step, line in logged.items() if step > self.began}
        return lines.keys() == seen.keys() and all(
            _same(lines[step].get(name), value)
            for step, own in seen.items()
            for name, value in own.items()
        )


def _derived(metrics: Mapping[str, float | str]) -> dict[str, float]:
    """Metrics that others of the same record give; NaN where one of those is missing."""

    def number(name: str) -> float:
        return float(metrics.get(name, math.nan))

    seen = number("tokens_seen")
    derived = {
        "epochs": seen / number("unique_tokens"),
        "tokens_per_parameter": seen / number("n_params"),
        "random_loss_nats": math.log(number("vocab_size")),
    }
    # A run whose evaluations were waived has no held-out loss.
    if "val_loss_nats" in metrics:
        derived["val_ppl"] = math.exp(min(number("val_loss_nats"), 700.0))
    return derived


def standard_error(batch_nats: Sequence[float]) -> float:
    """Of the mean over batches; 0 for one."""
    n = len(batch_nats)
    return statistics.stdev(batch_nats) / math.sqrt(n) if n > 1 else 0.0


def _same(logged: object, seen: object) -> bool:
    """Equal, as numbers to the rounding of another order of additions."""
    if isinstance(logged, float) and isinstance(seen, int | float):
        return math.isclose(logged, seen, rel_tol=1e-9, abs_tol=1e-12)
    return logged == seen


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
        truth = {**self.happened, **record.facts, "steps": record.step}
        derived = _derived(record.metrics)
        wrong = [name for name, value in truth.items() if record.metrics.get(name) != value]
        wrong += [n for n, value in derived.items() if not _same(record.metrics.get(n), value)]
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
            judged=len(truth) + len(derived) + len(baselines) + len(machine),
            missing=len(missing) + len(unsaid),
        )
