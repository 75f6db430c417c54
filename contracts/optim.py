"""Gates of the optimizer: every parameter is optimised as declared, by the declared formula,
within the declared norm.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.events import Event, StepTaken
from stackproof.contracts.gate import Stateless, Verdict, decide, decides, failed
from stackproof.contracts.schedule import closed_form

RATE = 1e-2
ULPS = 2.0**-22  # of a weight, by which two float32 operations may round it


@decides("optim.parameter-census")
def parameter_census(
    limits: SimpleNamespace,
    *,
    build_model,
    make_optimizer,
    census_update,
    census_batch,
    loss_of,
    declared_law,
) -> Verdict:
    """Every trainable parameter is owned once, in a group of its declared law, gets a gradient and
    moves; frozen ones do not move.

    `declared_law(name, parameter)` holds rule (adamw or muon), lr, weight_decay and what else the
    rule needs. `census_update(model, optimizer, batch)` makes one update and returns the names of
    parameters that no token was sent to; only these may lack a gradient. `loss_of(model, batch)` is
    the loss with its graph: whatever wants a gradient there is a parameter of the model, also what
    hangs in a list that the framework does not look into.
    """
    model = build_model()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = make_optimizer(model)
    owned = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    ids = [id(p) for p, _ in owned]
    if strangers := [i for i in ids if i not in names]:
        return failed(
            f"the optimizer owns {len(strangers)} tensor(s) that are no parameter of the model",
            strangers=len(strangers),
        )
    missing = sorted(
        names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in set(ids)
    )
    twice = sorted({names[i] for i in ids if ids.count(i) > 1})
    if missing or twice:
        return failed(
            f"not owned exactly once by the optimizer: {', '.join(missing + twice)}",
            missing=len(missing),
            twice=len(twice),
        )
    wrong = [names[id(p)] for p, g in owned if not _is_of(declared_law(names[id(p)], p), g)]
    if wrong:
        return failed(
            f"rule, learning rate or weight decay is not the declared one: {wrong[0]}",
            wrong_groups=len(wrong),
        )
    if unregistered := [
        tuple(p.shape) for p in _leaves(loss_of(model, census_batch)) if id(p) not in names
    ]:
        return failed(
            f"the loss depends on {len(unregistered)} weight(s) that are no parameter",
            unregistered=len(unregistered),
        )
    return _movement(model, optimizer, census_update, census_batch)


def _is_of(law: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether an optimizer's group has a law's rule, learning rate and decay.
    The settings a group holds show its rule.
    """
    rule = "adamw" if "betas" in group else "muon" if "momentum" in group else "unknown"
    return (rule, group["lr"], group["weight_decay"]) == (
        law["rule"],
        law["lr"],
        law["weight_decay"],
    )


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor that the backward of a loss would give a gradient to."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        todo += [parent for parent, _ in node.next_functions]
    return found


def _movement(model, optimizer, census_update, batch) -> Verdict:
    before, unreached = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    dead: set[str] = set()
    for _ in range(2):
        idle = census_update(model, optimizer, batch)
        unreached.append(idle)
        dead |= {
            n
            for n, p in model.named_parameters()
            if p.requires_grad and n not in idle and (p.grad is None or not bool(p.grad.any()))
        }
    never = set.intersection(*unreached)
    still = {
        n
        for n, p in model.named_parameters()
        if p.requires_grad and n not in never and torch.equal(p.detach(), before[n])
    }
    if still or dead:
        return failed(
            f"gets no gradient or does not move: {', '.join(sorted(still | dead))}",
            still=len(still),
            dead=len(dead),
        )
    if infinite := sorted(
        n for n, p in model.named_parameters() if not bool(p.detach().isfinite().all())
    ):
        return failed(
            f"two updates leave {len(infinite)} parameters that are not finite, first "
            f"{infinite[0]}",
            infinite=len(infinite),
        )
    frozen_name, frozen = next((n, p) for n, p in model.named_parameters() if p.ndim >= 2)
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    census_update(model, optimizer, batch)
    moved = not torch.equal(frozen.detach(), kept)
    n_owned = sum(len(g["params"]) for g in optimizer.param_groups)
    return decide(
        not moved,
        f"{frozen_name} was frozen and still moves",
        owned=n_owned,
        still=0,
        dead=0,
        unregistered=0,
        unreached=len(never),
        frozen_moved=moved,
    )


@decides("optim.reference-update")
def reference_update(
    limits: SimpleNamespace, *, build_model, make_optimizer, declared_law
) -> Verdict:
    """Ten updates of the real optimizer equal each parameter's declared rule written out in
    float64, with a zero gradient among them.

    AdamW is driven twice: with gradients of 0.1 to 10, and with those as many times its eps, where
    eps decides. The optimizer is built for the model's parameter names and devices, on tensors of a
    few entries. Each group's learning rate is multiplied by what brings its declared rate to RATE,
    so that rounding weighs the same for all. Where a parameter does not decay, a gradient that was
    always zero leaves it bit for bit.
    """
    small = _Small(build_model())
    if moved := _moved_by_nothing(small, make_optimizer, declared_law):
        return failed(
            f"{moved[0]} does not decay and had zero gradients only, and moved", moved=len(moved)
        )
    laws = {n: dict(declared_law(n, p)) for n, p in small.pairs}
    errors: dict[str, dict[str, float]] = {
        "error_over_lr": {},
        "muon_rel_error": {},
        "muon_bf16_rel_error": {},
    }
    allowed = dict(
        zip(
            errors,
            (limits.rel_error_max, limits.muon_rel_error_max, limits.muon_bf16_rel_error_max),
        )
    )
    first = {n: p.detach().clone() for n, p in small.pairs}
    for tiny in (False, True):
        oracle = _driven(small, make_optimizer, laws, first, tiny)
        for n, p in small.pairs:
            off, law = p.detach().double() - oracle[n], laws[n]
            if law["rule"] == "adamw":
                errors["error_over_lr"][n] = max(
                    _number(off.abs().max() / RATE), errors["error_over_lr"].get(n, 0.0)
                )
            elif not tiny:
                kind = "muon_rel_error" if law["dtype"] == "float32" else "muon_bf16_rel_error"
                errors[kind][n] = _number(off.norm() / (oracle[n] - first[n].double()).norm())
    worst = {
        kind: max(found.items(), key=lambda item: item[1])
        for kind, found in errors.items()
        if found
    }
    over = [name for kind, (name, error) in worst.items() if not error <= allowed[kind]]
    text = f"updates differ from the declared rule in float64, worst in {', '.join(over)}"
    return decide(not over, text, **{kind: error for kind, (_, error) in worst.items()})


def _driven(
    small: "_Small",
    make_optimizer: Callable,
    laws: Mapping[str, Any],
    first: Mapping[str, Tensor],
    tiny: bool,
) -> dict[str, Tensor]:
    """Drive the real optimizer from `first` and return where float64 ends; with `tiny`, AdamW's
    gradients are multiplied by its eps.
    """
    for n, p in small.pairs:
        p.data.copy_(first[n])
    oracle, memory = {n: p.double() for n, p in first.items()}, {n: {} for n in first}
    optimizer, draw = (
        _at_rate(make_optimizer(small), {id(p): laws[n]["lr"] for n, p in small.pairs}),
        torch.Generator().manual_seed(7),
    )
    for t in range(1, 11):
        for n, p in small.pairs:
            scale = 10.0 ** (t % 3 - 1) * (
                laws[n]["eps"] if tiny and laws[n]["rule"] == "adamw" else 1.0
            )
            gradient = (
                torch.zeros(p.shape) if t == 5 else torch.randn(p.shape, generator=draw) * scale
            )
            p.grad = gradient.to(p.device)
            oracle[n] = _RULES[laws[n]["rule"]](
                oracle[n], p.grad.double(), memory[n], laws[n] | {"lr": RATE}, t
            )
        optimizer.step()
    return oracle


class _Small:
    """A model's parameter names and devices on tensors of a few entries: wide where the model's are
    wide, tall where they are tall.
    """

    def __init__(self, model: torch.nn.Module):
        draw = torch.Generator().manual_seed(5)
        self.pairs = [
            (n, torch.nn.Parameter(torch.randn(_few(p.shape), generator=draw).to(p.device)))
            for n, p in model.named_parameters()
            if p.requires_grad
        ]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self.pairs

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for _, p in self.pairs]


def _at_rate(optimizer: Any, declared: Mapping[int, float]) -> Any:
    """The optimizer with each group's rate times RATE over what is declared for
    the group's first parameter.
    """
    for group in (g for g in optimizer.param_groups if g["params"]):
        group["lr"] *= RATE / declared[id(group["params"][0])]
    return optimizer


def _few(shape: torch.Size) -> tuple[int, ...]:
    if len(shape) != 2:
        return (5,) * len(shape)
    return (6, 6) if shape[0] == shape[1] else (9, 6) if shape[0] > shape[1] else (6, 9)


def _moved_by_nothing(small: _Small, make_optimizer: Callable, declared_law: Callable) -> list[str]:
    """Names of parameters that do not decay and move in two updates with gradients of zero."""
    optimizer, before = make_optimizer(small), [p.detach().clone() for _, p in small.pairs]
    for _ in range(2):
        for _, p in small.pairs:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    still = [n for (n, p), kept in zip(small.pairs, before) if torch.equal(p.detach(), kept)]
    moved = [
        n for n, p in small.pairs if n not in still and declared_law(n, p)["weight_decay"] == 0
    ]
    for (_, p), kept in zip(small.pairs, before):
        p.data.copy_(kept)
    return moved


def _adamw(x: Tensor, gradient: Tensor, memory: dict, law: Mapping[str, Any], t: int) -> Tensor:
    """x − lr·(m̂/(√v̂ + eps) + decay·x). Source: arXiv:1711.05101, algorithm 2."""
    b1, b2 = law["betas"]
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * gradient
    v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * gradient**2
    return x - law["lr"] * (
        (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + law["eps"]) + law["weight_decay"] * x
    )


def _muon(x: Tensor, gradient: Tensor, memory: dict, law: Mapping[str, Any], t: int) -> Tensor:
    """x − lr·decay·x − lr·factor·U·p(S)·Vᵀ of the running mean U·S·Vᵀ: the Newton-Schulz quintic
    acts on each singular value alone.

    Sources: Keller Jordan's post on Muon, 2024; the factor of update size arXiv:2502.16982, sec.
    2.2.
    """
    m = memory["m"] = law["momentum"] * memory.get("m", 0.0) + (1 - law["momentum"]) * gradient
    ahead = law["momentum"] * m + (1 - law["momentum"]) * gradient if law["nesterov"] else m
    if not bool(ahead.isfinite().all()):
        return torch.full_like(x, math.nan)  # as the quintic would; the decomposition raises
    u, s, v = torch.linalg.svd(ahead, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(law["ns_steps"]):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = x.shape
    factor = {
        "match-rms-adamw": 0.2 * max(rows, columns) ** 0.5,
        "original": max(1.0, rows / columns) ** 0.5,
    }[law["lr_scale"]]
    return x * (1 - law["lr"] * law["weight_decay"]) - law["lr"] * factor * (u * s) @ v


_RULES = {"adamw": _adamw, "muon": _muon}


@dataclass(frozen=True)
class Move:
    """What one real step did to one parameter, or to some entries of one: `gradient` is as backward
    left it, None where there was none.
    """

    law: Mapping[str, Any]
    before: Tensor
    gradient: Tensor | None
    after: Tensor


@dataclass(frozen=True)
class Applied:
    """One real step: its number, the norm of all its gradients before anybody scaled them, the one
    it clipped by, and the moves.
    """

    step: int
    grad_norm: float
    said_norm: float
    moves: Mapping[str, Move]


@decides("optim.applied-update")
def applied_update(
    limits: SimpleNamespace,
    *,
    applied_steps: Callable[[], Sequence[Applied]],
    declared_updates: Mapping[str, Any],
) -> Verdict:
    """Whole train steps of the run move each parameter as clipping, schedule and rule say together,
    and nothing else moves it.

    `applied_steps()` makes real steps from fresh moments; `declared_updates` holds schedule,
    max_steps and max_grad_norm. Each step is worked out in float64 from the weights before it and
    the gradients of backward, at the rate of its number, and clipped by the norm that it says; that
    norm is held against one in float64, since a float32 sum of half a million squares is off by
    2e-5. AdamW is off by shares of the rate, beyond the rounding of the weight itself; Muon, in
    float32, by shares of the way that was to go.
    """
    memory: dict[str, dict] = {}
    errors: dict[str, tuple[float, str]] = {}
    for applied in applied_steps():
        norm_error = (
            abs(applied.said_norm / applied.grad_norm - 1) if applied.grad_norm else math.inf
        )
        _worst(errors, "norm_rel_error", norm_error, f"the norm in step {applied.step}")
        clip = min(1.0, declared_updates["max_grad_norm"] / (applied.said_norm + 1e-6))
        for name, move in applied.moves.items():
            kind, error = _move_error(
                move, memory.setdefault(name, {"t": 0}), clip, applied.step, declared_updates
            )
            _worst(errors, kind, error, f"{name} in step {applied.step}")
    allowed = {
        "error_over_lr": limits.rel_error_max,
        "muon_rel_error": limits.muon_rel_error_max,
        "norm_rel_error": limits.norm_rel_error_max,
    }
    over = [
        f"{where} by {error:.3g}"
        for kind, (error, where) in errors.items()
        if not error <= allowed[kind]
    ]
    text = f"a step moved what clipping, schedule and rule do not: {', '.join(over)}"
    return decide(
        bool(errors) and not over, text, **{kind: error for kind, (error, _) in errors.items()}
    )


def _worst(errors: dict[str, tuple[float, str]], kind: str, error: float, where: str) -> None:
    """Keep the largest error of each kind."""
    errors[kind] = max(errors.get(kind, (0.0, "")), (_number(error), where))


def _number(error: float | Tensor) -> float:
    """An error as a number; one that is none is larger than any."""
    return math.inf if math.isnan(error) else float(error)


def _move_error(
    move: Move, memory: dict, clip: float, step: int, declared: Mapping[str, Any]
) -> tuple[str, float]:
    """(kind of error, how far a parameter is from where its law takes it).
    Without a gradient it may not move at all.
    """
    law, off = move.law, move.after.double() - move.before.double()
    lr = closed_form(
        step, peak=law["lr"], schedule=declared["schedule"], max_steps=declared["max_steps"]
    )
    kind = {"adamw": "error_over_lr", "muon": "muon_rel_error"}[law["rule"]]
    if move.gradient is None:
        return kind, float("inf") if bool(off.any()) else 0.0
    memory["t"] += 1
    there = _RULES[law["rule"]](
        move.before.double(), move.gradient.double() * clip, memory, law | {"lr": lr}, memory["t"]
    )
    off = move.after.double() - there
    if law["rule"] == "muon":
        return kind, float(off.norm() / (there - move.before.double()).norm().clamp(min=1e-300))
    return kind, float(
        (off.abs() - ULPS * move.before.abs()).clamp(min=0).max() / lr
    ) if lr else float(off.abs().max())


@decides("optim.clip-norm")
class ClipNorm(Stateless):
    """After clipping, the re-measured global norm is at most the declared one and the
    direction was kept in length.
    """

    events = (StepTaken,)

    def observe(self, event: Event) -> Verdict:
        declared = min(event.grad_norm, event.max_grad_norm)
        low, high = (
            declared * (1 - self.limits.rel_shortfall_max),
            declared * (1 + self.limits.rel_excess_max),
        )
        ok = low <= event.clipped_grad_norm <= high
        return decide(
            ok,
            f"step {event.step}: the gradient norm after clipping is "
            f"{event.clipped_grad_norm:.4g}, before {event.grad_norm:.4g}, declared maximum "
            f"{event.max_grad_norm:g}",
            clipped_grad_norm=event.clipped_grad_norm,
            grad_norm=event.grad_norm,
        )


@decides("optim.clip-spike")
def clip_spike(limits: SimpleNamespace, *, build_model, clip, clip_model) -> Verdict:
    """A planted spike is scaled to the declared norm, in its own direction, in whichever parameter
    it is; a small gradient is left.

    `clip(list of gradients) -> max_norm` clips in place as the train step does and returns the
    declared maximum. `clip_model(model)` does the same with the gradients that the step finds in a
    model, and returns (norm before, max_norm). The model given to it has the names of the run's
    own, on tensors of a few entries.
    """
    draw = torch.Generator().manual_seed(3)
    small = [torch.randn(4, 3, generator=draw) * 1e-3, torch.randn(5, generator=draw) * 1e-3]
    kept = copy.deepcopy(small)
    max_norm = clip(small)
    if not all(torch.equal(a, b) for a, b in zip(small, kept)):
        return failed("a gradient below the maximum was changed")
    spike = [torch.randn(4, 3, generator=draw) * 1e4, torch.randn(5, generator=draw) * 1e4]
    before = torch.cat([g.flatten() for g in spike]).double()
    clip(spike)
    after = torch.cat([g.flatten() for g in spike]).double()
    norm = float(after.norm())
    cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=0))
    if (
        abs(norm - max_norm) > limits.rel_excess_max * max_norm
        or cosine < 1 - limits.rel_excess_max
    ):
        return failed(
            f"a spike of norm {float(before.norm()):.3g} has norm {norm:.4g} after clipping",
            norm=norm,
            cosine=cosine,
        )
    missed = _spikes_missed(_Small(build_model()), clip_model, limits.rel_excess_max)
    return decide(
        not missed,
        f"a spike in {', '.join(missed[:3])} alone is not clipped",
        norm=norm,
        cosine=cosine,
        missed=len(missed),
    )


def _spikes_missed(small: "_Small", clip_model: Callable, rel_excess_max: float) -> list[str]:
    """Names of parameters in which a gradient a hundred times the maximum is not brought down to
    it, or not seen in the norm.
    """
    missed = []
    for name, spiked in small.pairs:
        for _, p in small.pairs:
            p.grad = torch.full_like(p, 1e-9)
        _, max_norm = clip_model(small)
        spiked.grad = torch.ones_like(spiked) * (100 * max_norm / spiked.numel() ** 0.5)
        norm, _ = clip_model(small)
        exact = abs(float(spiked.grad.double().norm()) - max_norm) <= rel_excess_max * max_norm
        if not exact or abs(norm - 100 * max_norm) > rel_excess_max * norm:
            missed.append(name)
    return missed


@decides("optim.step-report")
def step_report(
    limits: SimpleNamespace, *, reported_steps: Callable[[], list[tuple[Any, Mapping[str, Any]]]]
) -> Verdict:
    """What a step says about itself is what happened: norms before and after clipping, rates,
    labels, and how many tensors moved.

    `reported_steps()` makes two real steps, the second with one tensor held still, and gives of
    each (its report, what was measured beside it): norm_before, norm_after, group_lrs,
    n_valid_tokens and changed_tensor_frac. Watchers inside a run see the report alone.
    """
    wrong, worst = [], 0.0
    for number, (report, seen) in enumerate(reported_steps(), start=1):
        pairs = {
            "the norm before clipping": (report.grad_norm, seen["norm_before"]),
            "the norm after clipping": (report.clipped_grad_norm, seen["norm_after"]),
            "the number of labels": (report.n_valid_tokens, seen["n_valid_tokens"]),
            "the share of tensors that moved": (
                report.changed_tensor_frac,
                seen["changed_tensor_frac"],
            ),
            **{
                f"the rate of {name}": (report.group_lrs.get(name, -1.0), lr)
                for name, lr in seen["group_lrs"].items()
            },
        }
        for name, (said, happened) in pairs.items():
            error = abs(said - happened) / max(abs(happened), 1e-30)
            worst = max(worst, error)
            if not error <= limits.rel_error_max:
                wrong.append(
                    f"{name} of step {number} is said to be {said:.6g} and was {happened:.6g}"
                )
    return decide(not wrong, "; ".join(wrong[:3]), rel_error=worst, wrong=len(wrong))
