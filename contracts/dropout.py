"""Gate of dropout: what the configuration declares is what reaches the residual stream, with a new
draw every time. B batch, T tokens, D features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from types import SimpleNamespace

from torch import Tensor

from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run, worst
from stackproof.contracts.subject import MicroBatch, ResidualBlock, Subject, Trainee

STEPS, ROWS, TOKENS = 2, 1, 256  # of each micro-batch the first rows and tokens are compared
Draw = tuple[tuple[int, str], Tensor, Tensor]


@decides("model.dropout-law")
def law(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Every branch of every block drops the declared share, scales the rest to keep the mean, and
    no two masks are the same. With dropout 0 nothing may be dropped.
    """
    a, trainee = subject.declared.architecture, subject.training.trainee()
    draws = branch_draws(trainee, *(trainee.draw() for _ in range(STEPS)))
    dropout, n_layers = a["dropout"], a["n_layers"]
    branches = {where for where, _, _ in draws}
    if len(branches) < 2 * n_layers:
        return failed(
            f"only {len(branches)} of {2 * n_layers} branches were seen at work",
            branches=len(branches),
        )
    if min(int((given != 0).sum()) for _, given, _ in draws) < limits.entries_min:
        return not_run(
            f"a branch gave fewer than {limits.entries_min:g} numbers that are not 0, too few to "
            "judge"
        )
    worst_z = worst_scale = 0.0
    named = ""
    for where, given, added in draws:
        z = worst((worst_z, _rate_z(given, added, dropout)))
        scale_error = worst((worst_scale, _scale_error(given, added, dropout)))
        if z > worst_z or scale_error > worst_scale:
            named = f"layer {where[0]} {where[1]}"
        worst_z, worst_scale = z, scale_error
    alike = (
        _most_alike([(added != 0) | (given == 0) for _, given, added in draws]) if dropout else 0.0
    )
    ok = (
        worst_z <= limits.rate_z_max
        and worst_scale <= limits.scale_rel_error_max
        and alike <= limits.likeness_max
    )
    return decide(
        ok,
        f"dropout is declared as {dropout:g}; {named} is the furthest from it, and the two masks "
        f"most alike agree {alike:.2f} of the way from chance to equality",
        rate_z=worst_z,
        scale_rel_error=worst_scale,
        likeness=alike,
        draws=len(draws),
    )


def branch_draws(trainee: Trainee, *steps: Sequence[MicroBatch]) -> list[Draw]:
    """Of train steps on these micro-batches, in order: ((layer, attention or ffn), what the branch
    gave, what was added to the residual stream), both (T, D) float32.
    """
    draws: list[Draw] = []
    for layer, block in enumerate(trainee.residual_blocks()):
        _Watch(layer, draws).attach(block)
    for batches in steps:
        trainee.step(batches)
    return draws


@dataclass
class _Watch:
    """Keeps the residual stream around a block's branches and what they gave, and adds to `draws`
    when the block ends.
    """

    layer: int
    draws: list[Draw]
    seen: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, x_BTD: Tensor) -> None:
        self.seen[name] = x_BTD.detach()[:ROWS, :TOKENS].flatten(0, 1).float().cpu()

    def attach(self, block: ResidualBlock) -> None:
        for name, norm in (("start", block.attention_norm), ("middle", block.ffn_norm)):
            norm.register_forward_pre_hook(lambda _, inputs, name=name: self.keep(name, inputs[0]))
        for name, branch in (("attention", block.attention), ("ffn", block.ffn)):
            branch.register_forward_hook(lambda _, __, out_BTD, name=name: self.keep(name, out_BTD))
        block.on_output(self.end)

    def end(self, x_BTD: Tensor) -> None:
        self.keep("end", x_BTD)
        for branch, before, after in (("attention", "start", "middle"), ("ffn", "middle", "end")):
            added = self.seen[after] - self.seen[before]
            self.draws.append(((self.layer, branch), self.seen[branch], added))


def _rate_z(given: Tensor, added: Tensor, dropout: float) -> float:
    """Distance of the dropped share from the declared one, in standard errors; infinite if anything
    is dropped and nothing may be.
    """
    live = given != 0
    n, dropped = int(live.sum()), int((added[live] == 0).sum())
    if dropout == 0:
        # a number far below the stream's own rounds away
        return math.inf if dropped > n / 100 else 0.0
    return abs(dropped / n - dropout) / math.sqrt(dropout * (1 - dropout) / n)


def _scale_error(given: Tensor, added: Tensor, dropout: float) -> float:
    """Relative error of the factor by which what was kept is scaled;
    the declared one is 1 / (1 - dropout).
    """
    kept = added != 0
    factor = float(
        (added[kept] * given[kept]).double().sum()
        / (given[kept].double() ** 2).sum().clamp(min=1e-300)
    )
    return abs(factor * (1 - dropout) - 1)


def _most_alike(masks: list[Tensor]) -> float:
    """How far the two masks most alike are from chance agreement (0) to equality (1): draw by draw,
    token by token, feature by feature.
    """
    pairs = (
        [*combinations(masks, 2)]
        if len(masks) <= 32
        else [*pairwise(masks), *((masks[0], m) for m in masks[1:])]
    )
    neighbours = [(m[1:], m[:-1]) for m in masks[:8]] + [(m[:, 1:], m[:, :-1]) for m in masks[:8]]
    return worst(_likeness(a, b) for a, b in (*pairs, *neighbours) if a.shape == b.shape)


def _likeness(a: Tensor, b: Tensor) -> float:
    kept_a, kept_b = float(a.double().mean()), float(b.double().mean())
    chance = kept_a * kept_b + (1 - kept_a) * (1 - kept_b)
    agreement = float((a == b).double().mean())
    return (agreement - chance) / (1 - chance) if chance < 1 else 0.0
