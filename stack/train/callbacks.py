"""Built-in callbacks: the logs, the events for the gates, tracing of activations,
the check for silent data corruption, and mirrors to experiment trackers.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stackproof.config import MixtureOfExperts, RunConfig, TrainConfig, trackers
from stackproof.contracts.between_updates import BetweenUpdates
from stackproof.contracts.drawn import DrawOptions
from stackproof.contracts.events import (
    ActivationsTraced,
    BatchDrawn,
    Evaluated,
    Finished,
    HeldOutRows,
    LossRescored,
    MemorizationMeasured,
    ModuleModes,
    RatesUsed,
    Recited,
    Recomputed,
    Sampled,
    Saved,
    Started,
    StepTaken,
    TextDrawn,
    WeightsUpdated,
)
from stackproof.data.data_loader import Batch, batch_hash, model_inputs
from stackproof.data.packing import IGNORE_INDEX
from stackproof.data.prepare import Dataset
from stackproof.data.search import found_in, passages_found
from stackproof.evaluate.baselines import compressed_bits_per_byte, uniform_loss_nats
from stackproof.evaluate.bits_per_byte import Evaluation, evaluating
from stackproof.evaluate.stopping import Decision
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.records import Record
from stackproof.subject.commands import drawn
from stackproof.subject.read_back import logs_of, record_of
from stackproof.subject.recited import recited
from stackproof.trace.points_log import points_lines
from stackproof.train import checkpoint_folders, losses
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.device import probe_peak_flops
from stackproof.train.losses import LossOfFirstStep
from stackproof.train.rng import generator
from stackproof.train.state import TrainState, differing, gradient_crc32
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Sample, Trainer

SEARCHED_ROWS = 8  # of the held-out rows, evenly spread
COMPRESSED_TOKENS = 100_000  # of the held-out rows, and of the training split before them
MAX_SEARCHED_TOKENS = 20_000_000  # of the training split, in which a suspicious sample is searched
TRACING_SHARE_MAX = 0.02  # of a run's time
FIRST_STEP = "loss of the first step"
MOVEMENT = "optim.movement"
RECOMPUTED_STEP, STEP_TIME = "runtime.recomputed-step", "runtime.step-time"


class RunLog(Callback):
    """Writes metrics.jsonl, samples.jsonl and the rows by source of curriculum.jsonl."""

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        names = [s.name for s in trainer.state.data_loader.sampler.sources]
        if len(names) > 1:
            drawn = trainer.state.drawn_by_all(trainer.batches)
            rows = Counter(names[source] for _, source, _ in drawn.rows)
            trainer.output.dir.log(
                "curriculum.jsonl", step=report.step, event="rows", rows=dict(sorted(rows.items()))
            )

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        score = {"score": sample.coherence.score, "parts": dict(sample.coherence.parts)}
        line = {
            "step": sample.step,
            "prompt": sample.prompt,
            "text": sample.text,
            "loss_nats": sample.loss_nats,
        }
        trainer.output.dir.log("samples.jsonl", **line, **score)

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        cfg = trainer.cfg.train
        if (
            report.step % cfg.log_every == 0
            or report.evaluation is not None
            or report.step == cfg.max_steps
        ):
            trainer.output.dir.log("metrics.jsonl", **report.log_line())


class TrainingText(Protocol):
    """What gates look up in the training split."""

    def found_frac(self, ids: Sequence[int]) -> float:
        """Share of a text's spans of about 60 bytes that occur in the training split."""

    def held_out_rows(self, batches: Sequence[Batch]) -> HeldOutRows:
        """The rows of the held-out batches, compared with the training split."""

    def compressed(self, batches: Sequence[Batch]) -> float:
        """Bits per byte that a compressor needs for the held-out batches after training text."""


class TrainingSplit:
    """Looks up text in the training split of a data set."""

    def __init__(self, dataset: Dataset, seq_len: int):
        self.dataset, self.seq_len = dataset, seq_len

    def found_frac(self, ids: Sequence[int]) -> float:
        return found_in(ids, self.dataset.train, MAX_SEARCHED_TOKENS)

    def held_out_rows(self, batches: Sequence[Batch]) -> HeldOutRows:
        rows = [row for batch in batches for row in batch.input_ids.tolist()]
        few = rows[:: max(1, len(rows) // SEARCHED_ROWS)]
        found = passages_found(few, self.dataset.train, 10 * MAX_SEARCHED_TOKENS)
        numbers = [n for batch in batches for n in batch.sample_ids]
        reach = (max(numbers) - min(numbers) + 1) / self.dataset.validation.n_windows(self.seq_len)
        wrong = sum(self._wrong_rows(batch) for batch in batches)
        return HeldOutRows(len(rows), len({tuple(row) for row in rows}), found, reach, wrong)

    def _wrong_rows(self, batch: Batch) -> int:
        """Rows of a batch that are not those of the split, read in reverse order."""
        numbers, split = np.array(batch.sample_ids)[::-1], self.dataset.validation
        if max(numbers) >= split.n_windows(self.seq_len):
            return len(numbers)
        truth = split.rows(numbers, self.seq_len)
        wrong = np.zeros(len(numbers), dtype=bool)
        for got, wanted in (
            (batch.input_ids, truth.input_ids),
            (batch.labels, truth.labels),
            (batch.document_ids, truth.document_ids),
        ):
            if got is not None and wanted is not None:
                wrong |= (got.numpy() != wanted[::-1]).any(1)
        return int(wrong.sum())

    def compressed(self, batches: Sequence[Batch]) -> float:
        decode, train = self.dataset.tokenizer.decode, self.dataset.train
        known = decode(train.token_range(0, min(train.n_tokens, COMPRESSED_TOKENS)).tolist())
        rows = [row for batch in batches for row in batch.input_ids]
        few = torch.cat(rows)[:COMPRESSED_TOKENS]
        return compressed_bits_per_byte(decode(few.tolist()), after=known)


class GateEvents(Callback):
    """Shows a run to its runtime gates as the events of contracts/events.py."""

    def __init__(self, text: TrainingText):
        self.text = text
        self.cursor_before = 0
        self.loss = LossOfFirstStep()

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        judged = [s for g, s in trainer.keeper.states.items() if g in self.loss.gates]
        known = FIRST_STEP in trainer.verified and all(s.checks for s in judged)
        self.loss.done = trainer.state.ranks.from_main(known or not judged)
        trainer.keeper.observe(Started(step=start.step, plan=start.plan))

    def on_step_start(self, trainer: Trainer) -> None:
        self.cursor_before = trainer.state.data_loader.cursor

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        drawn = trainer.state.drawn_by_all(batches)
        windows, sources, epochs = zip(*drawn.rows)
        trainer.keeper.observe(
            BatchDrawn(
                step=trainer.state.step + 1,
                cursor_before=self.cursor_before,
                cursor_after=trainer.state.data_loader.cursor,
                sample_ids=windows,
                epoch=max(epochs),
                n_tokens=sum(drawn.n_tokens),
                sources=sources,
                epochs=epochs,
            )
        )
        self.loss.watch(trainer.state, batches)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        observe, step = trainer.keeper.observe, report.step
        evaluating = tuple(n for n, m in trainer.state.model.named_modules() if not m.training)
        evaluating = trainer.state.ranks.names_of_all(evaluating)
        observe(ModuleModes(step, "training", wrong=evaluating))
        observe(
            StepTaken(
                **shared(report, StepTaken),
                max_grad_norm=trainer.cfg.optim.max_grad_norm,
                n_expected_tokens=report.n_tokens,
                flops=trainer.flops_per_step,
                peak_flops=self._peak_flops(trainer, report),
            )
        )
        n_rounds = 1 + report.overflow_retries + is_recomputed(trainer.cfg.train, step)
        loss = self.loss.measured(
            trainer.state, n_rounds, applied=report.applied, reported_nats=report.loss_nats
        )
        if loss:
            trainer.verified.add(FIRST_STEP)
            trainer.keeper.charge(self.loss.gates[0], self.loss.seconds)
            observe(loss)
        observe(RatesUsed(step, {"all": report.lr, **report.group_lrs}))
        # Every trained parameter has a gradient or decay, so an update changes all of them.
        observe(WeightsUpdated(step, report.lr, report.changed_tensor_frac))

    def _peak_flops(self, trainer: Trainer, report: StepReport) -> float:
        """The probed peak rate. After a faster step it is probed again, since other work may have
        slowed the first probe.
        """
        if trainer.flops_per_step > trainer.peak_flops * report.wall_s:
            with charged(trainer, STEP_TIME):
                trainer.peak_flops = max(trainer.peak_flops, probe_peak_flops(trainer.state.device))
        return trainer.peak_flops

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        state, val, found = trainer.state, report.evaluation, report.memorization
        trainer.keeper.observe(ModuleModes(report.step, "evaluation", val.training_modules))
        trainer.keeper.observe(
            Evaluated(
                step=report.step,
                loss_nats=val.loss_nats,
                bits_per_byte=val.bits_per_byte,
                batch_nats=tuple(val.batch_nats),
                batch_hash=batch_hash(trainer.held_out),
                previous_loss_nats=state.last_val_nats,
                random_loss_nats=uniform_loss_nats(trainer.dataset.tokenizer.vocab_size),
                train_loss_nats=state.ema_loss_nats,
                pretrained=pretrained(trainer.cfg),
                best_step=state.best.get("step"),
                best_loss_nats=state.best.get("val_loss_nats"),
                rows=partial(self.text.held_out_rows, trainer.held_out),
                compressed=partial(self.text.compressed, trainer.held_out),
            )
        )
        trainer.keeper.observe(rescored(trainer, val))
        with charged(trainer, "sampling.recitation"):
            own = recited(state, state.ranks.from_main(trainer.batches), trainer.held_out)
        trainer.keeper.observe(
            MemorizationMeasured(
                report.step,
                Recited(
                    n_windows=found.n_passages,
                    n_recited=found.n_recited,
                    prefix_tokens=found.prefix_tokens,
                    matched_tokens=found.matched_tokens,
                    n_held_out=found.n_held_out,
                    held_out=state.ranks.ahead(found.held_out),
                ),
                own,
                half=trainer.cfg.train.dtype != "float32",
            )
        )

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        trainer.keeper.observe(
            Sampled(
                step=sample.step,
                text=sample.text,
                prompt=sample.prompt,
                language=trainer.cfg.sample.language,
                loss_nats=sample.loss_nats,
                found_in_corpus=partial(self.text.found_frac, sample.ids),
            )
        )
        trainer.keeper.observe(self._drawn(trainer, sample))
        trainer.keeper.observe(sample_rescored(trainer, sample))

    def _drawn(self, trainer: Trainer, sample: Sample) -> TextDrawn:
        """The sample, compared with what the configuration declares."""
        cfg, tokenizer, step = trainer.cfg.sample, trainer.dataset.tokenizer, trainer.state.step
        declared = DrawOptions(cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k)
        chance, model = generator(trainer.cfg.seed, "sample", step), trainer.state.model
        given = tokenizer, cfg.prompt, sample.ids, sample.text, declared, chance, step
        with charged(trainer, "sampling.drawn"):
            return drawn(model, *given)

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        trainer.keeper.observe(Saved(step=trainer.state.step, path=str(folder)))

    def on_train_end(self, trainer: Trainer, status: str) -> None:
        pointed = {
            f"{name}_step": checkpoint_folders.pointed_step(trainer.output.dir.checkpoints, name)
            for name in ("latest", "best")
        }
        trainer.keeper.observe(logs_of(trainer))
        if trainer.output.ranks.is_main:
            trainer.keeper.observe(record_of(trainer, status))
        trainer.keeper.observe(Finished(step=trainer.state.step, status=status, **pointed))


def rescored(trainer: Trainer, val: Evaluation) -> LossRescored:
    """One held-out batch of an evaluation, another each time, scored again by the model. All ranks
    call this.
    """
    state = trainer.state
    at = state.step // trainer.cfg.eval.every % len(trainer.held_out)
    batch = trainer.held_out[at]
    own = _own_nats(trainer, batch.labels, *model_inputs(batch, state.device))
    half = trainer.cfg.train.dtype != "float32"
    return LossRescored(state.step, f"held-out batch {at}", val.batch_nats[at], own, half)


def sample_rescored(trainer: Trainer, sample: Sample) -> LossRescored:
    """A sample, as much of it as fits into the context, scored again by the model. All ranks call
    this.
    """
    tokenizer, cfg = trainer.dataset.tokenizer, trainer.cfg
    prompt = [tokenizer.eos_id, *tokenizer.encode(sample.prompt).ids]
    ids = torch.tensor([[*prompt, *sample.ids]])[:, -cfg.model.max_seq_len - 1 :]
    labels_1T = ids[:, 1:].clone()
    labels_1T[:, : -len(sample.ids)] = IGNORE_INDEX
    own = _own_nats(trainer, labels_1T, ids[:, :-1].to(trainer.state.device))
    half = cfg.train.dtype != "float32"
    return LossRescored(sample.step, "the sample", sample.loss_nats, own, half)


def _own_nats(trainer: Trainer, labels_BT: Tensor, *inputs: Any) -> float:
    """Mean loss of the model over the labels that are not IGNORE_INDEX."""
    state = trainer.state
    with charged(trainer, "evaluation.rescored"):
        with evaluating(state.model), state.autocast():
            logits_BTV = state.model(*inputs)
        nats = [
            -row.float().log_softmax(-1)[labels >= 0].gather(1, labels[labels >= 0, None]).double()
            for row, labels in zip(logits_BTV, labels_BT.to(state.device))
        ]
        return float(torch.cat(nats).mean())


def shared(report: StepReport, event: type) -> dict[str, Any]:
    """The fields that a step's report has in common with a kind of event."""
    return {f.name: getattr(report, f.name) for f in fields(event) if hasattr(report, f.name)}


def pretrained(cfg: RunConfig) -> bool:
    """Whether the weights were imported, so that the run did not begin with untrained ones."""
    return cfg.recipe == "imported"


def declared_plan(trainer: Trainer) -> dict[str, Any]:
    """What a run declares to its gates, from where it stands."""
    cfg, state = trainer.cfg, trainer.state
    order, splits = state.data_loader.sampler, trainer.dataset.manifest["splits"]
    rows_per_step = cfg.train.tokens_per_step // cfg.model.max_seq_len
    plan = {
        "peak_lr": cfg.optim.lr,
        "peak_lrs": cfg.optim.peak_lrs(),
        "schedule": cfg.schedule.model_dump(),
        "warmup_steps": cfg.schedule.warmup_steps,
        "max_steps": cfg.train.max_steps,
        "tokens_per_step": cfg.train.tokens_per_step,
        "tokens_seen": state.tokens_seen,
        "untrained": state.step == 0 and not pretrained(cfg),
        "rows_per_step": rows_per_step,
        "cursor": state.data_loader.cursor,
        "sources": [
            {k: getattr(s, k) for k in ("name", "first", "n_windows", "cap", "floor")}
            for s in order.sources
        ],
        "order": sha256_json(
            [cfg.seed, cfg.model.max_seq_len, splits["train"], cfg.data.packing.kind]
        ),
        "drawn": order.counts(state.data_loader.cursor).tolist(),
        "warmup_rows": cfg.curriculum.warmup_steps * rows_per_step,
        "warmup_sources": list(cfg.curriculum.warmup_sources),
        "random_loss_nats": uniform_loss_nats(trainer.dataset.tokenizer.vocab_size),
        "n_eval_batches": len(trainer.held_out),
        "bits_per_byte_min": cfg.eval.bits_per_byte_min,
        "intervals": {
            "Evaluated": (cfg.eval.every, "eval.every"),
            "Sampled": (cfg.sample.every, "sample.every"),
            "Saved": (cfg.checkpoint.every, "checkpoint.every"),
            "Recomputed": (cfg.train.sdc_check_every, "train.sdc_check_every"),
        },
    }
    match cfg.model.ffn:
        case MixtureOfExperts(n_experts=n_experts, top_k=top_k, capacity_factor=factor):
            plan |= {"expert_layers": cfg.model.n_layers, "n_experts": n_experts, "top_k": top_k}
            plan["capacity_factor"] = factor
    return plan


class PointTracing(Callback):
    """Every `trace.every` steps, logs statistics of all activations on the next batch; at the last
    step of a run that ends before. Not part of a step's time.
    """

    def __init__(self) -> None:
        self.recorded = 0

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        step, every = trainer.state.step + 1, trainer.cfg.trace.every
        last = trainer.cfg.train.max_steps
        if every and (step % every == 0 or step == last < every):
            self._record(trainer, step, batches)

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        if decision.stop and report.step < trainer.cfg.trace.every:
            self._record(trainer, report.step, trainer.batches)

    def _record(self, trainer: Trainer, step: int, batches: Sequence[Batch]) -> None:
        started, every = time.perf_counter(), trainer.cfg.trace.every
        with trainer.timer.paused():
            with trainer.read_only("trace"):
                lines = points_lines(trainer.state, batches[0])
                for line in lines:
                    trainer.output.dir.log("points.jsonl", step=step, **line)
            points = {line["point"]: line["stats"] for line in lines}
            trainer.keeper.observe(ActivationsTraced(step, points))
        self.recorded += 1
        if (
            trainer.report and self.recorded == 2
        ):  # the first is slower: torch warms up, and the read-only section is verified
            self._advise(trainer, every, time.perf_counter() - started)

    def _advise(self, trainer: Trainer, every: int, spent_s: float) -> None:
        step_s = trainer.report.wall_s
        if (enough := sparse_enough(every, spent_s, step_s)) > every:
            share = f"recording points takes {spent_s / (step_s * every):.1%} of the time of steps"
            trainer.callbacks.on_message(
                f"{share}; trace.every = {enough} keeps it within {TRACING_SHARE_MAX:.0%}"
            )


def sparse_enough(every: int, recording_s: float, step_s: float) -> int:
    """`every`, or the smallest larger interval at which recordings take at most
    TRACING_SHARE_MAX of the time of steps.
    """
    return max(every, math.ceil(recording_s / (TRACING_SHARE_MAX * step_s)))


def is_recomputed(train: TrainConfig, step: int) -> bool:
    """Whether the gradients of a step are computed twice."""
    return step % train.sdc_check_every == 0 or step == train.max_steps


class SdcCheck(Callback):
    """Computes every `train.sdc_check_every`-th step, and the last,
    once before it is taken and compares the gradients.
    """

    def __init__(self) -> None:
        self.expected: dict[str, int] | None = None
        self.seconds = 0.0

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if is_recomputed(trainer.cfg.train, trainer.state.step + 1):
            self._compute(trainer, batches)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.expected is not None:
            self._compare(trainer, lambda: gradient_crc32(trainer.state.model))

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        # Before an early stop its step is not known to be the last: compute its batches now.
        if decision.stop and not is_recomputed(trainer.cfg.train, report.step):
            self._compute(trainer, trainer.batches)
            self._compare(trainer, lambda: gradient_checksums(trainer.state, trainer.batches))

    def _compute(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        started = time.perf_counter()
        self.expected = gradient_checksums(trainer.state, batches)
        self.seconds = time.perf_counter() - started

    def _compare(self, trainer: Trainer, compute: Callable[[], dict[str, int]]) -> None:
        started = time.perf_counter()
        found = compute()
        own, self.expected = differing(self.expected, found), None
        changed = trainer.state.ranks.names_of_all(own)
        trainer.keeper.charge(RECOMPUTED_STEP, self.seconds + time.perf_counter() - started)
        trainer.keeper.observe(
            Recomputed(step=trainer.state.step, n_compared=len(found), differing=changed)
        )


class StateBetweenUpdates(Callback):
    """Compares weights and optimizer state before every update with those after the one before, in
    a run of one process.
    """

    def __init__(self) -> None:
        self.between: BetweenUpdates | None = None

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        state = trainer.state
        if state.ranks.sizes.world_size == 1:
            self.between = BetweenUpdates(state.model, state.optimizer)
            state.optimizer.register_step_post_hook(lambda *_: self._updated(trainer))

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if self.between is not None:
            with charged(trainer, MOVEMENT):
                found = self.between.compare(trainer.state.step, whole=False)
            trainer.keeper.observe(found)

    def _updated(self, trainer: Trainer) -> None:
        with charged(trainer, MOVEMENT):
            self.between.settle(updated=True)


@contextmanager
def charged(trainer: Trainer, gate_id: str) -> Iterator[None]:
    """Count the time of a block as the gate's."""
    started = time.perf_counter()
    yield
    trainer.keeper.charge(gate_id, time.perf_counter() - started)


def gradient_checksums(state: TrainState, batches: Sequence[Batch]) -> dict[str, int]:
    """CRC-32 of the clipped gradients that the next `train_step` will have, by name;
    the gradients are dropped.

    Random state and loss scale are restored; weights and moments are not touched.
    """
    devices = [state.device] if state.device.type == "cuda" else []
    scaler = state.scaler.state_dict()
    with torch.random.fork_rng(devices=devices):
        for _ in range(steps.MAX_OVERFLOW_RETRIES):
            loss_nats, *_ = steps.accumulate(state, batches)
            grads = opt.gradients(state.model)
            norm = opt.global_norm(grads)
            if not steps.overflowed(state, loss_nats, float(norm)):
                break
            state.scaler.update()
    if losses.is_finite(loss_nats, float(norm)):
        opt.clip_gradients(grads, norm, state.cfg.optim.max_grad_norm)
    # GradScaler requires an update after unscale_; the scale itself is then restored.
    state.scaler.update()
    state.scaler.load_state_dict(scaler)
    return gradient_crc32(state.model)


class TensorBoard(Callback):
    """Mirrors every number of metrics.jsonl, and the samples, to event files in RUN/tensorboard."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise EnvironmentUnfit(
                "--tracker tensorboard needs the package tensorboard, which is not installed",
                next_step="pip install 'stackproof[tensorboard]'",
            ) from e
        self.open, self.writer = SummaryWriter, None

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        # A resumed run repeats the steps after its checkpoint: hide what was written for them.
        self.writer = self.open(
            str(trainer.output.dir.path / "tensorboard"), purge_step=start.step + 1
        )

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        self.writer.add_text("sample", sample.prompt + sample.text, sample.step)

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        for name, value in report.log_line().items():
            self.writer.add_scalar(name, value, report.step)

    def on_close(self, record: Record, run_dir: Path) -> None:
        if self.writer is not None:
            self.writer.close()


TRACKERS = dict(zip(trackers.NAMES, (TensorBoard,), strict=True))
