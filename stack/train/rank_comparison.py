"""What the gates of a run on several ranks look at: its ranks, its rows, a step and an evaluation
computed again by one process, and what several ranks hold.

All ranks take part, since the state must be assembled; rank 0 compares.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackproof.contracts.distributed import compare_parts
from stackproof.contracts.events import (
    EvaluationRepeated,
    RanksJoined,
    RankSpeeds,
    ReplicasCompared,
    RowsDealt,
    StateDivided,
    StepRepeated,
)
from stackproof.contracts.gate import worst
from stackproof.contracts.loss import CANCELLED_FRAC, gradient_errors
from stackproof.data.data_loader import Batch
from stackproof.data.sampler import Sampler
from stackproof.distributed.ranks import ProcessGroup
from stackproof.distributed.started import n_started
from stackproof.distributed.tensors import place_of_part, whole
from stackproof.evaluate.bits_per_byte import evaluate_batches
from stackproof.evaluate.sampling import sample_loss
from stackproof.evaluate.stopping import Decision
from stackproof.model.foreign import plain_name
from stackproof.spec.canonical import sha256_json
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import code_state
from stackproof.train import checkpoint
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.device import probe_peak_flops
from stackproof.train.mask_comparison import PlacesWatch, compare_masks, masks_held
from stackproof.train.memory import available_bytes
from stackproof.train.schedule import lr_at
from stackproof.train.state import (
    TrainState,
    counters,
    crc32_by_name,
    differing,
    divide,
    named_tensors,
    state_around,
)
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, RestartPoint, Sample, Trainer

PREFIX = "distributed."
FIRST, UNEVEN = "first step", "first uneven step"
STEP, EVALUATION = "distributed.one-process-step", "distributed.evaluation"
MASKS = "distributed.dropout"
ROUNDING = 2 * torch.finfo(torch.float32).eps  # of a weight, by an update in another order
PROBED_SIZE = 512  # of a product on a CPU: ten take about as long as a step of a small model
BYTES_PER_PARAMETER = 24  # weights, gradients, two moments, and weights before and after
# What may differ between the machines of one run.
OF_A_MACHINE = ("device_uuid", "cpu_count", "os", "allocator")


def divide_compared(trainer: Trainer, ranks: ProcessGroup) -> None:
    """Divide the state among the ranks, and compare the parts of all of them with what it was."""
    before = crc32_by_name(_weights(trainer.state))
    divide(trainer.state, ranks)
    after = crc32_by_name((name, whole(t)) for name, t in _weights(trainer.state))
    changed = differing(before, after)
    trainer.keeper.observe(StateDivided(trainer.state.step, len(after), changed))


def _weights(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    return ((n, t) for n, t in named_tensors(state) if n.startswith("weights."))


class RankComparison(Callback):
    """Compares the ranks at the start of a process, in its first step, the first with unequal
    numbers of labels, its first evaluation and sample, and every `parallel.compare_every` steps. In
    a run of one process it does nothing.
    """

    def __init__(self) -> None:
        self.wanted: tuple[str, ...] = ()  # gates, as rank 0 has them
        self.reference: Reference | None = None
        self.repeated: set[str] = set()  # why this step is
        self.order: tuple[Sampler, int] | None = None  # and the position, before a step is drawn
        self.compared: set[str] = set()
        self.places: PlacesWatch | None = None  # of the step, if its masks are compared
        self.masks: set[str] = set()  # digests, of the step that was compared last

    def on_train_start(self, trainer: Trainer, start: RestartPoint) -> None:
        ranks = trainer.state.ranks
        own = tuple(g for g in trainer.keeper.states if g.startswith(PREFIX))
        self.wanted = ranks.from_main(own)
        if not self.wanted:
            return
        documents = ranks.gathered(identity(trainer))
        parts = set().union(*documents)
        unequal = sorted(p for p in parts if len({str(d.get(p)) for d in documents}) > 1)
        trainer.keeper.observe(
            RanksJoined(start.step, len(documents), n_started(), len(parts), tuple(unequal))
        )
        self._replicas(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        due = (trainer.state.step + 1) % trainer.cfg.parallel.compare_every == 0
        if self.wanted and (due or FIRST not in self.compared):
            # As it is before the draw, since a bandit keeps only its latest decision.
            loader = trainer.state.data_loader
            self.order = deepcopy(loader.sampler), loader.cursor

    def on_batch(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if not self.wanted:
            return
        with self._charged(trainer, STEP):
            self.repeated = self._kinds_of_step(trainer, batches)
            if not self.repeated and self.order is None:
                return
            dealt = trainer.state.ranks.gathered(batches)
            if self.order is not None:
                trainer.keeper.observe(rows_dealt(trainer, dealt, *self.order))
                self.order = None
                if MASKS in self.wanted:
                    self.places = PlacesWatch(trainer.state.model)
            if self.repeated and STEP in self.wanted:
                of_data_ranks = dealt[:: trainer.state.ranks.sizes.tensor]
                self.reference = reference_of(trainer, lambda alone: alone.take(of_data_ranks))

    def _kinds_of_step(self, trainer: Trainer, batches: Sequence[Batch]) -> set[str]:
        """Why this step is repeated: it is the first, or the first in which the ranks have unequal
        numbers of labels, without which a mean of means is a mean.
        """
        if self.compared >= {FIRST, UNEVEN}:
            return set()
        n_valid = trainer.state.drawn_by_all(batches).n_valid
        return {FIRST, *([UNEVEN] if len(set(n_valid)) > 1 else [])} - self.compared

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if not self.wanted:
            return
        if self.repeated and report.applied:
            self.compared |= self.repeated
            if STEP in self.wanted:
                with self._charged(trainer, STEP):
                    event = step_repeated(trainer, report, self.reference)
                    if trainer.state.ranks.is_main:
                        trainer.keeper.observe(event)
        self.reference = None
        if self.places is not None:
            self._masks(trainer, report)
        if self.repeated or report.step % trainer.cfg.parallel.compare_every == 0:
            self._replicas(trainer)
            own = probe_peak_flops(trainer.state.device, PROBED_SIZE)
            speeds = trainer.state.ranks.gathered(own)
            trainer.keeper.observe(RankSpeeds(report.step, tuple(speeds)))

    def on_evaluation(self, trainer: Trainer, report: StepReport, decision: Decision) -> None:
        state = trainer.state

        def loss_of(alone: Reference) -> float:
            found = evaluate_batches(
                alone.state.model,
                trainer.held_out,
                trainer.dataset.tokenizer.token_bytes,
                device=state.device,
                autocast=state.autocast,
            )
            return found.loss_nats

        self._repeat(trainer, "evaluation", report.evaluation.loss_nats, loss_of)

    def on_sample(self, trainer: Trainer, sample: Sample) -> None:
        state, tokenizer = trainer.state, trainer.dataset.tokenizer
        prompt_ids = [tokenizer.eos_id, *tokenizer.encode(sample.prompt).ids]
        options = {"device": state.device, "autocast": state.autocast}
        self._repeat(
            trainer,
            "sample",
            sample.loss_nats,
            lambda alone: sample_loss(alone.state.model, prompt_ids, sample.ids, **options),
            sample.ids,
        )

    def on_train_end(self, trainer: Trainer, status: str) -> None:
        if self.wanted:
            self._replicas(trainer)

    def _repeat(
        self,
        trainer: Trainer,
        what: str,
        found: float,
        compute: Callable[["Reference"], float],
        ids: Sequence[int] = (),
    ) -> None:
        """Compare the first evaluation or sample with that of one process."""
        if EVALUATION not in self.wanted or what in self.compared:
            return
        self.compared.add(what)
        with self._charged(trainer, EVALUATION):
            n_texts = len(set(map(tuple, trainer.state.ranks.gathered(list(ids)))))
            alone = reference_of(trainer, lambda alone: alone)
            if alone is None:
                return
            unknown = alone.unknown
            error = 0.0 if unknown else relative(found, compute(alone))
            half = rounds_otherwise(trainer, compiled=False)
            trainer.keeper.observe(
                EvaluationRepeated(trainer.state.step, what, error, n_texts, unknown, half)
            )

    def _masks(self, trainer: Trainer, report: StepReport) -> None:
        state = trainer.state
        with self._charged(trainer, MASKS):
            seen, self.places = self.places.end(len(trainer.batches)), None
            stream = state.ranks.from_main(state.dropout)
            found = state.ranks.gathered(masks_held(state, stream, report.step, seen))
            event, self.masks = compare_masks(report.step, found, self.masks)
            trainer.keeper.observe(event)

    def _replicas(self, trainer: Trainer) -> None:
        with self._charged(trainer, "distributed.replicas"):
            found = trainer.state.ranks.gathered(parts_held(trainer.state))
            n, unequal = compare_parts(found)
            trainer.keeper.observe(ReplicasCompared(trainer.state.step, n, unequal))

    @contextmanager
    def _charged(self, trainer: Trainer, gate_id: str) -> Iterator[None]:
        """Count the time of a block as that of a gate."""
        started = time.perf_counter()
        yield
        trainer.keeper.charge(gate_id, time.perf_counter() - started)


# --- ranks and rows -------------------------------------------------------------------------------


def identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same on all ranks: code, configuration, data, and how they compute."""
    state, environment = trainer.state, trainer.output.record.environment
    return {
        "spec": load_spec().sha256,
        "code": str(code_state()),
        "configuration": sha256_json(trainer.cfg.to_dict()),
        "data": sha256_json([trainer.dataset.manifest[k] for k in ("tokenizer", "splits")]),
        "held-out batches": trainer.held_out_sha256,
        "step": state.step,
        "mesh": str(state.ranks.sizes),
        **{name: value for name, value in environment.items() if name not in OF_A_MACHINE},
    }


def rows_dealt(
    trainer: Trainer, dealt: Sequence[Sequence[Batch]], sampler: Sampler, cursor: int
) -> RowsDealt:
    """The rows of all ranks, in order of rank, compared with those that a sampler draws from a
    position.
    """
    state, tensor = trainer.state, trainer.state.ranks.sizes.tensor
    batches = [batch for own in dealt[::tensor] for batch in own]
    loader, due = state.data_loader, Counter()
    n_rows = trainer.cfg.rows_per_step // trainer.cfg.accumulation(state.ranks.sizes.n_data_ranks)
    for first in range(cursor, cursor + trainer.cfg.rows_per_step, n_rows):
        sampler.decide(first, first + n_rows)
        due.update(sampler.at(np.arange(first, first + n_rows)).windows.tolist())
    given = Counter(window for batch in batches for window in batch.sample_ids)
    foreign = unequal = 0
    for batch in batches:
        rows = loader.stream.rows(np.array(batch.sample_ids), loader.seq_len)
        same = (torch.from_numpy(rows.input_ids) == batch.input_ids).all(1)
        same &= (torch.from_numpy(rows.labels) == batch.labels).all(1)
        foreign += int((~same).sum())
    for rank, own in enumerate(dealt):
        first = dealt[rank - rank % tensor]
        unequal += any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(own, first))
    return RowsDealt(
        step=state.step + 1,
        n_rows=given.total(),
        n_lost=(due - given).total(),
        n_repeated=(given - due).total(),
        n_foreign=foreign,
        n_unequal=unequal,
    )


def parts_held(state: TrainState) -> dict[str, Any]:
    """What this rank holds, by name and place in the whole tensor: CRC-32 of tensors, and numbers
    as they are.
    """
    parts = crc32_by_name((f"{name}{place_of_part(t)}", t) for name, t in named_tensors(state))
    rates = {f"lr.{name}": lr for name, lr in opt.group_lrs(state.optimizer).items()}
    return parts | rates | counters(state)


# --- the run in one process -----------------------------------------------------------------------


@dataclass
class Reference:
    """The run as one process has it, on rank 0. `unknown` is why it could not be built."""

    state: TrainState | None = None
    unknown: str = ""
    accumulated: steps.Accumulated | None = None
    grad_norm: float = 0.0
    gradients: dict[str, Tensor] | None = None

    def take(self, dealt: Sequence[Sequence[Batch]]) -> "Reference":
        """Compute the clipped gradients of the rows of all data ranks. The optimizer is not
        stepped.
        """
        if self.unknown:
            return self
        state, cfg = self.state, self.state.cfg
        self.accumulated = steps.accumulate(state, [b for own in dealt for b in own])
        grads = opt.gradients(state.model)
        norm = opt.global_norm(grads)
        opt.clip_gradients(grads, norm, cfg.optim.max_grad_norm)
        self.grad_norm = float(norm)
        self.gradients = {plain_name(n): p.grad.clone() for n, p in state.model.named_parameters()}
        return self


def reference_of(trainer: Trainer, compute: Callable[[Reference], Reference]) -> Reference | None:
    """What `compute` makes of the run in one process with its weights and moments of now; None on
    the other ranks, which give their parts. Random state is not changed.
    """
    state = trainer.state
    tensors = checkpoint.assembled(checkpoint.tensors_of(state))
    if not state.ranks.is_main:
        return None
    n_bytes = BYTES_PER_PARAMETER * sum(t.numel() for t in tensors["model.safetensors"].values())
    free = available_bytes(state.device)
    if free is not None and n_bytes > free:
        reason = f"one process has {free / 2**30:.1f} GiB free and needs {n_bytes / 2**30:.1f}"
        return Reference(unknown=f"the whole model does not fit: {reason}")
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        train = state.cfg.train.model_copy(update={"compile": False})
        cfg = state.cfg.model_copy(update={"train": train})
        size = trainer.dataset.tokenizer.vocab_size
        alone = state_around(cfg, size, state.data_loader, state.device)
        alone.step = state.step
        with torch.no_grad():
            checkpoint.load_model(alone.model, tensors["model.safetensors"])
            checkpoint.restore_optimizer(alone, tensors["state.safetensors"])
        enabled = state.scaler.is_enabled()
        scale = state.scaler.get_scale()
        alone.scaler = torch.amp.GradScaler(state.device.type, init_scale=scale, enabled=enabled)
        return compute(Reference(alone))


def step_repeated(
    trainer: Trainer, report: StepReport, alone: Reference | None
) -> StepRepeated | None:
    """Compare the step that all ranks have taken with that of one process; None on other ranks."""
    state = trainer.state
    named = [(plain_name(n), p) for n, p in state.model.named_parameters()]
    gradients = {n: whole(p.grad.detach()) for n, p in named}
    after = {n: whole(t) for n, t in checkpoint.model_tensors(state.model).items()}
    if alone is None:
        return None
    if alone.unknown:
        return StepRepeated(report.step, 0, {}, "", {}, alone.unknown)
    of_gradient = gradient_errors(gradients, alone.gradients, CANCELLED_FRAC)
    before = {n: t.clone() for n, t in checkpoint.model_tensors(alone.state.model).items()}
    alone_after = _updated(trainer, alone, gradients)
    of_update = {
        n: _beyond_rounding(after[n], alone_after[n])
        / max(_norm(alone_after[n] - before[n]), 1e-30)
        for n in alone_after
        if n in gradients
    }
    loads = zip(steps.moe.totals(state.loads), steps.moe.totals(alone.state.loads))
    choices = {
        f"choices of layer {i}": (int(a.sum()), int(b.sum())) for i, (a, b) in enumerate(loads)
    }
    loss_nats, n_valid, n_tokens = alone.accumulated
    return StepRepeated(
        step=report.step,
        n_compared=len(gradients),
        errors={
            "loss": relative(report.loss_nats, loss_nats),
            "grad_norm": relative(report.grad_norm, alone.grad_norm),
            "gradient": max(of_gradient.values()),
            "update": worst(of_update.values()),
        },
        worst=max(of_gradient, key=of_gradient.__getitem__),
        counts={
            "valid labels": (report.n_valid_tokens, n_valid),
            "tokens": (report.n_tokens, n_tokens),
            **choices,
        },
        half=rounds_otherwise(trainer, compiled=trainer.cfg.train.compile),
    )


def rounds_otherwise(trainer: Trainer, *, compiled: bool) -> bool:
    """Whether half precision rounds other numbers on the ranks than in one process: the parts of a
    product that a tensor group adds, and what `compiled` blocks fuse, which one process computes
    eagerly. Data ranks have the micro-batches of one process, and their sums are in float32.
    """
    in_parts = trainer.state.ranks.sizes.tensor > 1
    return trainer.cfg.train.dtype != "float32" and (in_parts or compiled)


def _updated(trainer: Trainer, alone: Reference, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters after the optimizer of one process was stepped with the gradients of all ranks."""
    state = alone.state
    for name, parameter in state.model.named_parameters():
        parameter.grad = gradients[plain_name(name)].clone()
    step = trainer.state.step
    declared = {"schedule": state.cfg.schedule, "max_steps": state.cfg.train.max_steps}
    opt.set_lr(state.optimizer, lambda peak: lr_at(step, peak=peak, **declared))
    state.optimizer.step()
    return checkpoint.model_tensors(state.model)


def _beyond_rounding(found: Tensor, wanted: Tensor) -> float:
    """L2 distance of weights without what an update rounds."""
    return max(0.0, _norm(found - wanted) - ROUNDING * _norm(wanted))


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def relative(found: float, wanted: float) -> float:
    """Distance of two numbers, relative to the second."""
    return abs(found - wanted) / max(abs(wanted), 1e-30)
