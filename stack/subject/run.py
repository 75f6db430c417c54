"""The parts of a run that every part of its subject is made from."""

from dataclasses import dataclass

import torch

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset


@dataclass(frozen=True)
class RunParts:
    """Configuration, data set and device of a run."""

    cfg: RunConfig
    dataset: Dataset
    device: torch.device

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size


def shrunk(cfg: RunConfig) -> RunConfig:
    """The run in small: at most 2 rows and 2 micro-steps, eager, wrapping; model, length,
    dtype and dropout stay.
    """
    rows, accumulation = min(cfg.train.micro_batch_size, 2), min(cfg.accumulation(), 2)
    train = cfg.train.model_copy(
        update={
            "micro_batch_size": rows,
            "tokens_per_step": rows * cfg.model.max_seq_len * accumulation,
            "compile": False,
        }
    )
    return wrapping(cfg.model_copy(update={"train": train}))


def wrapping(cfg: RunConfig) -> RunConfig:
    """The run with a data loader that begins again where the corpus ends."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})})
