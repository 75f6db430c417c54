"""Gates of the optimizer: every parameter is optimised as declared, by the declared formula,
within the declared norm.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.events import Event, StepTaken
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide, decides, failed
from stackproof.contracts.loss import IGNORE, random_rows
from stackproof.contracts.schedule import closed_form
from stackproof.contracts.subject import (
    Declared,
    NotOffered,
    StepReport,
    Subject,
    Trainee,
    TraineeOptions,
    offered,
    offers,
)
from stackproof.contracts.update_rules import RULES

RATE = 1e-2
ULPS = 2.0**-22  # of a weight, by which two float32 operations may round it
LOW_NORM = 1e-2
PEAKS = ("lr", "initial_lr", "max_lr")  # of a group, as schedules keep them
# entries compared: of a tensor one by one, and of matrices as a whole together
TRAIN_STEPS, SAMPLED, MUON_ENTRIES = 3, 4096, 2**21
NamedParameters = Sequence[tuple[str, Tensor]]
Errors = dict[str, tuple[float, str]]  # by kind: the largest, and where
Found = tuple[str, dict[str, int | bool]]  # what is wrong, or nothing, and what was measured


@decides("optim.parameter-groups")
def parameter_groups(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Each trainable parameter is in the optimizer once, and nothing else is. Where laws are
    declared, it is in a group of its law. Where fresh trainees are offered, it gets a gradient and
    moves, and a frozen one does not.
    """
    groups = subject.training.optimizer.param_groups
    named = list(subject.training.module.named_parameters())
    judged, (text, measured) = ["ownership"], _ownership(named, groups)
    hidden = offered(subject.training.hidden_leaves)
    if not text and hidden is not None:
        judged.append("graph")
        text, more = _hidden(hidden)
        measured |= more
    if not text and offers(subject.declared.update_law):
        judged.append("laws")
        text, more = _laws(named, groups, subject.declared)
        measured |= more
    if not text and offers(subject.training.trainee):
        judged.append("movement")
        text, more = _movement(subject)
        measured |= more
    return decide(not text, text, judged=", ".join(judged), **measured)


def _ownership(named: NamedParameters, groups: Sequence[Mapping[str, Any]]) -> Found:
    names, count = {id(p): n for n, p in named}, Counter(id(p) for g in groups for p in g["params"])
    missing = [n for n, p in named if p.requires_grad and id(p) not in count]
    twice = [names.get(i, "?") for i, n in count.items() if n > 1]
    strangers = len(count.keys() - names.keys())
    text = [
        f"{what}: {', '.join(found[:4])}"
        for what, found in (("not in the optimizer", missing), ("in the optimizer twice", twice))
        if found
    ]
    if not count:
        text.append("the optimizer owns no parameter")
    if strangers:
        text.append(f"{strangers} tensor(s) in the optimizer belong to no parameter of the model")
    return "; ".join(text), {
        "owned": len(count),
        "missing": len(missing),
        "twice": len(twice),
        "strangers": strangers,
    }


def _laws(named: NamedParameters, groups: Sequence[Mapping[str, Any]], declared: Declared) -> Found:
    names = {id(p): n for n, p in named}
    owned = [(names[id(p)], p, g) for g in groups for p in g["params"]]
    wrong = [n for n, p, g in owned if not _is_of(_law(declared, n, p), g)]
    text = f"rule, learning rate or weight decay is not the declared one: {', '.join(wrong[:4])}"
    return text if wrong else "", {"wrong_groups": len(wrong)}


def _is_of(law: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether an optimizer's group holds every setting of a law's rule, as declared."""
    return all(key in group and group[key] == law[key] for key in RULES[law["rule"]].settings)


def _law(declared: Declared, name: str, parameter: Tensor) -> Mapping[str, Any]:
    """The declared law of a parameter. Raises NotOffered, with the rule, if there is no formula for
    it.
    """
    law = declared.update_law(name, parameter)
    if law["rule"] not in RULES:
        raise NotOffered(f"a rule of contracts/update_rules.py: {name} is updated by {law['rule']}")
    return law


def _movement(subject: Subject) -> Found:
    """Two updates of a fresh trainee on random rows, and a third with its first matrix frozen."""
    trainee = subject.training.trainee(TraineeOptions(exact=True))
    batch = random_rows(subject.model, 4, seed=74)
    named = list(trainee.model.named_parameters())
    known = {id(p) for _, p in named}
    text, measured = _hidden([p for p in leaves(trainee.loss_sum(batch)) if id(p) not in known])
    if text:
        return text, measured
    before, dead, idle = {n: p.detach().clone() for n, p in named}, set(), []
    for _ in range(2):
        trainee.update([batch])
        idle.append(trainee.idle_parameters())
        dead |= {
            n
            for n, p in named
            if p.requires_grad and n not in idle[-1] and (p.grad is None or not bool(p.grad.any()))
        }
    never = set.intersection(*idle)
    movable = [(n, p) for n, p in named if p.requires_grad and n not in never]
    still = {n for n, p in movable if torch.equal(p.detach(), before[n])}
    infinite = sorted(n for n, p in named if not bool(p.detach().isfinite().all()))
    measured |= {"still": len(still), "dead": len(dead), "infinite": len(infinite)}
    measured |= {"unreached": len(never)}
    if still or dead:
        names = ", ".join(sorted(still | dead)[:4])
        return f"gets no gradient or does not move: {names}", measured
    if infinite:
        text = f"two updates leave {len(infinite)} parameters that are not finite"
        return f"{text}, first {infinite[0]}", measured
    name, frozen = next((n, p) for n, p in named if p.ndim >= 2)
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    trainee.update([batch])
    moved = not torch.equal(frozen.detach(), kept)
    return f"{name} was frozen and still moves" if moved else "", measured | {"frozen_moved": moved}


def _hidden(found: Sequence[Tensor]) -> Found:
    if not found:
        return "", {"unregistered": 0}
    return (
        f"the loss depends on {len(found)} weight(s) that are no parameter of the model, first of "
        f"shape {tuple(found[0].shape)}",
        {"unregistered": len(found)},
    )


def leaves(loss: Tensor) -> list[Tensor]:
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


@decides("optim.declared-settings")
def declared_settings(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The settings that a trainer states are those of a group of its optimizer."""
    stated, groups = subject.declared.optimizer_settings, subject.training.optimizer.param_groups
    held = {
        "learning_rate": [r for g in groups for n, r in g.items() if n in PEAKS],
        "weight_decay": [g.get("weight_decay", 0.0) for g in groups],
    }
    unused = [
        f"{name} = {value:g} is stated, {', '.join(f'{h:g}' for h in sorted(set(held[name])))} used"
        for name, value in stated.items()
        if name in held and value not in held[name]
    ]
    peak = all(g["lr"] >= max(g[name] for name in PEAKS if name in g) for g in groups)
    if stated.get("warmup_steps", 0) > 1 and peak:
        unused.append(f"warmup_steps = {stated['warmup_steps']:g} is stated, and rates begin high")
    return decide(
        len(unused) <= limits.unused_max, "; ".join(unused), unused=len(unused), stated=len(stated)
    )


@decides("optim.decay-groups")
def decay_groups(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Where groups differ in decay, biases and gains of norms are in those without it."""
    groups = subject.training.optimizer.param_groups
    names = {id(p): n for n, p in subject.training.module.named_parameters()}
    owned = [(names.get(id(p), "?"), p.ndim, g) for g in groups for p in g["params"]]
    rows = [(name, ndim, group.get("weight_decay", 0.0)) for name, ndim, group in owned]
    decays = {decay for _, _, decay in rows}
    decayed = [n for n, ndim, decay in rows if ndim < 2 and decay > 0]
    text = (
        f"weight decay pulls {len(decayed)} bias(es) or gain(s) to zero: {', '.join(decayed[:4])}"
    )
    ok = len(decayed) <= limits.decayed_vectors_max or (
        len(decays) == 1 and max(decays) <= limits.uniform_decay_max
    )
    return decide(
        ok,
        text,
        decayed_vectors=len(decayed),
        groups=len(groups),
        weight_decay=max(decays, default=0.0),
    )


@decides("optim.reference-update")
def reference_update(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Ten updates of the real optimizer equal each parameter's declared rule written out in
    float64, with a zero gradient among them.

    AdamW is driven twice: with gradients of 0.1 to 10, and with those as many times its eps, where
    eps decides. The optimizer is built for the model's parameter names and devices, on tensors of a
    few entries. Each group's learning rate is multiplied by what brings its declared rate to RATE,
    so that rounding weighs the same for all. Where a parameter does not decay, a gradient that was
    always zero leaves it bit for bit.
    """
    small, make_optimizer = _few_entries(subject), subject.training.make_optimizer
    laws = {n: _law(subject.declared, n, p) for n, p in small.pairs}
    if moved := _moved_by_nothing(small, make_optimizer, laws):
        return failed(
            f"{moved[0]} does not decay and had zero gradients only, and moved", moved=len(moved)
        )
    first = {n: p.detach().clone() for n, p in small.pairs}
    errors: Errors = {}
    for tiny in (False, True):
        oracle = _driven(small, make_optimizer, laws, first, tiny)
        for n, p in small.pairs:
            off, law = p.detach().double() - oracle[n], laws[n]
            if RULES[law["rule"]].by_entry:
                _worst(errors, "error_over_lr", off.abs().max() / RATE, n)
            elif not tiny:
                kind = (
                    "muon_rel_error"
                    if law.get("dtype", "float32") == "float32"
                    else "muon_bf16_rel_error"
                )
                _worst(errors, kind, off.norm() / (oracle[n] - first[n].double()).norm(), n)
    return _within(limits, errors, "updates differ from the declared rule in float64")


def _worst(errors: Errors, kind: str, error: float | Tensor, where: str) -> None:
    """Keep the largest error of each kind; NaN is larger than any."""
    error = math.inf if math.isnan(error) else float(error)
    errors[kind] = max(errors.get(kind, (0.0, "")), (error, where))


def _within(limits: SimpleNamespace, errors: Errors, text: str) -> Verdict:
    """Green if the largest error of every kind is within the limit of the kind."""
    allowed = {kind: getattr(limits, f"{kind}_max") for kind in errors}
    over = [f"{at} by {e:.3g}" for kind, (e, at) in errors.items() if not e <= allowed[kind]]
    measured = {kind: error for kind, (error, _) in errors.items()}
    return decide(bool(errors) and not over, f"{text}: {', '.join(over)}", **measured)


def _driven(
    small: "_Parameters",
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
    optimizer, draw = make_optimizer(small), torch.Generator().manual_seed(7)
    declared = {id(p): laws[n]["lr"] for n, p in small.pairs}
    for group in (g for g in optimizer.param_groups if g["params"]):
        group["lr"] *= RATE / declared[id(group["params"][0])]
    for t in range(1, 11):
        for n, p in small.pairs:
            scale = 10.0 ** (t % 3 - 1) * (
                laws[n].get("eps", 1.0) if tiny and RULES[laws[n]["rule"]].by_entry else 1.0
            )
            gradient = (
                torch.zeros(p.shape) if t == 5 else torch.randn(p.shape, generator=draw) * scale
            )
            p.grad = gradient.to(p.device)
            oracle[n] = RULES[laws[n]["rule"]].update(
                oracle[n], p.grad.double(), memory[n], laws[n] | {"lr": RATE}, t
            )
        optimizer.step()
    return oracle


class _Parameters:
    """Tensors that name themselves as a module's parameters do."""

    def __init__(self, pairs: Sequence[tuple[str, nn.Parameter]]):
        self.pairs = pairs

    def named_parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        return self.pairs

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.pairs]


def _few_entries(subject: Subject) -> _Parameters:
    """The trainable parameters' names and devices on tensors of a few entries: wide where the
    model's are wide, tall where they are tall.
    """
    draw, named = torch.Generator().manual_seed(5), subject.training.module.named_parameters()
    return _Parameters(
        [
            (n, nn.Parameter(torch.randn(_few(p.shape), generator=draw).to(p.device)))
            for n, p in named
            if p.requires_grad
        ]
    )


def _few(shape: torch.Size) -> tuple[int, ...]:
    if len(shape) != 2:
        return (5,) * len(shape)
    return (6, 6) if shape[0] == shape[1] else (9, 6) if shape[0] > shape[1] else (6, 9)


def _moved_by_nothing(
    small: _Parameters, make_optimizer: Callable, laws: Mapping[str, Any]
) -> list[str]:
    """Names of parameters that do not decay and move in two updates with gradients of zero."""
    optimizer, before = make_optimizer(small), [p.detach().clone() for _, p in small.pairs]
    for _ in range(2):
        for _, p in small.pairs:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moved = [
        n
        for (n, p), kept in zip(small.pairs, before)
        if laws[n]["weight_decay"] == 0 and not torch.equal(p.detach(), kept)
    ]
    for (_, p), kept in zip(small.pairs, before):
        p.data.copy_(kept)
    return moved


# --- whole steps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """A parameter under its law; of its entries those in `places`, or all of a matrix."""

    parameter: Tensor
    law: Mapping[str, Any]
    places: slice | None

    def copy(self, tensor: Tensor) -> Tensor:
        """These entries of a tensor of the parameter's shape, on the CPU."""
        tensor = tensor.detach()
        kept = tensor if self.places is None else tensor.reshape(-1)[self.places]
        return kept.to("cpu", copy=True)


@decides("optim.train-step")
def train_step(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Whole train steps move each parameter by the declared clipping, schedule and rule, nothing
    else moves it, and each step reports what happened.

    Steps around the end of the warm-up, from fresh moments, under a maximum norm so low that every
    step clips; in the last, one matrix is frozen. The movement is worked out in float64 from the
    weights before the step and the gradients of backward, at the rate of its number, and clipped by
    the norm that it reports. AdamW is off by shares of the rate, beyond the rounding of the weight
    itself; Muon, in float32, by shares of the way that was to go. Other watchers inside a run see
    the report alone.
    """
    declared = subject.declared
    low = min(declared.max_grad_norm, LOW_NORM)
    updates_done = min(declared.schedule["warmup_steps"] - 1, declared.max_steps - TRAIN_STEPS)
    options = TraineeOptions(exact=True, updates_done=max(0, updates_done), max_grad_norm=low)
    trainee = subject.training.trainee(options)
    watched = _watched(trainee.model, declared)
    memory: dict[str, dict] = {name: {"t": 0} for name in watched}
    errors: Errors = {}
    for number in range(TRAIN_STEPS):
        if number == TRAIN_STEPS - 1:
            next(p for p in trainee.model.parameters() if p.ndim >= 2).requires_grad_(False)
        taken = _taken_step(trainee, watched, low)
        for name, (reported, happened) in taken.figures.items():
            error = abs(reported - happened) / max(abs(happened), 1e-30)
            where = f"{name} in step {taken.report.step}, {reported:.6g} for {happened:.6g},"
            _worst(errors, "report_rel_error", error, where)
        clip = min(1.0, low / (taken.report.grad_norm + 1e-6))
        rate = partial(
            closed_form, taken.report.step, schedule=declared.schedule, max_steps=declared.max_steps
        )
        for name, w in watched.items():
            law = w.law | {"lr": rate(peak=w.law["lr"])}
            before, after = w.copy(taken.before[name]), w.copy(w.parameter)
            move = Move(law, before, taken.gradients.get(name), after)
            kind, error = move_error(move, memory[name], clip)
            _worst(errors, kind, error, f"{name} in step {taken.report.step}")
    return _within(limits, errors, "a step did not do what is declared or reported")


def _watched(model: nn.Module, declared: Declared) -> dict[str, _Watched]:
    """Of a parameter whose rule is judged by entry SAMPLED entries, evenly spread; of whole
    matrices the smallest, MUON_ENTRIES entries or one.
    """
    watched, budget = {}, MUON_ENTRIES
    for name, p in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        law = _law(declared, name, p)
        if RULES[law["rule"]].by_entry:
            watched[name] = _Watched(p, law, slice(None, None, max(1, p.numel() // SAMPLED)))
        elif budget == MUON_ENTRIES or p.numel() <= budget:
            watched[name], budget = _Watched(p, law, None), budget - p.numel()
    return watched


@dataclass(frozen=True)
class _TakenStep:
    """One step: its report, by name the parameters before it and the gradients of watched ones as
    backward left them, and what it reports beside what was measured. Norms are global L2 in
    float64.
    """

    report: StepReport
    before: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    figures: Mapping[str, tuple[float, float]]


def _taken_step(trainee: Trainee, watched: Mapping[str, _Watched], max_norm: float) -> _TakenStep:
    """Take one step. Each gradient is read when autograd has added the last to it, before anything
    scales or replaces it.
    """
    named, batches = dict(trainee.model.named_parameters()), trainee.draw()
    trained = {name: p for name, p in named.items() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    squares: dict[str, float] = {}
    gradients: dict[str, Tensor] = {}

    def keep(name: str, p: Tensor) -> None:
        squares[name] = _square(p.grad)
        if name in watched:
            gradients[name] = watched[name].copy(p.grad)

    hooks = [p.register_post_accumulate_grad_hook(partial(keep, n)) for n, p in trained.items()]
    report = trainee.step(batches)
    for hook in hooks:
        hook.remove()
    norm = sum(squares.values()) ** 0.5
    left = sum(_square(p.grad) for p in trained.values() if p.grad is not None) ** 0.5
    n_valid = sum(int((b.labels != IGNORE).sum()) for b in batches)
    moved = [not torch.equal(p.detach(), before[name]) for name, p in named.items()]
    figures = {
        "the norm before clipping": (report.grad_norm, norm),
        "the norm after clipping": (report.clipped_grad_norm, left),
        "the norm that clipping left": (left, norm * min(1.0, max_norm / (norm + 1e-6))),
        "the number of labels": (report.n_valid_tokens, n_valid),
        "the share of tensors that moved": (report.changed_tensor_frac, sum(moved) / len(moved)),
    }
    rates = {
        f"the rate of {g['name']}": (report.group_lrs.get(g["name"], -1.0), g["lr"])
        for g in trainee.optimizer.param_groups
    }
    return _TakenStep(report, before, gradients, figures | rates)


def _square(gradient: Tensor) -> float:
    return float(gradient.detach().double().square().sum())


@dataclass(frozen=True)
class Move:
    """What one step did to a parameter: `law` has the rate of the step, `gradient` is as backward
    left it, None where there was none.
    """

    law: Mapping[str, Any]
    before: Tensor
    gradient: Tensor | None
    after: Tensor


def move_error(move: Move, memory: dict, clip: float) -> tuple[str, float]:
    """(kind of error, how far a parameter is from where its law takes it). Without a gradient it
    may not move at all. `memory` holds the moments and the count `t` of updates.
    """
    law, before = move.law, move.before.double()
    rule = RULES[law["rule"]]
    kind = "error_over_lr" if rule.by_entry else "muon_rel_error"
    if move.gradient is None:
        return kind, float("inf") if bool((move.after.double() - before).any()) else 0.0
    memory["t"] += 1
    there = rule.update(before, move.gradient.double() * clip, memory, law, memory["t"])
    off = move.after.double() - there
    if not rule.by_entry:
        return kind, float(off.norm() / (there - before).norm().clamp(min=1e-300))
    if not law["lr"]:
        return kind, float(off.abs().max())
    return kind, float((off.abs() - ULPS * before.abs()).clamp(min=0).max() / law["lr"])


# --- clipping -------------------------------------------------------------------------------------


@decides("optim.clip-norm")
class ClipNorm(RuntimeCheck):
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
def clip_spike(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A planted spike is scaled to the declared norm, in its own direction, in whichever parameter
    it is; a small gradient is left.
    """
    draw, max_norm = torch.Generator().manual_seed(3), subject.declared.max_grad_norm
    model = _Parameters(
        [(n, nn.Parameter(torch.zeros(s))) for n, s in (("a", (4, 3)), ("b", (5,)))]
    )

    def clipped(scale: float) -> tuple[Tensor, Tensor]:
        """Gradients of this scale before and after clipping, flat."""
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw) * scale
        before = torch.cat([p.grad.flatten() for p in model.parameters()])
        subject.training.clip(model)
        return before, torch.cat([p.grad.flatten() for p in model.parameters()])

    if not torch.equal(*clipped(1e-3)):
        return failed("a gradient below the maximum was changed")
    before, after = (g.double() for g in clipped(1e4))
    norm = float(after.norm())
    cosine = float(nn.functional.cosine_similarity(before, after, dim=0))
    if (
        abs(norm - max_norm) > limits.rel_excess_max * max_norm
        or cosine < 1 - limits.rel_excess_max
    ):
        return failed(
            f"a spike of norm {float(before.norm()):.3g} has norm {norm:.4g} after clipping",
            norm=norm,
            cosine=cosine,
        )
    missed = _spikes_missed(subject, limits.rel_excess_max)
    return decide(
        not missed,
        f"a spike in {', '.join(missed[:3])} alone is not clipped",
        norm=norm,
        cosine=cosine,
        missed=len(missed),
    )


def _spikes_missed(subject: Subject, rel_excess_max: float) -> list[str]:
    """Names of parameters in which a gradient a hundred times the maximum is not brought down to
    it, or is not in the norm.
    """
    missed, small, max_norm = [], _few_entries(subject), subject.declared.max_grad_norm
    for name, spiked in small.pairs:
        for _, p in small.pairs:
            p.grad = torch.full_like(p, 1e-9)
        spiked.grad = torch.ones_like(spiked) * (100 * max_norm / spiked.numel() ** 0.5)
        norm = subject.training.clip(small)
        exact = abs(float(spiked.grad.double().norm()) - max_norm) <= rel_excess_max * max_norm
        if not exact or abs(norm - 100 * max_norm) > rel_excess_max * norm:
            missed.append(name)
    return missed
