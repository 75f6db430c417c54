"""The parts of a run that every part of its subject is made from, and the small runs that gates
judge in its place.
"""

from dataclasses import dataclass

import torch

from stackproof.config import RunConfig
from stackproof.contracts.subject import TraineeOptions
from stackproof.data.prepare import Dataset
from stackproof.model.build import build_model
from stackproof.model.transformer import Transformer
from stackproof.train.rng import stream_seed
from stackproof.train.state import TrainState, build_state


@dataclass(frozen=True)
class RunParts:
    """Configuration, data set and device of a run."""

    cfg: RunConfig
    dataset: Dataset
    device: torch.device

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size

    def fresh_model(self, **changes: object) -> Transformer:
        """A model of the run at step 0, on its device; `changes` are of its `model` section."""
        cfg, seed = self.cfg.model.model_copy(update=changes), stream_seed(self.cfg.seed, "init")
        return build_model(cfg, self.vocab_size, seed=seed, device=self.device)

    def build(self, options: TraineeOptions = TraineeOptions()) -> TrainState:
        """A fresh state of the run with few rows."""
        cfg = small_run(self.cfg, options)
        state = build_state(cfg, self.dataset, self.device, cursor=options.first_row)
        state.step = options.updates_done
        if (scale := options.loss_scale) is not None:
            state.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=True)
        return state


def wrapping(cfg: RunConfig) -> RunConfig:
    """The run with a data loader that begins again where the corpus ends."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})})


def small_run(cfg: RunConfig, options: TraineeOptions = TraineeOptions()) -> RunConfig:
    """The run with at most 2 rows and 2 micro-batches, eager, wrapping; model, length, dtype and
    dropout stay. A tiny one has one row, and a model of a few hundred parameters.
    """
    model, optim = cfg.model, cfg.optim
    rows, accumulation = min(cfg.train.micro_batch_size, 2), min(cfg.accumulation(), 2)
    if options.tiny:
        sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        sizes |= {"d_ff": 16, "max_seq_len": min(16, model.max_seq_len)}
        model, rows, accumulation = model.model_copy(update=sizes), 1, 1
    tokens = rows * model.max_seq_len * accumulation
    train = {"micro_batch_size": rows, "tokens_per_step": tokens, "compile": False}
    if options.exact:
        train, optim = train | {"dtype": "float32"}, optim.in_float32()
    if (norm := options.max_grad_norm) is not None:
        optim = optim.model_copy(update={"max_grad_norm": norm})
    changes = {"model": model, "optim": optim, "seed": cfg.seed + options.seed_offset}
    return wrapping(cfg).model_copy(update=changes | {"train": cfg.train.model_copy(update=train)})
