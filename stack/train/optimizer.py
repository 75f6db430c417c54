"""AdamW with declared groups, global-norm clipping, and a probe that sees whether parameters move."""

import torch
from torch import Tensor, nn

from contracts.conditions import ensure, require
from stack.config import AdamW


def decays(name: str, parameter: Tensor) -> bool:
    """The declared rule: matrices decay, vectors (norm gains) do not."""
    return parameter.ndim >= 2


@ensure(lambda result, model: sum(len(g["params"]) for g in result.param_groups) > 0, "something is trained")
def make_optimizer(model: nn.Module, cfg: AdamW) -> torch.optim.AdamW:
    """torch's fused AdamW over all trainable parameters, in the groups `decay` and `no-decay`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for n, p in named if decays(n, p)], "weight_decay": cfg.weight_decay},
        {"name": "no-decay", "params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of this update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients(model: nn.Module) -> list[Tensor]:
    """All gradients that exist, in parameter order."""
    return [p.grad for p in model.parameters() if p.grad is not None]


@ensure(lambda result: result.ndim == 0, "the norm is one number")
def global_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together, float32, shape (), on their device."""
    return torch.nn.utils.get_total_norm(grads)


@require(lambda max_norm: max_norm > 0, "the clip norm is positive")
def clip_gradients(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`; a smaller one stays as it is."""
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))


class ParameterProbe:
    """Compares a few entries of every parameter before and after an update.

    Strided through each tensor, so that rows the batch did not touch cannot hide that the others moved.
    """

    ENTRIES = 64

    def __init__(self, model: nn.Module):
        self._views = []
        for p in model.parameters():
            if p.requires_grad:
                flat = p.detach().view(-1)
                self._views.append(flat[:: max(1, flat.numel() // self.ENTRIES)])
        self._sizes = [v.numel() for v in self._views]
        self._before = torch.cat(self._views)

    def changed_frac(self) -> float:
        """Share of tensors (0-1) with at least one probed entry that differs from the last call."""
        now = torch.cat(self._views)
        moved = [bool(part.any()) for part in (now != self._before).cpu().split(self._sizes)]
        self._before = now
        return sum(moved) / len(moved)
