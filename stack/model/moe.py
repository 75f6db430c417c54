"""Mixture of experts.

R tokens of a micro-batch in row-major order, D d_model, E experts, k choices per token, L layers
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stackproof.config import MixtureOfExperts as Declared
from stackproof.config import ModelConfig
from stackproof.model.forward_context import ExpertLoad, ForwardContext
from stackproof.model.init import Linear


def route(
    logits_RE: Tensor, top_k: int, selection_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of each token (R, k) int64, their weights (R, k) and all probabilities (R, E).

    The highest probabilities are chosen, ties by the lower id; `selection_bias_E` is added for the
    choice and never enters a weight. Weights are the chosen probabilities over their sum; with one
    choice, the probability itself. Weights and probabilities are float32 or wider.
    """
    probs_RE = logits_RE.softmax(-1, dtype=torch.promote_types(logits_RE.dtype, torch.float32))
    scores_RE = (
        probs_RE.detach() if selection_bias_E is None else probs_RE.detach() + selection_bias_E
    )
    experts_Rk = scores_RE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_Rk = probs_RE.gather(1, experts_Rk)
    return (
        experts_Rk,
        weights_Rk / weights_Rk.sum(-1, keepdim=True) if top_k > 1 else weights_Rk,
        probs_RE,
    )


def balance(probs_RE: Tensor, experts_Rk: Tensor, row_R: Tensor | None = None) -> Tensor:
    """E · Σ (share of all choices of e)·(mean probability of e), shape (): 1 when even.

    Taken row by row and averaged over tokens, so that the sum over a step does not depend on how
    its rows are split into micro-batches. Source: arXiv:2101.03961, eq. 4.
    """
    n_experts, k = probs_RE.shape[1], experts_Rk.shape[1]
    row_R = torch.zeros_like(experts_Rk[:, 0]) if row_R is None else row_R
    n_rows = int(row_R.max()) + 1
    chosen_BE = torch.bincount(
        (row_R[:, None] * n_experts + experts_Rk).flatten(), minlength=n_rows * n_experts
    ).view(n_rows, n_experts)
    total_BE = torch.zeros(
        n_rows, n_experts, dtype=probs_RE.dtype, device=probs_RE.device
    ).index_add(0, row_R, probs_RE)
    tokens_B1 = torch.bincount(row_R, minlength=n_rows)[:, None].clamp(min=1)
    return n_experts * (chosen_BE / (k * tokens_B1) * total_BE).sum() / len(row_R)


def dispatch(
    x_RD: Tensor,
    experts_Rk: Tensor,
    weights_Rk: Tensor,
    experts: Sequence[nn.Module],
    capacity: int | None = None,
    row_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weight·expert(token) over the experts of each token.

    Returns (y_RD, tokens each expert took (E,), dropped choices ()). Each expert runs once on the
    tokens that chose it. Beyond `capacity` tokens of a row it drops that row's later ones, which
    add nothing: no row depends on another, and no token on a later one.
    """
    k, choice_C = experts_Rk.shape[1], experts_Rk.flatten()
    load_E = torch.bincount(choice_C, minlength=len(experts))
    order_C = choice_C.sort(dim=0, stable=True).indices
    kept_E = load_E
    if capacity is not None:
        row_C = torch.zeros_like(choice_C) if row_R is None else row_R.repeat_interleave(k)
        order_C = order_C[_place_in_group(choice_C[order_C], row_C[order_C]) < capacity]
        kept_E = torch.bincount(choice_C[order_C], minlength=len(experts))
    y_RD, weight_C = torch.zeros_like(x_RD), weights_Rk.flatten().to(x_RD.dtype)
    for expert, taken in zip(experts, order_C.split(kept_E.tolist())):
        y_RD = y_RD.index_add(
            0, taken // k, (expert(x_RD[taken // k]) * weight_C[taken][:, None]).to(x_RD.dtype)
        )
    return y_RD, kept_E, (load_E - kept_E).sum()


def _place_in_group(expert_C: Tensor, row_C: Tensor) -> Tensor:
    """How many choices of the same expert and row precede each one, (C,); input is grouped."""
    index_C = torch.arange(len(expert_C), device=expert_C.device)
    begins_C = torch.ones_like(expert_C, dtype=torch.bool)
    begins_C[1:] = (expert_C[1:] != expert_C[:-1]) | (row_C[1:] != row_C[:-1])
    return index_C - (index_C * begins_C).cummax(0).values


class MixtureOfExperts(nn.Module):
    """A router without bias and `n_experts` feed-forwards.

    `selection_bias` (E,) is a buffer that no gradient reaches.
    """

    def __init__(self, cfg: ModelConfig, declared: Declared, experts: Sequence[nn.Module]):
        super().__init__()
        self.top_k, self.capacity_factor = declared.top_k, declared.capacity_factor
        self.router = Linear(cfg.d_model, declared.n_experts, bias=False)
        self.experts = nn.ModuleList(experts)
        self.register_buffer(
            "selection_bias",
            torch.zeros(declared.n_experts) if declared.balance.kind == "selection-bias" else None,
        )

    def forward(self, x_BTD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Same shape and dtype as `x_BTD`; adds its load to `context`."""
        inside_BT = None if context is None else context.inside_BT
        if inside_BT is None:
            inside_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        row_R = inside_BT.nonzero()[:, 0]
        x_RD = x_BTD[inside_BT]
        experts_Rk, weights_Rk, probs_RE = route(self.router(x_RD), self.top_k, self.selection_bias)
        capacity = self.capacity(x_BTD.shape[1] if context is None else context.row_tokens)
        y_RD, _, dropped = dispatch(x_RD, experts_Rk, weights_Rk, self.experts, capacity, row_R)
        if context is not None:
            chosen_E = torch.bincount(experts_Rk.flatten(), minlength=len(self.experts))
            context.loads.append(
                ExpertLoad(balance(probs_RE, experts_Rk, row_R) * len(x_RD), chosen_E, dropped)
            )
        return torch.zeros_like(x_BTD).masked_scatter(inside_BT[..., None], y_RD)

    def capacity(self, n_tokens: int) -> int | None:
        """Tokens of a row of `n_tokens` that an expert takes in training; None: no limit."""
        if self.capacity_factor is None or not self.training:
            return None
        return math.ceil(self.capacity_factor * n_tokens * self.top_k / len(self.experts))


def totals(loads: Sequence[Sequence[ExpertLoad]]) -> list[Tensor]:
    """Choices per expert (E,) of each layer, over all micro-batches of a step."""
    return [torch.stack([load.load_E for load in layer]).sum(0) for layer in zip(*loads)]


def dropped_fracs(loads: Sequence[Sequence[ExpertLoad]]) -> Tensor:
    """Share of the choices of each layer that found no room, over all micro-batches of a step:
    (L,), empty without experts.
    """
    fracs = [
        sum(load.dropped for load in layer) / chosen_E.sum()
        for layer, chosen_E in zip(zip(*loads), totals(loads))
    ]
    return torch.stack(fracs) if fracs else torch.zeros(0)


def add_over_ranks(loads: Sequence[Sequence[ExpertLoad]], add: Callable[[Tensor], Tensor]) -> None:
    """Replace the choices per expert, and the dropped ones, by their sums over the data ranks,
    which `add` computes.
    """
    counts = [n for layers in loads for load in layers for n in (load.load_E, load.dropped[None])]
    if counts:
        for count, total in zip(counts, add(torch.cat(counts)).split([len(n) for n in counts])):
            count.copy_(total)


@torch.no_grad()
def update_selection_bias(model: nn.Module, loads_LE: Sequence[Tensor], rate: float) -> None:
    """Move each expert's selection bias by `rate` against its load, layer by layer.

    Once per optimizer step, with the loads of all its micro-batches. Source: arXiv:2408.15664,
    algorithm 1.
    """
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    for layer, load_E in zip(layers, loads_LE, strict=True):
        load_E = load_E.to(layer.selection_bias)
        layer.selection_bias += rate * (load_E.mean() - load_E).sign()
