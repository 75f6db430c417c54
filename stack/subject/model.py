"""The model of a run."""

from functools import cached_property

from torch import nn

from stackproof.contracts.subject import Model
from stackproof.model.build import build_model
from stackproof.subject.run import RunParts
from stackproof.train.rng import stream_seed


class RunModel(RunParts, Model):
    """TODO: the parts that the gates of model judge."""

    @cached_property
    def module(self) -> nn.Module:
        return self.fresh()

    @property
    def max_length(self) -> int:
        return self.cfg.model.max_seq_len

    def fresh(self) -> nn.Module:
        seed = stream_seed(self.cfg.seed, "init")
        return build_model(self.cfg.model, self.vocab_size, seed=seed, device=self.device)

    def small(self, n_layers: int, dropout: float) -> nn.Module:
        changes = {"n_layers": n_layers, "dropout": max(self.cfg.model.dropout, dropout)}
        cfg = self.cfg.model.model_copy(update=changes)
        return build_model(cfg, self.vocab_size, seed=self.cfg.seed, device=self.device)
