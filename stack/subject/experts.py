"""The mixture of experts of a run."""

from types import ModuleType

from torch import nn

from stackproof.config import AuxiliaryLoss
from stackproof.contracts.subject import Experts
from stackproof.model import moe
from stackproof.model.build import build_model
from stackproof.subject.run import RunParts


class RunExperts(RunParts, Experts):
    """The experts of a run; its gates are installed only where it has some."""

    @property
    def functions(self) -> ModuleType:
        return moe

    def layer(self) -> nn.Module:
        return build_model(self.cfg.model, 2, seed=self.cfg.seed).layers[0].ffn

    def model(self, balance_weight: float) -> nn.Module:
        changes = {"balance": AuxiliaryLoss(weight=balance_weight), "capacity_factor": None}
        ffn = self.cfg.model.ffn.model_copy(update=changes)
        cfg = self.cfg.model.model_copy(update={"ffn": ffn, "dropout": 0.0})
        return build_model(cfg, self.vocab_size, seed=self.cfg.seed, device=self.device)
