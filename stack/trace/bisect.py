"""Which operation is guilty of a difference: values of the good side are put into the bad run up to
a cut, and the end is judged.

The cut is found by halving, so of n points about log₂ n runs are needed. A cut that cures clears
every operation after it. The first and the last guilty operation are found apart; where they are
not the same, modules are exchanged until a minimal set cures.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stackproof.trace.compare import Spill, coarsest, common_points, difference, record, widest
from stackproof.trace.points import Point, select, sites
from stackproof.trace.tap import tap
from stackproof.trace.trace import run
from stackproof.trace.ways import Side

Check = Callable[[Tensor], bool]
# logits agree within this times ε·√(width·layers); two right computations of 2
# layers came within 0.15 of it
CLOSE = 4.0
# logits that are off by more are never called equal; in bfloat16 24 layers of
# width 1024 differ by 0.015
FAR = 0.05
UNITS = (
    "embed",
    "positions",
    "attention_norm",
    "attention",
    "ffn_norm",
    "ffn",
    "final_norm",
    "head",
)


@dataclass(frozen=True)
class Link:
    """One hypothesis of the chain, what became of it, and the numbers it rests on."""

    hypothesis: str
    verdict: Literal["eliminated", "kept"]
    evidence: dict[str, float | int | str]


@dataclass
class Bisection:
    """The first and the last guilty point (none where there is nothing to find), the modules that
    cure together, and how it was found.
    """

    guilty: tuple[Point, ...] = ()
    minimal_set: tuple[str, ...] = ()
    chain: list[Link] = field(default_factory=list)
    runs: int = 0
    tolerance: float | None = None
    conclusion: str = ""

    def say(self, hypothesis: str, kept: bool, **evidence: float | int | str) -> None:
        self.chain.append(
            Link(hypothesis, "kept" if kept else "eliminated", evidence | {"run": self.runs})
        )


class _Bench:
    """Runs of both sides with values of the other put in, judged by one check."""

    def __init__(
        self,
        good: Side,
        bad: Side,
        input_ids: Tensor,
        names: Sequence[str],
        check: Check | None,
        folder: Path,
    ):
        self.good, self.bad, self.input_ids = good, bad, input_ids
        self.spills = {}
        for key, one in (("good", good), ("bad", bad)):
            (folder / key).mkdir()
            self.spills[key] = Spill(folder / key)
            record(one, list(names), input_ids, self.spills[key])
        self.right = self.spills["good"].read("logits")
        layers = len({n.split(".")[1] for n in names if n.startswith("layers.")}) or 1
        rounding = CLOSE * coarsest(good, bad) * math.sqrt(widest(good, bad) * layers)
        self.tolerance = None if check else min(FAR, rounding)
        self.check = check or (
            lambda logits: difference(logits, self.right).rel_err <= self.tolerance
        )
        seen = {
            s.point.name: s.point for s in select(sites(bad.model, bad.where), names, bad.where)
        }
        there = [n for n in names if all(n in s.places for s in self.spills.values())]
        self.points = [seen[n] for n in there if seen[n].flows]
        self.found = Bisection(runs=2, tolerance=self.tolerance)

    def passes(self, host: Side, values: str, cut: int) -> tuple[bool, float]:
        """Whether `host` ends well with values of the other side at all points up to `cut`; and its
        distance from the good logits.
        """
        put = {p.name for p in self.points[: cut + 1]}
        spill = self.spills[values]

        def handler(point: Point, x: Tensor) -> Tensor | None:
            theirs = spill.read(point.name)
            return theirs.to(x.device).reshape(x.shape) if theirs.numel() == x.numel() else None

        with torch.no_grad(), host.around():
            inputs = host.inputs()
            with tap(host.model, sorted(put), handler, where=host.where):
                logits = run(host.model, self.input_ids, inputs)
        return self.judge(logits)

    def judge(self, logits: Tensor) -> tuple[bool, float]:
        self.found.runs += 1
        return self.check(logits), difference(logits, self.right).rel_err


def bisect(
    good: Side,
    bad: Side,
    input_ids: Tensor,
    check: Check | None = None,
    names: Iterable[str] | None = None,
) -> Bisection:
    """Find what makes `bad` end otherwise than `good` on the same ids (B, T).

    `check` says of logits (B, T, V) whether they are good; by default whether they are those of the
    good side up to rounding. With one guilty operation 3 + ⌈log₂ points⌉ runs are needed; of
    several the first and the last are named, and the smallest set of modules that cures when they
    are exchanged, where both sides are built alike.
    """
    common, _, _ = common_points(good, bad, names)
    with tempfile.TemporaryDirectory(prefix="stackproof-bisect-") as folder:
        bench = _Bench(good, bad, input_ids, common, check, Path(folder))
        found = bench.found
        distance = difference(bench.spills["bad"].read("logits"), bench.right).rel_err
        good_passes, bad_passes = (
            bench.check(bench.right),
            bench.check(bench.spills["bad"].read("logits")),
        )
        found.say("the good side passes the check", good_passes)
        found.say("the bad side fails the check", not bad_passes, rel_err=distance)
        if not good_passes or bad_passes:
            found.conclusion = (
                "the right side fails the check: nothing can be found by it"
                if not good_passes
                else "the side that is looked into passes the check: there is nothing to find"
            )
            return found
        if not _reached(bench):
            found.conclusion = "what is wrong lies behind the points looked at, or between them"
            return found
        last = _last(bench)
        first = last if last == 0 else _first(bench, last)
        found.guilty = tuple(bench.points[i] for i in dict.fromkeys((first, last)))
        found.conclusion = "one operation is guilty"
        if first != last:
            found.minimal_set = _minimal(bench)
            more = (
                ""
                if found.minimal_set
                else (
                    "; modules cannot be exchanged, as the sides are built otherwise, or that "
                    "does not cure"
                )
            )
            found.conclusion = (
                f"several operations are guilty, of which these are the first and the last{more}"
            )
    return found


def _reached(bench: _Bench) -> bool:
    """Whether what is wrong lies at or before the last point. Where that is the logits, it does."""
    if not bench.points:
        bench.found.say("what is wrong lies between points that can be put right", False)
        return False
    last = bench.points[-1]
    if last.slot == "logits":
        return True
    cured, distance = bench.passes(bench.bad, "good", len(bench.points) - 1)
    bench.found.say(f"all that is wrong lies up to {last.name}", cured, rel_err=distance)
    return cured


def _last(bench: _Bench) -> int:
    """Index of the last guilty point: right values up to there cure,
    and right values up to the one before do not.
    """
    low, high = -1, len(bench.points) - 1
    while high - low > 1:
        cut = (low + high) // 2
        cured, distance = bench.passes(bench.bad, "good", cut)
        name = bench.points[cut].name
        bench.found.say(f"something after {name} is wrong", not cured, rel_err=distance)
        low, high = (low, cut) if cured else (cut, high)
    return high


def _first(bench: _Bench, last: int) -> int:
    """Index of the first guilty point: wrong values up to there spoil the good side, and wrong
    values up to the one before do not.
    """
    name = bench.points[last].name
    well, distance = bench.passes(bench.good, "bad", last - 1)
    bench.found.say(f"something before {name} is wrong as well", not well, rel_err=distance)
    low, high = -1, last - 1
    if well:
        return last
    while high - low > 1:
        cut = (low + high) // 2
        well, distance = bench.passes(bench.good, "bad", cut)
        bench.found.say(
            f"something up to {bench.points[cut].name} is wrong", not well, rel_err=distance
        )
        low, high = (cut, high) if well else (low, cut)
    return high


# ---- several sites: modules are exchanged


def _units(bench: _Bench) -> list[str]:
    """Paths of modules that both sides have alike: norms, attentions, feed-forwards,
    embedding and head.
    """
    theirs = dict(bench.good.model.named_modules())
    return [
        name
        for name, module in bench.bad.model.named_modules()
        if name.rpartition(".")[2] in UNITS
        and type(theirs.get(name)) is type(module)
        and ".ffn." not in name
        and ".attention." not in name
    ]


def _cures(bench: _Bench, paths: Sequence[str]) -> bool:
    """Whether the bad side ends well with these modules of the good side in place of its own."""
    with torch.no_grad(), bench.bad.around(), ExitStack() as undo:
        for path in paths:
            _lend(bench.good.model.get_submodule(path), bench.bad.model.get_submodule(path), undo)
        cured, distance = bench.judge(run(bench.bad.model, bench.input_ids, bench.bad.inputs()))
    bench.found.say(
        f"what is wrong lies within {', '.join(paths) or 'nothing'}", cured, rel_err=distance
    )
    return cured


def _lend(module: nn.Module, to: nn.Module, undo: ExitStack) -> None:
    own = vars(to).get("forward")
    to.forward = module.forward
    undo.callback(
        lambda: to.__dict__.update(forward=own) if own is not None else to.__dict__.pop("forward")
    )


def _minimal(bench: _Bench) -> tuple[str, ...]:
    """A set of modules that cures and no part of which does, by ddmin;
    empty where exchanging all of them does not cure.

    Source: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002.
    """
    suspects = _units(bench)
    if not suspects or not _cures(bench, suspects):
        return ()
    parts = 2
    while len(suspects) > 1:
        size = math.ceil(len(suspects) / parts)
        groups = [suspects[i : i + size] for i in range(0, len(suspects), size)]
        smaller = next((g for g in groups if len(g) < len(suspects) and _cures(bench, g)), None)
        if smaller is not None:
            suspects, parts = smaller, 2
            continue
        rest = ([s for s in suspects if s not in g] for g in groups) if parts > 2 else iter(())
        smaller = next((r for r in rest if r and _cures(bench, r)), None)
        if smaller is not None:
            suspects, parts = smaller, max(parts - 1, 2)
        elif parts < len(suspects):
            parts = min(2 * parts, len(suspects))
        else:
            break
    return tuple(suspects)
