"""Training state: everything that changes while a run trains, in one object,
and checksums of it.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.data import curriculum
from stackproof.data.data_loader import Batch, DataLoader, model_inputs
from stackproof.data.packing import IGNORE_INDEX
from stackproof.data.prepare import Dataset
from stackproof.distributed.ranks import OneProcess, ProcessGroup, Ranks
from stackproof.distributed.tensors import local_part, whole
from stackproof.evaluate.stopping import NeverStopRule, StopRule, make_stop_rule
from stackproof.model.build import build_model, compile_hidden_states
from stackproof.model.dropout import DropoutStream
from stackproof.model.foreign import plain_name
from stackproof.train import optimizer as opt
from stackproof.train.rng import seed_default_generators, stream_seed

EMA_DECAY = 0.98
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def declared_autocast(cfg: RunConfig, device: torch.device) -> torch.autocast:
    """The compute precision of a run, as a context."""
    dtype = AUTOCAST[cfg.train.dtype]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Drawn:
    """What the data ranks have drawn for a step: window, source and epoch of every row, in the
    order of the sampler (micro-step by micro-step, within it rank by rank), and the valid labels
    and tokens of each data rank. `batches` are those of this rank.
    """

    batches: tuple[Batch, ...]
    rows: tuple[tuple[int, int, int], ...]
    n_valid: tuple[int, ...]
    n_tokens: tuple[int, ...]


@dataclass
class TrainState:
    """Model, optimizer, loss scaler, data loader, stop rule and counters.
    `step` counts finished updates.

    `features` is the forward of the model up to its head, compiled if declared; `loads` holds the
    expert loads of each micro-batch of the last step; `best` holds step and loss of the best
    evaluation; `drawn` is what the ranks have drawn for the latest step. `dropout` holds the masks
    of the run; without it a forward draws its own. `ranks` are the processes of the run, of which
    each holds its part of model and optimizer.
    """

    cfg: RunConfig
    model: nn.Module
    optimizer: opt.Optimizer
    scaler: torch.amp.GradScaler
    data_loader: DataLoader
    stopper: StopRule | NeverStopRule
    probe: opt.ParameterProbe
    device: torch.device
    features: Any
    dropout: DropoutStream | None = None
    ranks: Ranks = field(default_factory=OneProcess)
    loads: list = field(default_factory=list)
    drawn: Drawn | None = None
    step: int = 0
    tokens_seen: int = 0
    ema_loss_nats: float | None = None
    min_ema_loss_nats: float | None = None
    last_val_nats: float | None = None
    best: dict = field(default_factory=dict)
    wall_s: float = 0.0

    def autocast(self) -> torch.autocast:
        """The declared compute precision, as a context."""
        return declared_autocast(self.cfg, self.device)

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step, from the data loader."""
        n_micro_steps = self.cfg.accumulation(self.ranks.sizes.n_data_ranks)
        return [self.data_loader.next_batch() for _ in range(n_micro_steps)]

    def inputs(self, batch: Batch, first: Batch) -> tuple[Any, ...]:
        """A micro-batch of the next step as the arguments of `features`, with the numbers of its
        rows if the model has dropout. `first` is the first micro-batch of the step.
        """
        given = model_inputs(batch, self.device)
        if self.dropout is None or self.cfg.model.dropout == 0:
            return given
        rows = [row - first.cursor_before for row in batch.rows]
        row_B4 = self.dropout.of_rows(self.step + 1, rows).to(self.device, non_blocking=True)
        return *given, *[None] * (3 - len(given)), row_B4

    def drawn_by_all(self, batches: Sequence[Batch]) -> Drawn:
        """What all data ranks have drawn for a step. `batches` are those of this rank; their first
        call in a step is a collective operation.
        """
        if self.drawn is None or [*map(id, self.drawn.batches)] != [*map(id, batches)]:
            self.drawn = self._exchanged(batches)
        return self.drawn

    def _exchanged(self, batches: Sequence[Batch]) -> Drawn:
        counts = (
            sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
        )
        own = [
            number
            for batch in batches
            for row in zip_longest(batch.sample_ids, batch.sources, batch.epochs, fillvalue=0)
            for number in row
        ]
        ranks, n = self.ranks.rows([*counts, *own]), len(own) // len(batches)
        rows = tuple(
            tuple(numbers[i : i + 3])
            for first in range(len(counts), len(counts) + len(own), n)
            for numbers in ranks
            for i in range(first, first + n, 3)
        )
        n_valid, n_tokens = (tuple(numbers[i] for numbers in ranks) for i in range(2))
        return Drawn(tuple(batches), rows, n_valid, n_tokens)

    def update_ema(self, loss_nats: float) -> None:
        """Exponential mean of the training loss (decay 0.98) and its minimum so far."""
        previous, lowest = self.ema_loss_nats, self.min_ema_loss_nats
        self.ema_loss_nats = (
            loss_nats if previous is None else EMA_DECAY * previous + (1 - EMA_DECAY) * loss_nats
        )
        self.min_ema_loss_nats = (
            self.ema_loss_nats if lowest is None else min(self.ema_loss_nats, lowest)
        )


def build_state(
    cfg: RunConfig, dataset: Dataset, device: torch.device, *, cursor: int = 0
) -> TrainState:
    """A fresh state at step 0. Raises ConfigError for impossible sizes."""
    return state_around(
        cfg, dataset.tokenizer.vocab_size, make_data_loader(cfg, dataset, cursor=cursor), device
    )


def state_around(
    cfg: RunConfig, vocab_size: int, data_loader: DataLoader, device: torch.device
) -> TrainState:
    """A fresh state that draws from the given data loader."""
    model = build_model(cfg.model, vocab_size, seed=stream_seed(cfg.seed, "init"), device=device)
    model.train()
    model.activation_checkpointing = cfg.train.activation_checkpointing == "blocks"
    seed_default_generators(cfg.seed)
    return TrainState(
        cfg=cfg,
        model=model,
        optimizer=opt.make_optimizer(model, cfg.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=cfg.train.dtype == "float16"),
        data_loader=data_loader,
        stopper=make_stop_rule(cfg.stop),
        probe=opt.ParameterProbe(model),
        device=device,
        features=compile_hidden_states(model) if cfg.train.compile else model.hidden_states,
        dropout=DropoutStream(stream_seed(cfg.seed, "dropout-masks")),
    )


def divide(state: TrainState, ranks: ProcessGroup) -> None:
    """Divide a fresh state, which every rank has built alike, among the ranks of a run: model,
    optimizer and rows.
    """
    from stackproof.model.parallelize import parallelize

    parallelize(state.model, ranks.mesh, compiled=state.cfg.train.compile)
    state.optimizer = opt.make_optimizer(state.model, state.cfg.optim)
    state.probe = opt.ParameterProbe(state.model, ranks)
    state.features = state.model.hidden_states
    loader = state.data_loader
    loader.rank, loader.world_size = ranks.data_rank, ranks.sizes.n_data_ranks
    loader.rows = state.cfg.micro_batch_rows(loader.world_size)
    state.ranks = ranks


def make_data_loader(cfg: RunConfig, dataset: Dataset, *, cursor: int = 0) -> DataLoader:
    """The data loader of the training split, at a position."""
    seed = stream_seed(cfg.seed, "order")
    return DataLoader(
        dataset.train,
        seq_len=cfg.model.max_seq_len,
        seed=seed,
        rows=cfg.train.micro_batch_size,
        on_exhausted=cfg.data.on_exhausted,
        cursor=cursor,
        sampler=curriculum.run_sampler(cfg, dataset, seed=seed),
    )


# --- the state in memory, read without the code that writes checkpoints ---------------------------


def named_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a training state: `weights.<name>` with persistent buffers,
    `optim.<parameter>.<field>`, `rng.cpu`, `rng.cuda`.

    Gates compare them with what `checkpoint.tensors_of` gives to the writer, so this function
    reads the state_dict of the model and the state of the optimizer itself.
    """
    owners = {p: plain_name(n) for n, p in state.model.named_parameters()}
    for name, tensor in state.model.state_dict().items():
        yield f"weights.{plain_name(name)}", tensor
    for parameter, fields in state.optimizer.state.items():
        for field_name, value in fields.items():
            if isinstance(value, Tensor):
                yield f"optim.{owners[parameter]}.{field_name}", value
    yield "rng.cpu", torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield "rng.cuda", torch.cuda.get_rng_state()


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor as they are in the memory of this rank."""
    return local_part(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def crc32_by_name(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """CRC-32 of each tensor."""
    return {name: zlib.crc32(tensor_bytes(tensor)) for name, tensor in tensors}


def live_crc32(state: TrainState) -> dict[str, int]:
    """CRC-32 of every tensor that a checkpoint must hold, by its name there; divided ones are
    assembled.
    """
    return crc32_by_name((n.removeprefix("weights."), whole(t)) for n, t in named_tensors(state))


def gradient_crc32(model: nn.Module) -> dict[str, int]:
    """CRC-32 of every gradient that exists, by the plain name of its parameter."""
    return crc32_by_name(
        (plain_name(n), p.grad) for n, p in model.named_parameters() if p.grad is not None
    )


def state_checksums(state: TrainState) -> dict[str, Any]:
    """What a read-only section must leave unchanged on this rank: tensors and random state by
    CRC-32, modes, data position, loss scale.
    """
    modes = {f"mode.{n}": m.training for n, m in state.model.named_modules()}
    counters = {
        "cursor": state.data_loader.cursor,
        "scaler": state.scaler.state_dict(),
        "step": state.step,
    }
    return crc32_by_name(named_tensors(state)) | modes | counters


def digest(state: TrainState) -> dict[str, Any]:
    """Every part of a training state but its wall time: tensors as SHA-256, numbers as they are.
    Runs with equal digests continue equally.
    """
    hashes = {n: hashlib.sha256(tensor_bytes(t)).hexdigest() for n, t in named_tensors(state)}
    groups = {
        f"optim.{group['name']}.{key}": value
        for group in state.optimizer.param_groups
        for key, value in group.items()
        if key not in ("params", "name")
    }
    return hashes | groups | counters(state)


def counters(state: TrainState) -> dict[str, Any]:
    """What a training state holds beside tensors and learning rates, but its wall time."""
    numbers = "step tokens_seen ema_loss_nats min_ema_loss_nats last_val_nats best".split()
    parts = {
        "cursor": state.data_loader.cursor,
        "curriculum": state.data_loader.sampler.state_dict(),
        "stopper": state.stopper.state_dict(),
        "scaler": state.scaler.state_dict(),
        "dropout": state.dropout and state.dropout.seed,
    }
    return parts | {name: getattr(state, name) for name in numbers}


def differing(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """Sorted names whose checksums differ, or that are on one side only."""
    return tuple(sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)))
