"""The trainer: what a run is, what it writes and what watches it; and how its record is closed."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partialmethod
from pathlib import Path
from statistics import median
from typing import Any

from stackproof.config import RunConfig
from stackproof.contracts.coherence import Coherence
from stackproof.contracts.conditions import require
from stackproof.contracts.events import StateCompared
from stackproof.contracts.gate import Verdict
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.data_loader import Batch, batch_hash
from stackproof.data.prepare import Dataset
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.distributed.started import next_command
from stackproof.evaluate.baselines import BASELINES, uniform_loss_nats
from stackproof.evaluate.bits_per_byte import Evaluation
from stackproof.evaluate.stopping import Decision
from stackproof.spec import rank_log
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.errors import (
    CheckpointError,
    EnvironmentUnfit,
    GateFailed,
    StackproofError,
    Stopped,
)
from stackproof.spec.files import remedy
from stackproof.spec.formulas import parameter_count, perplexity
from stackproof.spec.gates import Gate
from stackproof.spec.records import Artefact, Record
from stackproof.train import checkpoint, checkpoint_folders, checkpoint_writer
from stackproof.train.checkpoint_format import Process
from stackproof.train.device import peak_memory_bytes
from stackproof.train.run_dir import SERIES, RunDir
from stackproof.train.signals import StoppedAtOnce, uninterrupted
from stackproof.train.state import TrainState, differing, state_checksums
from stackproof.train.step import StepReport, nonfinite_parts


@dataclass(frozen=True)
class Sample:
    """A text drawn from the model after a step; `loss_nats` is the model's own mean loss on it."""

    step: int
    prompt: str
    text: str
    ids: Sequence[int]
    loss_nats: float
    coherence: Coherence


@dataclass(frozen=True)
class RestartPoint:
    """Where a run can begin again: a step folder, or None for the seed,
    with the declared plan, the gates' state and the best step there.
    """

    folder: Path | None
    step: int
    plan: dict[str, Any]
    gates: dict[str, Any]
    best_step: int | None = None


class Callback:
    """Watches a run and decides nothing.
    Every hook does nothing by default; they are called in the order below.

    An exception in a hook ends the run.
    """

    def on_phase(self, name: str) -> None:
        """Setup enters a phase: data, preflight."""

    def on_data(self, progress: Any) -> None:
        """The data set is being prepared."""

    def on_setup(self, cfg: RunConfig, dataset: Dataset, n_params: int, run_dir: Path) -> None:
        """Data are open; the model is not built yet."""

    def on_preflight(self, gate: Gate, verdict: Verdict, seconds: float) -> None:
        """A preflight gate was checked."""

    def on_train_start(self, trainer: "Trainer", start: RestartPoint) -> None:
        """The loop begins."""

    def on_step_start(self, trainer: "Trainer") -> None:
        """Before the data of a step are drawn."""

    def on_batch(self, trainer: "Trainer", batches: Sequence[Batch]) -> None:
        """The micro-batches of the next step were drawn."""

    def on_step(self, trainer: "Trainer", report: StepReport) -> None:
        """The weights were updated."""

    def on_evaluation(self, trainer: "Trainer", report: StepReport, decision: Decision) -> None:
        """`report.evaluation` and `report.memorization` were measured."""

    def on_sample(self, trainer: "Trainer", sample: Sample) -> None:
        """A text was drawn."""

    def on_step_end(self, trainer: "Trainer", report: StepReport) -> None:
        """The report of the step is complete; a checkpoint may follow."""

    def on_save(self, trainer: "Trainer", folder: Path) -> None:
        """A checkpoint was handed to the writer."""

    def on_saved(self, trainer: "Trainer", point: RestartPoint) -> None:
        """A checkpoint is on disk."""

    def on_gate_failure(
        self, trainer: "Trainer", gate_id: str, step: int, verdict: Verdict
    ) -> None:
        """A runtime gate failed."""

    def on_message(self, text: str) -> None:
        """Something for a person to read."""

    def on_train_end(self, trainer: "Trainer", status: str) -> None:
        """The loop has ended without an exception."""

    def on_close(self, record: Record, run_dir: Path) -> None:
        """The record is written; also called for a run that failed."""


class CallbackList(Callback):
    """Several callbacks as one: each hook calls that of every member, in order."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = list(callbacks)

    def _call(self, hook: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*values)


for _hook in [name for name in vars(Callback) if name.startswith("on_")]:
    setattr(CallbackList, _hook, partialmethod(CallbackList._call, _hook))


class StepTimer:
    """Wall time of steps, without work beside training: tracing, which `paused` excludes and
    counts, and what `leave_out` excludes.
    """

    def __init__(self) -> None:
        self.total_s = self.paused_s = self._started = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self) -> float:
        """A step has ended; returns its seconds."""
        seconds = time.perf_counter() - self._started
        self.total_s += seconds
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block does not count as time of the step."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.paused_s += seconds
        self.leave_out(seconds)

    def leave_out(self, seconds: float) -> None:
        """As much of the current step does not count as its time."""
        self._started += seconds


@dataclass
class RunOutput:
    """What a process of a run writes: its directory with logs, and rank 0 the record and the
    checkpoints.

    `inherited_s` are the seconds that its parents had trained before;
    `carried` are files taken over from a parent.
    """

    dir: RunDir
    record: RecordBuilder
    writer: checkpoint_writer.Writer
    ranks: Ranks = ONE_PROCESS
    inherited_s: float = 0.0
    carried: list[Artefact] = field(default_factory=list)


@dataclass
class Trainer:
    """A run: its training state and data, what it writes (`output`), and what watches it (`keeper`,
    `callbacks`).

    `batches`, `report` and `evaluation` are those of the latest step; `started_from` is the step
    folder that was loaded, and `resumed` is whether it is one of this run; `verified` are the
    measurements that a run makes once, such as kinds of read-only sections that were compared;
    `processes` are those that continued the run, as its checkpoints state them; `around_update`
    gives the context of each update.
    """

    state: TrainState
    dataset: Dataset
    output: RunOutput
    keeper: Gatekeeper
    callbacks: Callback
    peak_flops: float
    flops_per_step: float
    held_out: list[Batch] = field(default_factory=list)
    probes: dict[str, Batch] = field(default_factory=dict)
    batches: Sequence[Batch] = ()
    report: StepReport | None = None
    evaluation: Evaluation | None = None
    started_from: Path | None = None
    resumed: bool = False
    timer: StepTimer = field(default_factory=StepTimer)
    verified: set[str] = field(default_factory=set)
    processes: list[Process] = field(default_factory=list)
    around_update: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def cfg(self) -> RunConfig:
        """The configuration of the run."""
        return self.state.cfg

    @contextmanager
    def read_only(self, section: str) -> Iterator[None]:
        """A section that must leave the training state unchanged; the first of each kind in a
        process is verified, and those of a step that may be the last, which no update follows.
        """
        may_be_last = self.state.step == self.cfg.train.max_steps or self.state.stopper.may_end()
        if section in self.verified and not may_be_last:
            yield
            return
        self.verified.add(section)
        started = time.perf_counter()
        before, spent = state_checksums(self.state), time.perf_counter() - started
        yield
        started = time.perf_counter()
        after = state_checksums(self.state)
        changed = self.state.ranks.names_of_all(differing(before, after))
        self.keeper.charge("evaluation.leaves-no-trace", spent + time.perf_counter() - started)
        self.keeper.observe(
            StateCompared(self.state.step, section, n_compared=len(after), differing=changed)
        )

    @cached_property
    def held_out_sha256(self) -> str:
        """Hash of the held-out batches."""
        return batch_hash(self.held_out)

    def mark(self) -> dict[str, Any]:
        """What a checkpoint states of its run: sha256 of run.json, the lines of each log, the
        sections that were compared, the processes that continued it, and the held-out batches.
        """
        directory = self.output.dir
        return {
            "sha256": directory.sha256,
            "logs": directory.marks(),
            "compared": sorted(self.verified),
            "processes": [process.model_dump() for process in self.processes],
            "held_out_sha256": self.held_out_sha256,
        }

    def log_verdict(self, gate_id: str, step: int | None, verdict: Verdict) -> None:
        """Log a verdict and report a failing runtime gate to the callbacks."""
        outcome, measured = verdict.outcome, dict(verdict.measured)
        line = {"verdict": outcome, "measured": measured, "message": verdict.message}
        self.output.dir.log("gates.jsonl", gate=gate_id, step=step, **line)
        if verdict.outcome == "fail" and self.keeper.states[gate_id].gate.moment == "runtime":
            self.callbacks.on_gate_failure(self, gate_id, step, verdict)

    def log_red_preflight(self) -> None:
        """Log the red verdicts of the preflight once more, after the logs were cut."""
        for gate_id, state in self.keeper.states.items():
            if state.gate.moment == "preflight" and state.verdict.outcome == "fail":
                self.log_verdict(gate_id, None, state.verdict)


# --- the record -----------------------------------------------------------------------------------


@contextmanager
def recorded(trainer: Trainer) -> Iterator[None]:
    """Write the record of a run that an exception ends.
    The exception propagates; a GateFailed carries it as `record`.
    """
    try:
        with trainer.output.ranks.watched():
            yield
    except BaseException as error:
        with uninterrupted():
            _finish_writing(trainer)
            if not trainer.output.ranks.is_main:
                raise
            try:
                record_results(trainer)
                record = close(trainer, *_ending(trainer, error))
            except StackproofError as e:  # the first error is the one to report
                trainer.callbacks.on_message(f"the record could not be written: {e}")
            else:
                if isinstance(error, GateFailed):
                    error.record = record
        raise


def _finish_writing(trainer: Trainer) -> None:
    """Wait for the last checkpoint, which the record names.
    A failure beside the error that ends the run is only logged.
    """
    try:
        trainer.output.writer.wait()
    except Exception as e:
        with suppress(StackproofError):  # the disk may be full
            line = {"event": "save_failed", "step": trainer.state.step, "message": str(e)}
            trainer.output.dir.log("events.jsonl", **line)
        trainer.callbacks.on_message(f"besides, the checkpoint behind the run failed: {e}")


def _ending(trainer: Trainer, error: BaseException) -> tuple[str, str, int]:
    """Status, reason and exit code of a run that an exception ended."""
    match error:
        case GateFailed():
            verdicts = {g.id: g.verdict for g in trainer.keeper.results()}
            if verdicts.get("runtime.finite") == "fail":
                line = {"step": trainer.state.step, **nonfinite_parts(trainer.state.model)}
                trainer.output.dir.log("events.jsonl", event="nonfinite", **line)
            return "halted", error.what, error.exit_code
        case Stopped(exit_code=75):
            return "preempted", error.what, 75
        case Stopped():
            return "interrupted", error.what, 130
        case StoppedAtOnce(status="preempted"):
            step = trainer.state.step
            when = f"after step {step}" if step else "before step 1"
            return "preempted", f"stopped at once by SIGTERM, {when}", 75
        case KeyboardInterrupt():
            saved = (trainer.output.dir.checkpoints / "latest").is_file()
            left = "the last checkpoint is good" if saved else "nothing was saved yet"
            return "interrupted", f"stopped at once; {left}", 130
        case StackproofError():
            return "failed", error.what, error.exit_code
        case OSError():
            return "failed", str(error), EnvironmentUnfit.exit_code
    return "failed", f"{type(error).__name__}: {error}", 1


@require(
    lambda trainer, exit_code: exit_code or trainer.keeper.finished_at == trainer.state.step,
    "the gates of a run that completes have judged its end",
)
def close(trainer: Trainer, status: str, reason: str, exit_code: int) -> Record:
    """Write the record, whose results are stated; also for a run that failed."""
    output, root = trainer.output, trainer.output.dir.path
    output.record.device_s = max(0.0, trainer.state.wall_s - output.inherited_s)
    ending = {"status": status, "end_reason": reason, "exit_code": exit_code}
    try:
        bundles = sorted(root.glob("repro/*/repro.json"))  # also of a gate that judges the end
        output.record.outputs += [artefact(p, root=root) for p in bundles]
        output.dir.sync_logs()
        record = output.record.finish(root, gates=trainer.keeper.results(), series=SERIES, **ending)
    except OSError as e:
        raise EnvironmentUnfit(
            f"the record of the run could not be written: {e}",
            next_step=f"{remedy(e)}, then {next_command(root)}",
        ) from e
    trainer.callbacks.on_close(record, root)
    try:
        output.dir.seal()
    except OSError as e:  # the record stands
        trainer.callbacks.on_message(f"the checksums of {root} could not be written: {e}")
    return record


def record_results(trainer: Trainer) -> None:
    """Metrics and files of the record; those of a run that has completed are then judged."""
    record_metrics(trainer)
    output = trainer.output
    output.record.outputs = list(output.carried)
    with suppress(CheckpointError, OSError):  # gates judge a checkpoint that is not there
        output.record.outputs[:0] = _saved_files(output)


def _saved_files(output: RunOutput) -> list[Artefact]:
    """The files of the latest checkpoint, with the tokenizer; none before the first."""
    root = output.dir.path
    folder = checkpoint_folders.pointed(output.dir.checkpoints, "latest")
    files = [*checkpoint.files_of(folder), root / "tokenizer.json"] if folder else []
    return [artefact(p, root=root) for p in files]


def record_metrics(trainer: Trainer) -> None:
    """Every metric of a train record but for the baselines."""
    state, dataset, metric = trainer.state, trainer.dataset, trainer.output.record.metric
    vocab_size = dataset.tokenizer.vocab_size
    n_params = parameter_count(trainer.cfg.model.model_dump(), vocab_size)
    metric("n_params", n_params, "parameters")
    metric("vocab_size", vocab_size, "tokens")
    metric("steps", state.step, "steps")
    metric("tokens_seen", state.tokens_seen, "tokens")
    metric("unique_tokens", dataset.train.n_tokens, "tokens")
    metric("epochs", state.tokens_seen / dataset.train.n_tokens, "epochs")
    metric("tokens_per_parameter", state.tokens_seen / n_params, "tokens per parameter")
    metric("random_loss_nats", uniform_loss_nats(vocab_size), "nats per token")
    loss_nats = _last_loss(trainer)
    # A resumed run that ends before its checkpoint is loaded has a log, but no state.
    if loss_nats is not None and state.ema_loss_nats is not None:
        n = trainer.cfg.train.tokens_per_step
        metric("train_loss_nats", loss_nats, "nats per token", n=n, better="lower")
        metric("ema_loss_nats", state.ema_loss_nats, "nats per token", better="lower")
        metric("min_ema_loss_nats", state.min_ema_loss_nats, "nats per token", better="lower")
        metric("train_s", round(state.wall_s, 3), "s", better="lower")
        metric("tokens_per_s", state.tokens_seen / state.wall_s, "tokens/s", better="higher")
        watching = [w for w in trainer.keeper.states.values() if w.gate.moment == "runtime"]
        gate_s = sum(w.seconds for w in watching)
        process_s = trainer.timer.total_s or state.wall_s
        metric("gates_overhead_frac", gate_s / process_s, "1", better="lower")
        if trainer.timer.paused_s:
            metric("trace_overhead_frac", trainer.timer.paused_s / process_s, "1", better="lower")
        _record_ranks(trainer)
        if state.device.type == "cuda":
            peak = peak_memory_bytes(state.device)
            metric("peak_device_memory_bytes", peak, "bytes", better="lower")
    if (val := trainer.evaluation) is not None:
        nats, bits = val.loss_nats, val.bits_per_byte
        per_token = {"n": val.n_tokens, "better": "lower"}
        metric("val_loss_nats", nats, "nats per token", stderr=val.stderr_nats, **per_token)
        metric("val_ppl", perplexity(nats), "1", **per_token)
        metric("val_bits_per_byte", bits, "bits per byte", n=val.n_bytes, better="lower")
        metric("val_batches", len(trainer.held_out), "batches")
        if best := state.best:  # empty if no evaluation was called and the gate for that is waived
            metric("best_val_loss_nats", best["val_loss_nats"], "nats per token", better="lower")
            metric("best_step", best["step"], "steps")


def record_baselines(trainer: Trainer) -> None:
    """The bits per byte of counting baselines, for the record of a run that has completed."""
    dataset, metric = trainer.dataset, trainer.output.record.metric
    parts, n = (dataset.train, dataset.validation, dataset.tokenizer), dataset.validation.n_bytes
    for name, bits_of in BASELINES.items():
        metric(name, bits_of(*parts), "bits per byte", n=n, better="lower")


def _record_ranks(trainer: Trainer) -> None:
    """What communication takes of a step, and how equal the ranks are, of a run on several."""
    metric, lines = trainer.output.record.metric, trainer.output.dir.lines(rank_log.FILE)
    table = rank_log.rank_table(lines)
    if table is None or not table.n_profiled:
        return
    for name in ("communication_frac", "exposed_frac"):
        figure = median(table.figures[name])
        metric(f"ranks_{name}", figure, "1", n=table.n_profiled, better="lower")
    ratio = table.slowest_rank_ratio
    metric("ranks_slowest_ratio", ratio, "1", n=table.n_profiled, better="lower")


def _last_loss(trainer: Trainer) -> float | None:
    """Loss of the latest step, of this process or in the log of an earlier one;
    None before the first step.
    """
    if trainer.report is not None:
        return trainer.report.loss_nats
    last = None
    for line in trainer.output.dir.lines("metrics.jsonl"):
        match line:
            case {
                "step": int(step),
                "loss_nats": float() | int() | "NaN" | "Infinity" | "-Infinity" as loss,
            } if step <= trainer.state.step:
                last = float(loss)
    return last
