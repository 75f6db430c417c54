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
