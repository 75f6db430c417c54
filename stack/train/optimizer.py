"""Parameter groups, the optimizers over them, gradient clipping,
and a check that parameters change.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stackproof.config import optim as declared
from stackproof.config.optim import Optim
from stackproof.contracts.conditions import ensure, require
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.distributed.tensors import holders_of_each, is_divided, local_part, part_like, whole

# --- which parameter is in which group ------------------------------------------------------------


@dataclass(frozen=True)
class ParamGroupRule:
    """Parameters whose name matches `pattern` belong to the first of
    `groups` that the optimizer has.
    """

    pattern: str
    groups: tuple[str, ...]
    why: str


PARAM_GROUP_RULES = (
    ParamGroupRule(
        "*norm.weight", ("no-decay",), "a gain; decay would pull the whole branch to zero"
    ),
    ParamGroupRule(
        "*.bias", ("no-decay",), "an offset has no direction to turn, and decay would move the mean"
    ),
    ParamGroupRule(
        "*.lambda_*", ("no-decay",), "a few numbers that weight one attention map against the other"
    ),
    ParamGroupRule(
        "*.router.weight",
        ("decay",),
        "its rows compete; orthogonalising would make them equally large",
    ),
    ParamGroupRule(
        "embed.weight",
        ("decay",),
        "a table: most rows get no gradient, orthogonalising would move them all",
    ),
    ParamGroupRule("positions.weight", ("decay",), "a table"),
    ParamGroupRule("head.weight", ("decay",), "one row per token, as in the embedding"),
    ParamGroupRule("layers.*.weight", ("muon", "decay"), "maps features to features"),
)


def rule_for(name: str) -> ParamGroupRule:
    """The first rule that matches a parameter's name.
    Raises KeyError for a name that no rule matches.
    """
    for rule in PARAM_GROUP_RULES:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise KeyError(
        f"no row of PARAM_GROUP_RULES in stack/train/optimizer.py matches the parameter {name}"
    )


def group_of(name: str, cfg: Optim) -> str:
    """Group of a parameter: `muon` if the optimizer has that group, else `decay` or `no-decay`."""
    groups = cfg.peak_lrs()
    return next(group for group in rule_for(name).groups if group in groups)


# --- Muon -----------------------------------------------------------------------------------------

# a + b·s² + c·s⁴ times s, applied to each singular value: steep at zero,
# and within 0.3 of one after five times.
QUINTIC = (3.4445, -4.7750, 2.0315)
NORM_MIN = 1e-7


@require(lambda x_NAB: x_NAB.ndim == 3, "a stack of matrices")
@ensure(lambda result, x_NAB: result.shape == x_NAB.shape, "orthogonalising keeps the shape")
def orthogonalise(x_NAB: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """N matrices of A rows and B columns, singular vectors kept,
    singular values pushed into about 0.7 … 1.2, in `dtype`.

    Newton-Schulz: only matrix products, which a GPU computes in bfloat16. In float32 it agrees with
    float64 to five digits, in bfloat16 to two. Source: Keller Jordan, Muon: an optimizer for hidden
    layers in neural networks, 2024.
    """
    a, b, c = QUINTIC
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    x = x_NAB.mT if tall else x_NAB
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=NORM_MIN)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def shape_factor(rows: int, columns: int, lr_scale: str) -> float:
    """Learning rate factor of a matrix: `match-rms-adamw` (arXiv:2502.16982, sec.
    2.2) or `original`.
    """
    match lr_scale:
        case "match-rms-adamw":
            return 0.2 * max(rows, columns) ** 0.5
        case "original":
            return max(1.0, rows / columns) ** 0.5
    raise AssertionError(f"lr_scale is {lr_scale}")


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, decoupled decay.
    Matrices of one shape that are divided alike are computed together.

    torch.optim.Muon is the same rule, in bfloat16 and for one matrix at a time: 20 times slower on
    a CPU without bfloat16 units.
    """

    SETTINGS = ("momentum", "nesterov", "ns_steps", "lr_scale", "dtype")

    def __init__(self, groups: Iterable[dict[str, Any]], cfg: declared.Muon):
        super().__init__(groups, {name: getattr(cfg, name) for name in self.SETTINGS})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    layout = parameter.placements if is_divided(parameter) else ()
                    alike[parameter.shape, layout].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _momentum(self, parameter: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[parameter]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return self.state[parameter]["momentum_buffer"]

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        means = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = (
            torch._foreach_lerp(gradients, means, group["momentum"]) if group["nesterov"] else means
        )
        dtype = getattr(torch, group["dtype"])
        # Every rank turns whole matrices, gathered at once, and keeps its part of each.
        matrices_NAB = torch.stack(ahead)
        turned_NAB = orthogonalise(whole(matrices_NAB), steps=group["ns_steps"], dtype=dtype)
        turned_NAB = part_like(matrices_NAB, turned_NAB.to(parameters[0].dtype))
        lr = group["lr"] * shape_factor(*parameters[0].shape, group["lr_scale"])
        parts = [local_part(p) for p in parameters]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, local_part(turned_NAB).unbind(), alpha=-lr)


# --- the table of optimizers ----------------------------------------------------------------------

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class UpdateRule:
    """An optimizer class: how it is built over some groups, and the state tensors
    that it keeps per parameter.
    """

    optimizer: type[torch.optim.Optimizer]
    state_fields: tuple[str, ...]
    make: Callable[[Groups, Any], torch.optim.Optimizer]


def _adamw(groups: Groups, cfg: Optim) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        groups, lr=groups[0]["lr"], betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
    )
    optimizer._init_group = partial(_local_parts, optimizer._init_group)
    return optimizer


def _local_parts(init_group: Callable[..., bool], group: dict, *lists: list[Tensor]) -> bool:
    """The tensors of an update, of divided ones this rank's part: the rule is that of single
    entries, and DTensor would dispatch each tensor.
    """
    has_complex = init_group(group, *lists)
    for tensors in lists:
        tensors[:] = map(local_part, tensors)
    return has_complex


ADAMW = UpdateRule(torch.optim.AdamW, ("step", "exp_avg", "exp_avg_sq"), _adamw)
MUON = UpdateRule(Muon, ("momentum_buffer",), Muon)
# By configuration class: the rule of each group.
# Peak rates and bytes of state are declared by the class, in stack/config/optim.py.
OPTIMIZERS: dict[type, dict[str, UpdateRule]] = {
    declared.AdamW: {"decay": ADAMW, "no-decay": ADAMW},
    declared.Muon: {"muon": MUON, "decay": ADAMW, "no-decay": ADAMW},
}


class ChainedOptimizer:
    """Several optimizers as one. They share `state`; each keeps its own groups."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for part in parts:
            part.state = self.state

    @property
    def param_groups(self) -> Groups:
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

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call `hook` after every update of all parts."""
        return self.parts[-1].register_step_post_hook(hook)


Optimizer = torch.optim.Optimizer | ChainedOptimizer


@ensure(
    lambda result: sum(len(g["params"]) for g in result.param_groups) > 0, "something is trained"
)
def make_optimizer(model: nn.Module, cfg: Optim) -> Optimizer:
    """The declared optimizer over all trainable parameters, in groups with a name and a peak
    learning rate.
    """
    members: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, cfg)].append(parameter)
    by_rule: dict[UpdateRule, Groups] = defaultdict(list)
    for name, peak in cfg.peak_lrs().items():
        decay = 0.0 if name == "no-decay" else cfg.weight_decay
        group = {
            "name": name,
            "params": members[name],
            "lr": peak,
            "peak_lr": peak,
            "weight_decay": decay,
        }
        by_rule[OPTIMIZERS[type(cfg)][name]].append(group)
    parts = [rule.make(groups, cfg) for rule, groups in by_rule.items()]
    return parts[0] if len(parts) == 1 else ChainedOptimizer(*parts)


def state_fields(optimizer: Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Names of the state tensors of every owned parameter."""
    fields = {
        rule.optimizer: rule.state_fields
        for rules in OPTIMIZERS.values()
        for rule in rules.values()
    }
    parts = getattr(optimizer, "parts", (optimizer,))
    return {p: fields[type(part)] for part in parts for g in part.param_groups for p in g["params"]}


def set_lr(optimizer: Optimizer, lr_of_peak: Callable[[float], float]) -> None:
    """Give every group its learning rate of this update: a function of the group's peak."""
    for group in optimizer.param_groups:
        group["lr"] = lr_of_peak(group["peak_lr"])


def group_lrs(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates that the groups hold now, by group."""
    return {g["name"]: g["lr"] for g in optimizer.param_groups}


# --- gradients and parameters ---------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    """All gradients that exist, in parameter order."""
    return [p.grad for p in model.parameters() if p.grad is not None]


@ensure(lambda result: result.ndim == 0, "the norm is one number")
def global_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together, and over all parts of divided ones, shape (), in their
    dtype and on their device.
    """
    if not any(is_divided(g) for g in grads):
        return torch.nn.utils.get_total_norm(grads)
    # One reduction for all mesh dimensions. DTensor makes one for each, and dispatches each tensor.
    norms_N = torch.stack(torch._foreach_norm([local_part(g) for g in grads]))
    holders_N = torch.tensor(holders_of_each(grads), device=norms_N.device)
    total = (norms_N.double().square() / holders_N).sum()
    torch.distributed.all_reduce(total)
    return total.sqrt().to(norms_N.dtype)


@require(lambda max_norm: max_norm > 0, "the clip norm is positive")
def clip_gradients(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`;
    a smaller one stays as it is.
    """
    parts = [local_part(g) for g in grads]
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))


class ParameterProbe:
    """Compares a few entries of every parameter before and after an update: of a divided one, of
    the part of each rank.

    The entries are strided through each tensor: rows that a batch did not touch
    cannot hide that others moved.
    """

    ENTRIES = 64

    def __init__(self, model: nn.Module, ranks: Ranks = ONE_PROCESS):
        self._views, self._ranks = [], ranks
        for p in model.parameters():
            if p.requires_grad:
                flat = local_part(p.detach()).view(-1)
                self._views.append(flat[:: max(1, flat.numel() // self.ENTRIES)])
        self._before = torch.cat(self._views)
        sizes = torch.tensor([v.numel() for v in self._views])
        self._tensor_of_entry = (
            torch.arange(len(sizes)).repeat_interleave(sizes).to(self._before.device)
        )

    def changed_frac(self) -> Tensor:
        """Share of tensors (0-1) with a probed entry that differs from the last call, on any rank,
        shape (), float64, on their device.
        """
        now = torch.cat(self._views)
        n_changed = torch.zeros(len(self._views), dtype=torch.float64, device=now.device)
        n_changed.index_add_(0, self._tensor_of_entry, (now != self._before).double())
        self._before = now
        n_changed = self._ranks.maximum(n_changed)
        # Divide by a tensor: a GPU multiplies with the inverse of a Python number,
        # and all would not be exactly 1.
        return (n_changed > 0).sum() / torch.full_like(n_changed[0], len(n_changed))
