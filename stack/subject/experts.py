"""The mixture of experts of a run.

Functions are looked up in their module when they are called.
"""

from typing import Any

from torch import Tensor, nn

from stackproof.config import AuxiliaryLoss
from stackproof.contracts.subject import Experts
from stackproof.model import moe
from stackproof.model.build import build_model
from stackproof.subject.run import RunParts


class RunExperts(RunParts, Experts):
    """The experts of a run; its gates are installed only where it has some."""

    def route(self, logits_RE: Tensor, top_k: int, bias_E: Tensor | None) -> tuple:
        return moe.route(logits_RE, top_k, bias_E)

    def dispatch(
        self,
        x_RD: Tensor,
        experts_Rk: Tensor,
        weights_Rk: Tensor,
        experts: nn.ModuleList,
        capacity: int | None,
    ) -> tuple:
        return moe.dispatch(x_RD, experts_Rk, weights_Rk, experts, capacity)

    def balance(self, probs_RE: Tensor, experts_Rk: Tensor) -> Tensor:
        return moe.balance(probs_RE, experts_Rk)

    def update_selection_bias(self, model: nn.Module, loads_LE: Any, rate: float) -> None:
        moe.update_selection_bias(model, loads_LE, rate)

    def layer(self) -> nn.Module:
        return build_model(self.cfg.model, 2, seed=self.cfg.seed).layers[0].ffn

    def model(self, balance_weight: float) -> nn.Module:
        changes = {"balance": AuxiliaryLoss(weight=balance_weight), "capacity_factor": None}
        ffn = self.cfg.model.ffn.model_copy(update=changes)
        cfg = self.cfg.model.model_copy(update={"ffn": ffn, "dropout": 0.0})
        return build_model(cfg, self.vocab_size, seed=self.cfg.seed, device=self.device)
