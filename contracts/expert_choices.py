"""Gates of what routers choose in a run: no choice is lost without need, and no router collapses.

B rows, R tokens, E experts, k top_k, L layers with experts, T tokens of a row
"""

from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.declared import hard_capacity
from stackproof.contracts.events import Event, Started, StepTaken
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    not_run,
    worst,
)
from stackproof.contracts.loss import IGNORE
from stackproof.contracts.moe import (
    no_experts,
    random_rows,
    router_gradients,
    watching_routers,
)
from stackproof.contracts.oracle import room
from stackproof.contracts.subject import MicroBatch, Subject

PADDING = -1  # document id of padding


# --- the rows of a run ----------------------------------------------------------------------------


@decides("moe.run-choices")
def run_choices(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """In one step of the run, experts read every token and no padding; the step reports the choices
    of its routers, and as dropped those for which their expert has no room. Padding changes no
    gradient of a router; where blocks pass tokens by, this alone is judged.
    """
    architecture = subject.declared.architecture
    if reason := no_experts(architecture):
        return not_run(reason)
    ffn, has_term = architecture["ffn"], architecture["ffn"]["balance"]["kind"] == "auxiliary-loss"
    padding_error = _padding_error(subject) if has_term else 0.0
    padding = not padding_error <= limits.padding_rel_error_max and (
        "padding behind a row changes the gradients of its routers"
    )
    if hard_capacity(architecture):
        # Blocks pass tokens by, so that the rows of a router are not known.
        if not has_term:
            return not_run("model.depth passes tokens by, and there is no balance term")
        return decide_all([padding], judged="padding", padding_rel_error=padding_error)
    trainee = subject.training.trainee()
    batches, route = trainee.draw(), subject.experts.functions.route
    biases = {n: b.clone() for n, b in trainee.model.named_buffers() if b.ndim == 1}
    calls: dict[str, list[Tensor]] = defaultdict(list)
    with watching_routers(trainee.model, lambda name, logits_RE: calls[name].append(logits_RE)):
        report = trainee.step(batches)
    strangers, reported = 0, zip(calls, report.expert_shares, report.dropped_choice_fracs)
    share_error = dropped_error = 0.0
    for name, shares, dropped_frac in reported:
        # Activation checkpointing computes each forward a second time.
        logits = calls[name][:: len(calls[name]) // len(batches)]
        rows = [_token_rows(batch) for batch in batches]
        strangers += sum(abs(len(x) - len(row)) for x, row in zip(logits, rows))
        if strangers:
            continue
        bias_E = biases.get(f"{name}.selection_bias")
        counts = [
            _counts(route(x, ffn["top_k"], bias_E)[0].cpu(), row_R, ffn["n_experts"])
            for x, row_R in zip(logits, rows)
        ]
        chosen_E = sum(c.sum(0) for c in counts)
        capacity = room(ffn, batches[0].input_ids.shape[1])
        over = [0 if capacity is None else (c - capacity).clamp(min=0).sum() for c in counts]
        got_E = torch.tensor(shares, dtype=torch.float64)
        share_error = worst((share_error, float((got_E - chosen_E / chosen_E.sum()).abs().max())))
        wanted = float(sum(over) / chosen_E.sum())
        dropped_error = worst((dropped_error, abs(dropped_frac - wanted)))
    return decide_all(
        [
            strangers > 0 and f"experts read {strangers} tokens too many or too few of a step",
            not share_error <= limits.share_abs_error_max
            and "the step reports other choices than those of its routers",
            not dropped_error <= limits.share_abs_error_max
            and "the step drops other choices than those for which an expert has no room",
            padding,
            len(calls) != len(report.expert_shares) and "the step reports other layers",
        ],
        strangers=strangers,
        share_abs_error=share_error,
        dropped_abs_error=dropped_error,
        padding_rel_error=padding_error,
    )


def _token_rows(batch: MicroBatch) -> Tensor:
    """The row of every token that is not padding, (R,) int64."""
    ids_BT = batch.document_ids if batch.document_ids is not None else batch.input_ids
    return (ids_BT >= 0).nonzero()[:, 0]


def _counts(experts_Rk: Tensor, row_R: Tensor, n_experts: int) -> Tensor:
    """Choices of each expert by row, (B, E) int64."""
    at = row_R[:, None] * n_experts + experts_Rk
    n_rows = int(row_R.max()) + 1
    return torch.bincount(at.flatten(), minlength=n_rows * n_experts).view(n_rows, n_experts)


def _padding_error(subject: Subject) -> float:
    """How much half a row of padding changes the gradients of the routers, relative to their norm.
    The balance term has weight 1.
    """
    (row,) = random_rows(subject, 1)
    half = row.input_ids.shape[1] // 2
    ids, labels = row.input_ids[:, :half], row.labels[:, :half]
    document = torch.zeros_like(ids)
    padded = MicroBatch(
        torch.cat((ids, torch.zeros_like(ids)), 1),
        torch.cat((labels, torch.full_like(ids, IGNORE)), 1),
        torch.cat((document, torch.full_like(ids, PADDING)), 1),
    )
    found = [
        router_gradients(subject, 1.0, [batch])[1]
        for batch in (MicroBatch(ids, labels, document), padded)
    ]
    return worst(float((g - w).norm() / w.norm()) for w, g in zip(*(f.values() for f in found)))


# --- at every step --------------------------------------------------------------------------------


@decides("moe.dropped-choices")
class DroppedChoices(RuntimeCheck):
    """Without a limit of capacity no choice is dropped; with one, no layer drops far more than the
    limit makes necessary, for many steps in a row after the warm-up.

    `Started.plan` holds warmup_steps, expert_layers and capacity_factor.
    """

    events = (Started, StepTaken)
    kept = ("over",)

    def __init__(self, limits):
        super().__init__(limits)
        self.plan = None
        self.over: dict[str, int] = {}

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.plan = event.plan
            return None
        if not (layers := self.plan["expert_layers"]):
            return not_run("the model has no experts")
        if len(fracs := event.dropped_choice_fracs) != layers:
            return failed(f"step {event.step}: no dropped choices of {layers} layers")
        factor, most = self.plan["capacity_factor"], max(fracs)
        layer = fracs.index(most)
        if factor is None:
            text = f"step {event.step}: layer {layer} drops choices, and no limit is declared"
            return decide(most == 0, text, dropped_frac=most)
        kept = min(1.0, factor)  # of evenly distributed choices
        ceiling = 1 - kept + self.limits.excess_frac_max * kept
        if event.step > self.plan["warmup_steps"]:
            self.over = {
                str(i): self.over.get(str(i), 0) + 1
                for i, frac in enumerate(fracs)
                if not frac <= ceiling
            }
        steps = max(self.over.values(), default=0)
        return decide(
            steps <= self.limits.steps_max,
            f"step {event.step}: a layer drops more than {ceiling:.0%} of its choices for {steps} "
            f"steps (now layer {layer}: {most:.0%}); model.ffn.capacity_factor is {factor:g}",
            steps=steps,
            dropped_frac=most,
        )


@decides("moe.router-collapse")
class RouterCollapse(RuntimeCheck):
    """In no layer one expert takes nearly all tokens, and no expert none,
    for many steps in a row after the warm-up.

    `Started.plan` holds warmup_steps, expert_layers, n_experts and top_k; 0 layers for a model
    without experts, of which nothing is judged. While the learning rate still rises routers hardly
    move, and what an untrained one prefers is not collapse.
    """

    events = (Started, StepTaken)
    kept = ("crowded", "idle")

    def __init__(self, limits):
        super().__init__(limits)
        self.plan = None
        self.crowded: dict[str, int] = {}
        self.idle: dict[str, int] = {}

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.plan = event.plan
            return None
        layers, n_experts, top_k = (
            self.plan[key] for key in ("expert_layers", "n_experts", "top_k")
        )
        if not layers:
            return not_run("the model has no experts")
        if [len(shares) for shares in event.expert_shares] != [n_experts] * layers:
            return failed(
                f"step {event.step}: no shares of {layers} layers with {n_experts} experts",
                layers=len(event.expert_shares),
            )
        if top_k == n_experts:
            return not_run("every token visits every expert")
        visited = {
            f"{i}.{e}": s * top_k
            for i, shares in enumerate(event.expert_shares)
            for e, s in enumerate(shares)
        }
        even = top_k / n_experts
        ceiling = even + self.limits.excess_frac_max * (1 - even)
        if event.step > self.plan["warmup_steps"]:
            floor = self.limits.share_over_even_min * even
            crowds = [
                str(i)
                for i, shares in enumerate(event.expert_shares)
                if not max(shares) * top_k <= ceiling
            ]
            self.crowded = {layer: self.crowded.get(layer, 0) + 1 for layer in crowds}
            self.idle = {
                at: self.idle.get(at, 0) + 1 for at, frac in visited.items() if not frac >= floor
            }
        return self._judge(event.step, visited)

    def _judge(self, step: int, visited: Mapping[str, float]) -> Verdict:
        runs = {
            (state, at): n
            for state, counts in (("crowded", self.crowded), ("idle", self.idle))
            for at, n in counts.items()
        }
        (state, at), steps = max(
            runs.items(), key=lambda item: item[1], default=(("even", "none"), 0)
        )
        layer, _, expert = at.partition(".")
        # whichever expert it is: a router that sends all tokens now here,
        # now there has collapsed as well
        if state == "crowded":
            expert = max(
                (a for a in visited if a.startswith(f"{layer}.")), key=visited.__getitem__
            ).partition(".")[2]
        taken = visited.get(f"{layer}.{expert}", 0.0)
        return decide(
            steps <= self.limits.steps_max,
            f"step {step}: expert {expert} of layer {layer} is {state} for {steps} steps "
            f"({taken:.1%} of tokens visit it)",
            steps=steps,
            busiest_frac=max(visited.values()),
            idlest_frac=min(visited.values()),
        )
