"""Gates of the parts of a mixture of experts: tokens reach the experts they chose, and balance is
rewarded as declared. Those of its choices in a run are in `expert_choices`.

R tokens, D d_model, E experts, k top_k, L layers with experts, T tokens of a row
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import (
    Verdict,
    decide,
    decide_all,
    decides,
    least,
    not_run,
    worst,
)
from stackproof.contracts.oracle import (
    Routed,
    balance_of,
    choices,
    oracle_experts,
    oracle_reading,
    room,
)
from stackproof.contracts.subject import ExpertFunctions, MicroBatch, Subject

TOKENS = 96
# at most, of a row that passes the whole model; rows of an update with accumulation
ROW_TOKENS, ROWS_OF_UPDATE = 64, 4


def no_experts(a: Mapping[str, Any]) -> str:
    """Why there is nothing to judge in a model without experts; empty if there is."""
    return (
        ""
        if a["ffn"]["kind"] == "moe"
        else f"model.ffn.kind is {a['ffn']['kind']}: there are no experts"
    )


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- routing and dispatch -------------------------------------------------------------------------


@decides("moe.dispatch-parity")
@torch.no_grad()
def dispatch_parity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Choices, weights, outputs and counts equal those of a loop over tokens in float64, with and
    without room for all of them.
    """
    architecture, experts = subject.declared.architecture, subject.experts
    if reason := no_experts(architecture):
        return not_run(reason)
    declared, layer = architecture["ffn"], experts.layer().double()
    weights = {
        n: w + 0.05 * _noise(*w.shape, seed=i)
        for i, (n, w) in enumerate(layer.state_dict().items())
    }
    layer.load_state_dict(weights)
    weight_error, sum_error, swapped = _routing_faults(
        experts.functions.route, declared["n_experts"]
    )
    found = [
        _dispatch_faults(experts.functions.dispatch, layer.experts, weights, architecture, capacity)
        for capacity in (None, room(declared | {"capacity_factor": 0.5}, TOKENS), 1)
    ]
    error, miscounted = worst(e for e, _ in found), sum(m for _, m in found)
    layer_error = _layer_error(layer, weights, architecture)
    most = limits.rel_error_max
    return decide_all(
        [
            swapped > 0
            and (
                f"{swapped} tokens are sent to other experts than those of the highest scores, the "
                "lower of equals first"
            ),
            not weight_error <= most and "weights are not the declared ones",
            not sum_error <= most and "weights of a token do not sum to 1",
            not error <= most and "sparse dispatch differs from a loop over tokens",
            miscounted > 0 and "tokens taken and dropped are miscounted",
            not layer_error <= most and "the run's own layer differs from a loop over tokens",
        ],
        rel_error=error,
        layer_rel_error=layer_error,
        weight_error=weight_error,
        sum_error=sum_error,
        swapped=swapped,
    )


def _routing_faults(route: Callable, n_experts: int) -> tuple[float, float, int]:
    """(largest error of a weight, of a token's sum of weights, tokens sent elsewhere), with ties,
    with and without a bias.
    """
    weight_error, sum_error, swapped = 0.0, 0.0, 0
    smooth_RE, tied_RE = (
        2 * _noise(TOKENS, n_experts, seed=21),
        _noise(TOKENS, n_experts, seed=22).round(),
    )
    bias_E = (_noise(n_experts, seed=23) / n_experts).round(decimals=1)
    for logits_RE in (smooth_RE, tied_RE):
        for bias in (None, torch.zeros_like(bias_E), bias_E):
            for top_k in (
                range(1, n_experts + 1) if n_experts <= 8 else (1, 2, n_experts // 2, n_experts)
            ):
                experts_Rk, weights_Rk, probs_RE = route(logits_RE, top_k, bias)
                wanted_Rk, shares_Rk, _ = choices(logits_RE.softmax(-1), top_k, bias)
                swapped += int((experts_Rk.sort().values != wanted_Rk.sort().values).any(-1).sum())
                errors = _spread(experts_Rk, weights_Rk, n_experts) - _spread(
                    wanted_Rk, shares_Rk, n_experts
                )
                weight_error = worst(
                    (
                        weight_error,
                        float(errors.abs().max()),
                        float((probs_RE - logits_RE.softmax(-1)).abs().max()),
                    )
                )
                if top_k > 1:
                    sum_error = worst((sum_error, float((weights_Rk.sum(-1) - 1).abs().max())))
    return weight_error, sum_error, swapped


def _spread(experts_Rk: Tensor, weights_Rk: Tensor, n_experts: int) -> Tensor:
    """Weight of every expert for every token, (R, E)."""
    return torch.zeros(len(experts_Rk), n_experts, dtype=torch.float64).scatter_add(
        1, experts_Rk, weights_Rk.double()
    )


def _dispatch_faults(
    dispatch: Callable,
    experts: nn.ModuleList,
    weights: Mapping[str, Tensor],
    a: Mapping[str, Any],
    capacity: int | None,
) -> tuple[float, bool]:
    """(relative error of the outputs, whether tokens taken or dropped are miscounted) of
    choices that are far from even.
    """
    x_RD = 3 * _noise(TOKENS, a["d_model"], seed=24)
    wanted = oracle_experts(x_RD, weights, a["ffn"], capacity)
    y_RD, load_E, dropped = dispatch(x_RD, wanted.experts_Rk, wanted.weights_Rk, experts, capacity)
    accounted = int(load_E.sum()) + int(dropped) == TOKENS * a["ffn"]["top_k"]
    same = torch.equal(load_E.cpu().long(), wanted.load_E) and int(dropped) == wanted.dropped
    return _rel(y_RD, wanted), not (accounted and same)


def _rel(y: Tensor, wanted: Routed) -> float:
    return float((y.double().reshape(wanted.y_RD.shape) - wanted.y_RD).norm() / wanted.y_RD.norm())


def _layer_error(layer: nn.Module, weights: Mapping[str, Tensor], a: Mapping[str, Any]) -> float:
    """Worse relative error of the whole layer: in training, where each row has its declared
    capacity, and in evaluation.
    """
    x_BTD = 3 * _noise(4, TOKENS // 4, a["d_model"], seed=25)
    x_RD, y_BTD = x_BTD.flatten(0, 1), layer.train()(x_BTD)
    capacity = room(a["ffn"], TOKENS // 4)
    training = worst(
        _rel(y_BTD[b], oracle_experts(x_BTD[b], weights, a["ffn"], capacity)) for b in range(4)
    )
    return worst((training, _rel(layer.eval()(x_BTD), oracle_experts(x_RD, weights, a["ffn"]))))


# --- balance --------------------------------------------------------------------------------------


@decides("moe.balance")
def balance(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The declared kind of balance acts as declared, once per update whatever the accumulation."""
    architecture = subject.declared.architecture
    if reason := no_experts(architecture):
        return not_run(reason)
    match architecture["ffn"]["balance"]["kind"]:
        case "auxiliary-loss":
            return _balance_term(limits, subject)
        case "selection-bias":
            return _selection_bias(limits, subject)
        case kind:
            return not_run(f"model.ffn.balance.kind is {kind}, which this gate has no rule for")


def _balance_term(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The balance term follows its formula, is 1 when even and more when not, and enters the loss
    with its weight, once per update.
    """
    declared, balance = subject.declared.architecture["ffn"], subject.experts.functions.balance
    n_experts, top_k = declared["n_experts"], declared["top_k"]
    formula_error = worst(_formula_error(balance, n_experts, k) for k in {1, 2, top_k})
    even_error = abs(float(balance(*_assigned([1] * n_experts, 0.5))) - 1)
    excess = least(
        float(balance(*_assigned(counts, sure))) - 1
        for counts in _uneven(n_experts)
        for sure in (0.2, 0.5, 1.0)
    )
    entry_error = _entry_error(subject)
    return decide_all(
        [
            not formula_error <= limits.formula_rel_error_max
            and "the balance term differs from its formula",
            not even_error <= limits.even_error_max
            and "the balance term of an even assignment is not 1",
            not excess >= limits.uneven_excess_min
            and "an uneven assignment costs no more than an even one",
            not entry_error <= limits.entry_rel_error_max
            and "routers do not receive the balance term with its weight, once per update",
        ],
        formula_rel_error=formula_error,
        even_error=even_error,
        uneven_excess=excess,
        entry_rel_error=entry_error,
    )


def _formula_error(balance: Callable, n_experts: int, top_k: int) -> float:
    """Relative error on hand-made routings: flat, peaked, and choices that have nothing to
    do with the probabilities.
    """
    errors = []
    for seed, scale in enumerate((0.1, 1.0, 10.0)):
        probs_RE = (scale * _noise(TOKENS, n_experts, seed=31 + seed)).softmax(-1)
        for scores_RE in (probs_RE, _noise(TOKENS, n_experts, seed=41 + seed)):
            experts_Rk = scores_RE.topk(min(top_k, n_experts)).indices
            wanted = float(balance_of(probs_RE, experts_Rk))
            errors.append(abs(float(balance(probs_RE, experts_Rk)) - wanted) / wanted)
    return worst(errors)


def _assigned(counts: list[int], sure: float) -> tuple[Tensor, Tensor]:
    """Tokens with one expert each, `counts` of them per expert,
    whose probabilities lean towards it by `sure` (0-1).
    """
    experts_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    own_RE = torch.nn.functional.one_hot(experts_R, len(counts)).double()
    return sure * own_RE + (1 - sure) / len(counts), experts_R[:, None]


def _uneven(n_experts: int) -> list[list[int]]:
    """From one token too many to all tokens at one expert."""
    even, first = [8] * n_experts, [0] * (n_experts - 1)
    return [
        [9, 7, *even[2:]],
        [15, 1, *even[2:]],
        [16, 0, *even[2:]],
        [7, *even[1:-1], 9],
        [8 * n_experts, *first],
        [*first, 8 * n_experts],
    ]


def _entry_error(subject: Subject) -> float:
    """How far what the term adds to the routers' gradients is from its weight times the oracle's
    gradient, whatever the accumulation.

    Micro-batches are all alike, so the term of each is that of the whole update. The gradients of
    two weights are subtracted, which leaves that of the term alone. Layers add up, as each has its
    own term.
    """
    errors, (row,) = [], random_rows(subject, 1)
    for n_micro in (1, 2, 4):
        (weights, once), (_, thrice) = (
            router_gradients(subject, weight, [row] * n_micro) for weight in (1.0, 3.0)
        )
        leaves = {
            n: w.detach().double().cpu().requires_grad_(n in once) for n, w in weights.items()
        }
        reading = oracle_reading(row.input_ids, leaves, subject.declared.architecture)
        wanted = torch.autograd.grad(sum(reading.balance.values()), [leaves[n] for n in once])
        got = [(thrice[n] - once[n]).double().cpu() / 2 for n in once]
        errors += [float((g - w).norm() / w.norm()) for g, w in zip(got, wanted)]
    return worst(errors)


def router_gradients(
    subject: Subject, balance_weight: float, batches: Sequence[MicroBatch]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, gradients of the routers) by name, after the run's own accumulation."""
    model = subject.experts.model(balance_weight).train()
    subject.training.trainee_of(model, torch.optim.SGD(model.parameters(), lr=0.0)).accumulate(
        batches
    )
    routers = {n: p.grad for n, p in model.named_parameters() if n.endswith("ffn.router.weight")}
    return model.state_dict(), routers


def random_rows(subject: Subject, n: int) -> list[MicroBatch]:
    """Micro-batches of one row each, of random tokens."""
    shape = (n, min(subject.model.max_length, ROW_TOKENS) + 1)
    draw = torch.Generator().manual_seed(61)
    ids_BT = torch.randint(0, subject.model.vocab_size, shape, generator=draw)
    return [MicroBatch(row[None, :-1], row[None, 1:]) for row in ids_BT]


def _selection_bias(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Biases move by their rate against the load, once per update whatever the accumulation, and
    skewed loads become more even.
    """
    ffn = subject.declared.architecture["ffn"]
    if ffn["top_k"] == ffn["n_experts"]:
        return not_run("every token visits every expert, so that loads are always even")
    rows = random_rows(subject, ROWS_OF_UPDATE)
    step_error = worst(
        _step_error(*_update(subject, batches), ffn["balance"]["rate"])
        for batches in (rows[:1], rows)
    )
    before, after = _closed_loop(
        limits, subject.model.fresh(), subject.experts.functions, ffn["top_k"]
    )
    ok = step_error <= limits.step_error_max and after <= limits.skew_left_max * before
    text = (
        "biases do not reduce the skew of loads"
        if step_error <= limits.step_error_max
        else "an update moves biases by other steps, or its loads show nothing"
    )
    return decide(ok, text, step_error_over_rate=step_error, skew_before=before, skew_after=after)


def _step_error(loads_LE: Tensor, biases_LE: Tensor, rate: float) -> float:
    """Largest distance of a bias from one step of ±rate against the load of the whole update,
    over the rate; NaN where the loads are even, so that no step is due.
    """
    loads_LE, biases_LE = loads_LE.double().cpu(), biases_LE.double().cpu()
    wanted_LE = torch.sign(loads_LE.mean(-1, keepdim=True) - loads_LE)
    return (
        float((biases_LE / rate - wanted_LE).abs().max()) if bool(wanted_LE.any()) else float("nan")
    )


def _update(subject: Subject, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
    """One update of a fresh model: (choices of all its tokens, selection biases after it),
    both (L, E).
    """
    model = subject.model.fresh().train()
    trainee = subject.training.trainee_of(model, subject.training.make_optimizer(model))
    top_k = subject.declared.architecture["ffn"]["top_k"]
    with _counted(model, subject.experts.functions.route, top_k) as loads:
        trainee.update(batches)
    biases = [b for n, b in model.named_buffers() if n.endswith("selection_bias")]
    return torch.stack(list(loads.values())), torch.stack(biases)


@contextmanager
def _counted(model: nn.Module, route: Callable, top_k: int) -> Iterator[dict[str, Tensor]]:
    """How often each expert is chosen (E,) until the block ends, by the name of its layer."""
    loads: dict[str, Tensor] = {}

    def count(name: str, logits_RE: Tensor) -> None:
        bias_E = model.get_buffer(f"{name}.selection_bias")
        chosen = route(logits_RE, top_k, bias_E)[0].flatten()
        loads[name] = loads.get(name, 0) + torch.bincount(chosen, minlength=len(bias_E))

    with watching_routers(model, count):
        yield loads


@contextmanager
def watching_routers(model: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `note` with the name of the layer and the logits (R, E) at each forward of a router,
    until the block ends.
    """
    hooks = [
        router.register_forward_hook(
            lambda _, __, logits_RE, layer=name.removesuffix(".router"): note(
                layer, logits_RE.detach()
            )
        )
        for name, router in model.named_modules()
        if name.endswith("ffn.router")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _closed_loop(
    limits: SimpleNamespace, model: nn.Module, experts: ExpertFunctions, top_k: int
) -> tuple[float, float]:
    """Excess of the busiest expert over its even share, before and after biases have met
    skewed scores for some updates.
    """
    biases = [b for n, b in model.named_buffers() if n.endswith("selection_bias")]
    n_experts = len(biases[0])
    logits_RE = _noise(8 * TOKENS, n_experts, seed=51) + torch.linspace(
        1, -1, n_experts, dtype=torch.float64
    )

    def loads_LE() -> Tensor:
        chosen = [
            experts.route(logits_RE, top_k, bias.double().cpu())[0].flatten() for bias in biases
        ]
        return torch.stack([torch.bincount(c, minlength=n_experts) for c in chosen])

    def skew() -> float:
        return float((loads_LE().double() * n_experts / (len(logits_RE) * top_k)).max()) - 1

    before = skew()
    for _ in range(int(limits.updates)):
        rate = 1 / (limits.updates * n_experts) * 4
        experts.update_selection_bias(model, loads_LE().to(biases[0].device), rate)
    return before, skew()
