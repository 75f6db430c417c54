"""Gates of half precision: what must be summed in float32 is.
R rows (tokens), D features, E experts, k top_k, V vocab.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.declared import chooses, drawn_weights, parameter_shapes
from stackproof.contracts.gate import Verdict, decide, decide_all, decides, worst, worst_at
from stackproof.contracts.subject import StepReport, Subject, Trainee, TraineeOptions

ROWS, WIDTH, VOCAB_SIZE, SCALE = 64, 4096, 8192, 3.0
# far below where the gradients of a mean overflow float16, far above where they vanish in it
SCALES = (2.0**9, 2.0**13)
HELD_OUT_ROWS = 2
EXPERT = re.compile(r"\bexperts\.\d+\.")
ALONE = 8  # tokens whose loss is also taken by itself


@decides("precision.shadow")
def shadow(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Norm, choice of experts and loss, given half-precision numbers of scale 3,
    equal float64 of the same numbers.

    All run under the run's autocast. Errors are in roundings: the distance of 1 from the next
    number of the half-precision dtype. What rounds where it may is left out: the features of a norm
    may come out rounded, so its factor is taken over a long row; logits come out of a product of
    one feature each, which no dtype rounds.
    """
    half, half_dtype = subject.half_precision, subject.half_precision.dtype
    a, rounding = subject.declared.architecture, torch.finfo(half_dtype).eps
    errors = {
        "norm": worst(
            (
                _norm_error(half.norm, a, half_dtype),
                _norm_error(half.norm, a, half_dtype, torch.float32),
            )
        )
        / rounding,
        "router": _router_error(half.route, a["ffn"], half_dtype) / rounding
        if a["ffn"]["kind"] == "moe"
        else 0.0,
        "loss": worst(
            (_loss_error(half.loss, half_dtype), _loss_error(half.loss, half_dtype, torch.float32))
        )
        / rounding,
    }
    allowed = {
        "norm": limits.norm_roundings_max,
        "router": limits.router_roundings_max,
        "loss": limits.loss_roundings_max,
    }
    wrong = [
        f"{name} is {error:.2g} roundings from float64"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
    return decide(
        not wrong,
        f"computed in {str(half_dtype).removeprefix('torch.')} where float32 is needed: "
        f"{'; '.join(wrong)}",
        norm_roundings=errors["norm"],
        router_roundings=errors["router"],
        loss_roundings=errors["loss"],
        rounding=rounding,
    )


@decides("precision.whole-step")
def whole_step(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Loss and gradients of the run's own step in half precision are those of the same step in
    float32, within what rounding explains; so is the held-out loss under weights with which all of
    the model shows. That loss is not equal to the one in float32: then it would be computed in
    float32.

    Both steps have the same weights, rows and dropout masks. Gradients are compared by matrix:
    those of vectors may cancel to less than their rounding. Those of one matrix of all experts of a
    layer are compared together, since rounding tips some choices.
    """
    half, exact = subject.training.trainee(), subject.training.trainee(TraineeOptions(exact=True))
    batches, same = half.draw(), exact.draw()
    rows = [[b.input_ids for b in drawn] for drawn in (batches, same)]
    wanted = exact.accumulate(batches)
    loss = abs(half.accumulate(batches) / wanted - 1)
    errors = _matrix_errors(half, exact)
    furthest, routed = worst_at(errors), chooses(subject.declared.architecture)
    evaluation = _evaluation_error(subject)
    most = limits.routed_rel_error_max if routed else limits.gradient_rel_error_max
    return decide_all(
        [
            not all(map(torch.equal, *rows)) and "the two steps draw other rows",
            not loss <= limits.loss_rel_error_max and "the loss differs from that in float32",
            not errors[furthest] <= most
            and f"the gradient of {furthest} differs from that in float32",
            not evaluation <= limits.evaluation_rel_error_max
            and "the held-out loss differs from that in float32",
            not evaluation >= limits.evaluation_rel_error_min
            and "the held-out loss equals that in float32, as if evaluations were computed in it",
        ],
        loss_rel_error=loss,
        **{"routed_rel_error" if routed else "gradient_rel_error": errors[furthest]},
        evaluation_rel_error=evaluation,
        worst=furthest,
    )


def _evaluation_error(subject: Subject) -> float:
    """Relative difference of the held-out loss in the run's precision and in float32."""
    score, model = subject.evaluation, subject.model.fresh()
    shapes = parameter_shapes(subject.declared.architecture, subject.model.vocab_size)
    model.load_state_dict(drawn_weights(shapes, torch.Generator().manual_seed(13)))
    batches = score.held_out_batches(HELD_OUT_ROWS, 1)
    wanted = score.score_batches(model, batches).loss_nats
    return abs(score.score_in_precision(model, batches).loss_nats / wanted - 1)


def _matrix_errors(half: Trainee, exact: Trainee) -> dict[str, float]:
    """‖half − exact‖ / ‖exact‖ of the gradients of each matrix; those of all experts together.
    Infinite where one of them has no gradient.
    """
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (name, p), q in zip(half.model.named_parameters(), exact.model.parameters()):
        if p.ndim < 2 or p.grad is q.grad is None:
            continue
        found = squares[EXPERT.sub("experts.", name)]
        one_sided = p.grad is None or q.grad is None
        gap = torch.inf if one_sided else float((p.grad - q.grad).double().square().sum())
        found[0] += gap
        found[1] += 0.0 if q.grad is None else float(q.grad.double().square().sum())
    return {name: (gap / max(size, 1e-300)) ** 0.5 for name, (gap, size) in squares.items()}


@decides("precision.declared")
def declared(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Every linear layer of a real train step returns numbers of the declared type: neither half
    precision that is not declared, nor float32 where half precision is.
    """
    trainee, dtype = subject.training.trainee(), subject.declared.dtype
    found: dict[str, set[str]] = defaultdict(set)
    for name, module in trainee.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: found[name].add(
                    str(output.dtype).removeprefix("torch.")
                )
            )
    trainee.step(trainee.draw())
    odd = [f"{name} in {' and '.join(seen)}" for name, seen in found.items() if seen != {dtype}]
    text = (
        f"train.dtype is {dtype}, and {len(odd)} of {len(found)} layers compute otherwise: "
        f"{', '.join(odd[:3])}"
    )
    return decide(len(odd) <= limits.odd_max and bool(found), text, odd=len(odd), layers=len(found))


@decides("precision.loss-scale")
def loss_scale(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The gradient norm before clipping and the one that clipping leaves do not depend on the loss
    scale: one step from the same start under each of SCALES.
    """

    def step(scale: float) -> StepReport:
        trainee = subject.training.trainee(TraineeOptions(loss_scale=scale))
        return trainee.step(trainee.draw())

    low, high = (step(scale) for scale in SCALES)
    before = abs(low.grad_norm / high.grad_norm - 1)
    left = abs(low.clipped_grad_norm / high.clipped_grad_norm - 1)
    rel_error = worst((before, left))
    return decide(
        rel_error <= limits.rel_error_max,
        f"a loss scale {SCALES[1] / SCALES[0]:g} times as large changes the gradient norm from "
        f"{low.grad_norm:.4g} to {high.grad_norm:.4g} before clipping and from "
        f"{low.clipped_grad_norm:.4g} to {high.clipped_grad_norm:.4g} after it",
        rel_error=rel_error,
        norm=high.grad_norm,
        norm_left=high.clipped_grad_norm,
    )


def _noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of scale 3, rounded to `dtype`, as float64."""
    return (
        (
            SCALE
            * torch.randn(
                *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
        )
        .to(dtype)
        .double()
    )


def _norm_error(
    half_norm: Callable, a: Mapping[str, Any], half: torch.dtype, given: torch.dtype | None = None
) -> float:
    """Root mean square over rows of the relative error of the factor that a row was scaled by.
    `given` is the dtype of the input.

    Gains differ: otherwise the few numbers that the type can represent would all be rounded alike,
    and roundings would not cancel.
    """
    x_RD = (
        (
            _noise(ROWS, WIDTH, seed=61, dtype=half)
            * torch.linspace(0.5, 2, ROWS, dtype=torch.float64)[:, None]
        )
        .to(half)
        .double()
    )
    gain_D = 1 + _noise(WIDTH, seed=64, dtype=torch.float32) / 10
    y_RD = (
        half_norm(x_RD.to(given or half)[None].requires_grad_(), gain_D.float())[0]
        .detach()
        .double()
        .cpu()
    )
    centred_RD = x_RD - x_RD.mean(-1, keepdim=True) if a["norm"]["kind"] == "layernorm" else x_RD
    unscaled_RD = centred_RD * gain_D.float()
    got_R = (y_RD * unscaled_RD).sum(-1) / unscaled_RD.square().sum(-1)
    wanted_R = (centred_RD.square().mean(-1) + a["norm_eps"]).rsqrt()
    return float((got_R / wanted_R - 1).square().mean().sqrt())


def _router_error(half_route: Callable, ffn: Mapping[str, Any], half: torch.dtype) -> float:
    """Largest relative error of a probability, or of the weight of a choice."""
    logits_RE = _noise(ROWS, ffn["n_experts"], seed=62, dtype=half)
    experts_Rk, weights_Rk, probs_RE = (
        t.detach().cpu() for t in half_route(logits_RE.to(half).requires_grad_(), ffn["top_k"])
    )
    wanted_RE = logits_RE.softmax(-1)
    shares_Rk = wanted_RE.gather(1, experts_Rk)
    shares_Rk = shares_Rk / shares_Rk.sum(-1, keepdim=True) if ffn["top_k"] > 1 else shares_Rk
    return worst(
        float((got.double() / wanted - 1).abs().max())
        for got, wanted in ((probs_RE, wanted_RE), (weights_Rk, shares_Rk))
    )


def _loss_error(half_loss: Callable, half: torch.dtype, given: torch.dtype | None = None) -> float:
    """Largest relative error of the loss of one token, or of the sum.
    A row has one feature: its logits are a column of the head.
    """
    head_VD, labels_R = (
        _noise(VOCAB_SIZE, ROWS, seed=63, dtype=half),
        torch.arange(ROWS) * (VOCAB_SIZE // ROWS),
    )
    x_1RD = torch.eye(ROWS, dtype=given or half)[None].requires_grad_()
    nats_R = head_VD.logsumexp(0) - head_VD[labels_R, torch.arange(ROWS)]
    pairs = [(half_loss(x_1RD, head_VD.float(), labels_R[None]), nats_R.sum())]
    pairs += [
        (half_loss(x_1RD[:, r : r + 1], head_VD.float(), labels_R[None, r : r + 1]), nats_R[r])
        for r in range(ALONE)
    ]
    return worst(abs(float(got.detach()) / float(wanted) - 1) for got, wanted in pairs)
