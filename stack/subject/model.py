"""The model of a run."""

from functools import cached_property

from torch import nn

from stackproof.contracts.subject import Model
from stackproof.model.build import build_model
from stackproof.subject.run import RunParts
from stackproof.train.rng import stream_seed

SMALL_LAYERS, SMALL_SEED = 2, 51


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

    def small(self, dropout: float) -> nn.Module:
        model = self.cfg.model
        changes = {
            "n_layers": min(model.n_layers, SMALL_LAYERS),
            "dropout": max(model.dropout, dropout),
        }
        cfg = model.model_copy(update=changes)
        return build_model(cfg, self.vocab_size, seed=SMALL_SEED, device=self.device)
