"""The model and the experts of a run."""

from functools import cached_property

from torch import nn

from stackproof.contracts.subject import Experts, Model
from stackproof.model.build import build_model
from stackproof.model.transformer import Transformer
from stackproof.subject.run import RunParts
from stackproof.train.rng import stream_seed


class RunModel(RunParts, Model):
    """TODO"""

    @cached_property
    def module(self) -> Transformer:
        seed = stream_seed(self.cfg.seed, "init")
        return build_model(self.cfg.model, self.vocab_size, seed=seed, device=self.device)

    @property
    def embedding(self) -> nn.Module:
        return self.module.embed

    @property
    def max_length(self) -> int:
        return self.cfg.model.max_seq_len


class RunExperts(RunParts, Experts):
    """TODO"""
