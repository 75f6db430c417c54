"""Everything that changes while a run goes on, in one object that can be captured and put back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stackproof.config import RunConfig
from stackproof.data import curriculum
from stackproof.data.prepare import Dataset
from stackproof.data.reader import Reader
from stackproof.evaluate.stopping import NeverStopRule, StopRule, make_stop_rule
from stackproof.model.build import build_model, compile_hidden_states
from stackproof.train import optimizer as opt
from stackproof.train.randomness import seed_dropout, stream_seed

EMA_DECAY = 0.98
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def declared_autocast(cfg: RunConfig, device: torch.device) -> torch.autocast:
    """The compute precision of a run, as a context."""
    dtype = AUTOCAST[cfg.train.dtype]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass
class TrainState:
    """Model, optimizer, data position and running statistics. `step` counts finished updates.

    `features` is the model's own, compiled if declared; `loads` holds the expert loads of each
    micro-batch of the last step.
    """

    cfg: RunConfig
    model: nn.Module
    optimizer: opt.Optimizer
    scaler: torch.amp.GradScaler
    reader: Reader
    stopper: StopRule | NeverStopRule
    probe: opt.ParameterProbe
    device: torch.device
    features: Any
    loads: list = field(default_factory=list)
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
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    *,
    rows: int | None = None,
    cursor: int = 0,
) -> TrainState:
    """A fresh state at step 0. `rows` overrides the micro-batch, for gates that shrink the run.

    Raises ConfigError for impossible sizes.
    """
    return state_around(
        cfg,
        dataset.tokenizer.vocab_size,
        make_reader(cfg, dataset, rows=rows, cursor=cursor),
        device,
    )


def state_around(
    cfg: RunConfig, vocab_size: int, reader: Reader, device: torch.device
) -> TrainState:
    """A fresh state that draws from a given reader."""
    model = build_model(cfg.model, vocab_size, seed=stream_seed(cfg.seed, "init"), device=device)
    model.train()
    model.activation_checkpointing = cfg.train.activation_checkpointing == "blocks"
    seed_dropout(cfg.seed)
    return TrainState(
        cfg=cfg,
        model=model,
        optimizer=opt.make_optimizer(model, cfg.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=cfg.train.dtype == "float16"),
        reader=reader,
        stopper=make_stop_rule(cfg.stop),
        probe=opt.ParameterProbe(model),
        device=device,
        features=compile_hidden_states(model) if cfg.train.compile else model.hidden_states,
    )


def make_reader(
    cfg: RunConfig, dataset: Dataset, *, rows: int | None = None, cursor: int = 0
) -> Reader:
    """The reader of the training split at a position."""
    seed = stream_seed(cfg.seed, "order")
    return Reader(
        dataset.train,
        seq_len=cfg.model.max_seq_len,
        seed=seed,
        rows=rows or cfg.train.micro_batch_size,
        on_exhausted=cfg.data.on_exhausted,
        cursor=cursor,
        order=curriculum.run_order(cfg, dataset, seed=seed),
    )
