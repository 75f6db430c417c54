"""Which rule moves which parameter, the optimizers built from it, global-norm clipping, and a probe
that sees whether parameters move.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn

from stackproof.config import AdamW, Muon, Optim
from stackproof.contracts.conditions import ensure, require
from stackproof.train import muon


@dataclass(frozen=True)
class Place:
    """Parameters whose name matches `pattern`: which rule moves them where Muon is chosen,
    and whether they decay.
    """

    pattern: str
    rule: Literal["muon", "adamw"]
    decays: bool
    why: str


PLACES = (
    Place("*norm.weight", "adamw", False, "a gain; decay would pull the whole branch to zero"),
    Place(
        "*.bias",
        "adamw",
        False,
        "an offset has no direction to turn, and decay would move the mean",
    ),
    Place(
        "*.lambda_*",
        "adamw",
        False,
        "a few numbers that set how much of one attention map is taken from the other",
    ),
    Place(
        "*.router.weight",
        "adamw",
        True,
        "its rows are compared by their products, which orthogonalising would make equally large",
    ),
    Place(
        "embed.weight",
        "adamw",
        True,
        "a table: most rows get no gradient in a step, and orthogonalising would move them all",
    ),
    Place("positions.weight", "adamw", True, "a table"),
    Place("head.weight", "adamw", True, "one row per token, as in the embedding"),
    Place("layers.*.weight", "muon", True, "maps features to features"),
)
STATE_FIELDS = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def place_of(name: str) -> Place:
    """The first row that matches a parameter's name.
    Raises KeyError for a name no row matches: nothing is optimised by accident.
    """
    for place in PLACES:
        if fnmatch.fnmatchcase(name, place.pattern):
            return place
    raise KeyError(f"no row of the table of places matches the parameter {name}")


def group_of(name: str, cfg: Optim) -> str:
    """Group of a parameter: `muon`, or AdamW's `decay` and `no-decay`."""
    place = place_of(name)
    if cfg.kind == "muon" and place.rule == "muon":
        return "muon"
    return "decay" if place.decays else "no-decay"


def peak_lrs(cfg: Optim) -> dict[str, float]:
    """Declared peak learning rate by group."""
    match cfg:
        case AdamW():
            return {"decay": cfg.lr, "no-decay": cfg.lr}
        case Muon():
            return {"muon": cfg.lr, "decay": cfg.adamw_lr, "no-decay": cfg.adamw_lr}
    assert_never(cfg)


class Together:
    """Several optimizers as one. They share `state`; each keeps its own groups."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for part in parts:
            part.state = self.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, in order; changing one changes the part's."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One update by every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


Optimizer = torch.optim.Optimizer | Together


@ensure(
    lambda result: sum(len(g["params"]) for g in result.param_groups) > 0, "something is trained"
)
def make_optimizer(model: nn.Module, cfg: Optim) -> Optimizer:
    """The declared optimizer over all trainable parameters, in named groups that know
    their peak learning rate.
    """
    members: dict[str, list[Tensor]] = {name: [] for name in peak_lrs(cfg)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, cfg)].append(parameter)
    groups = {
        name: {
            "name": name,
            "params": members[name],
            "lr": peak,
            "peak_lr": peak,
            "weight_decay": 0.0 if name == "no-decay" else cfg.weight_decay,
        }
        for name, peak in peak_lrs(cfg).items()
    }
    match cfg:
        case AdamW():
            return _adamw(groups, cfg)
        case Muon():
            matrices = muon.Muon(
                [groups["muon"]],
                momentum=cfg.momentum,
                nesterov=cfg.nesterov,
                ns_steps=cfg.ns_steps,
                lr_scale=cfg.lr_scale,
                dtype=cfg.dtype,
            )
            return Together(matrices, _adamw(groups, cfg))
    assert_never(cfg)


def _adamw(groups: dict[str, dict], cfg: Optim) -> torch.optim.AdamW:
    """torch's fused AdamW over the groups `decay` and `no-decay`."""
    chosen = [groups["decay"], groups["no-decay"]]
    return torch.optim.AdamW(
        chosen, lr=chosen[0]["lr"], betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
    )


def state_fields(optimizer: Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Names of the state tensors of every owned parameter."""
    return {
        p: STATE_FIELDS["muon" if g["name"] == "muon" else "adamw"]
        for g in optimizer.param_groups
        for p in g["params"]
    }


def set_lr(optimizer: Optimizer, lr_of_peak: Callable[[float], float]) -> None:
    """Give every group its learning rate of this update: a function of the group's peak."""
    for group in optimizer.param_groups:
        group["lr"] = lr_of_peak(group["peak_lr"])


def group_lrs(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates that the groups hold now, by group."""
    return {g["name"]: g["lr"] for g in optimizer.param_groups}


def gradients(model: nn.Module) -> list[Tensor]:
    """All gradients that exist, in parameter order."""
    return [p.grad for p in model.parameters() if p.grad is not None]


@ensure(lambda result: result.ndim == 0, "the norm is one number")
def global_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together, float32, shape (), on their device."""
    return torch.nn.utils.get_total_norm(grads)


@require(lambda max_norm: max_norm > 0, "the clip norm is positive")
def clip_gradients(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`;
    a smaller one stays as it is.
    """
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))


class ParameterProbe:
    """Compares a few entries of every parameter before and after an update.

    Strided through each tensor, so that rows the batch did not touch cannot
    hide that the others moved.
    """

    ENTRIES = 64

    def __init__(self, model: nn.Module):
        self._views = []
        for p in model.parameters():
            if p.requires_grad:
                flat = p.detach().view(-1)
                self._views.append(flat[:: max(1, flat.numel() // self.ENTRIES)])
        self._before = torch.cat(self._views)
        sizes = torch.tensor([v.numel() for v in self._views])
        self._tensor_of_entry = (
            torch.arange(len(sizes)).repeat_interleave(sizes).to(self._before.device)
        )

    def changed_frac(self) -> Tensor:
        """Share of tensors (0-1) with at least one probed entry that differs from the last call,
        shape (), float64, on their device.
        """
        now = torch.cat(self._views)
        n_changed = torch.zeros(len(self._views), dtype=torch.float64, device=now.device)
        n_changed.index_add_(0, self._tensor_of_entry, (now != self._before).double())
        self._before = now
        # by a number a GPU multiplies with its inverse
        return (n_changed > 0).sum() / torch.full_like(n_changed[0], len(n_changed))
