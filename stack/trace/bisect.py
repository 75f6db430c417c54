"""Find the operation that causes a difference: values of the good run replace those
of the bad run up to a cut.

Bisection finds the cut in about log₂ n runs of n points. A cut that cures clears every operation
after it. The first and the last guilty operation are found separately; if they differ, modules are
exchanged until a minimal set cures.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from stackproof.trace.compare import (
    Spill,
    coarsest,
    common_points,
    difference,
    fitted,
    record,
    widest,
)
from stackproof.trace.hooks import replaced
from stackproof.trace.model_variant import ModelVariant
from stackproof.trace.points import Point, sites

Check = Callable[[Tensor], bool]
# tolerance of logits, times ε·√(width·layers); two correct computations of 2
# layers reached 0.15 of it
CLOSE = 4.0
FAR = 0.05  # upper limit of that tolerance; in bfloat16 24 layers of width 1024 differ by 0.015
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
    """One hypothesis of the chain, its verdict, and the numbers for it."""

    hypothesis: str
    verdict: Literal["eliminated", "kept"]
    evidence: dict[str, float | int | str]


@dataclass
class Bisection:
    """The first and the last guilty point (none if nothing was found),
    the modules that cure together, and the chain.
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
    """Runs of both variants with values of the other one, judged by one check."""

    def __init__(
        self,
        good: ModelVariant,
        bad: ModelVariant,
        input_ids: Tensor,
        names: Sequence[str],
        check: Check | None,
        file: BinaryIO,
    ):
        self.good, self.bad, self.input_ids = good, bad, input_ids
        self.spills = {}
        for key, one in (("good", good), ("bad", bad)):
            self.spills[key] = Spill(file)
            record(one, list(names), input_ids, self.spills[key])
        self.right = self.spills["good"].read("logits")
        layers = len({n.split(".")[1] for n in names if n.startswith("layers.")}) or 1
        rounding = CLOSE * coarsest(good, bad) * math.sqrt(widest(good, bad) * layers)
        self.tolerance = None if check else min(FAR, rounding)
        self.check = check or (
            lambda logits: difference(logits, self.right).rel_err <= self.tolerance
        )
        self.points = [
            s.point
            for s in sites(bad.model, bad.where, names)
            if s.point.flows and all(s.point.name in x.places for x in self.spills.values())
        ]
        self.found = Bisection(runs=2, tolerance=self.tolerance)

    def passes(self, host: ModelVariant, values: str, cut: int) -> tuple[bool, float]:
        """Whether `host` passes with the values of variant `values` at all points up to `cut`;
        and its error.
        """
        spill, names = self.spills[values], sorted({p.name for p in self.points[: cut + 1]})
        with (
            torch.no_grad(),
            host.running(
                self.input_ids, names, lambda p, x: fitted(spill.read(p.name), x)
            ) as logits,
        ):
            return self.judge(logits)

    def judge(self, logits: Tensor) -> tuple[bool, float]:
        self.found.runs += 1
        return self.check(logits), difference(logits, self.right).rel_err


def bisect(
    good: ModelVariant,
    bad: ModelVariant,
    input_ids: Tensor,
    check: Check | None = None,
    names: Iterable[str] | None = None,
) -> Bisection:
    """Find the operations that make the logits of `bad` differ from those of
    `good` on the same ids (B, T).

    `check` returns whether logits (B, T, V) are good; default: equal to those of `good` up to
    rounding. One guilty operation needs 3 + ⌈log₂ points⌉ runs. Of several, the first and the last
    are named, and the smallest set of modules whose exchange cures, if both models have the same
    modules.
    """
    common, _, _ = common_points(good, bad, names)
    with tempfile.TemporaryFile() as file:
        bench = _Bench(good, bad, input_ids, common, check, file)
        found = bench.found
        wrong = bench.spills["bad"].read("logits")
        distance = difference(wrong, bench.right).rel_err
        good_passes, bad_passes = bench.check(bench.right), bench.check(wrong)
        found.say("the good side passes the check", good_passes)
        found.say("the bad side fails the check", not bad_passes, rel_err=distance)
        if not good_passes or bad_passes:
            found.conclusion = (
                "the reference side fails the check, so the check cannot locate an error"
                if not good_passes
                else "the tested side passes the check, so there is no error to locate"
            )
            return found
        if not _reached(bench):
            found.conclusion = "the error lies after the traced points, or between them"
            return found
        last = _last(bench)
        first = last if last == 0 else _first(bench, last)
        found.guilty = tuple(bench.points[i] for i in dict.fromkeys((first, last)))
        found.conclusion = "one operation is guilty"
        if first != last:
            found.minimal_set = _minimal(bench)
            found.conclusion = (
                "several operations are guilty, of which these are the first and the last"
            )
            if not found.minimal_set:
                found.conclusion += (
                    "; exchanging modules does not cure, or the sides have different modules"
                )
    return found


def _reached(bench: _Bench) -> bool:
    """Whether the error lies at or before the last point; always true if that is the logits."""
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
    """Index of the last guilty point: good values up to it cure,
    good values up to the one before do not.
    """
    return _lowest(bench, bench.bad, "good", len(bench.points) - 1, "something after {} is wrong")


def _lowest(bench: _Bench, host: ModelVariant, values: str, high: int, hypothesis: str) -> int:
    """The lowest cut, by bisection, at which the values of the other variant cure the bad host, or
    break the good one; `high` is known to do so.
    """
    low = -1
    while high - low > 1:
        cut = (low + high) // 2
        passes, distance = bench.passes(host, values, cut)
        bench.found.say(hypothesis.format(bench.points[cut].name), not passes, rel_err=distance)
        low, high = (low, cut) if passes == (host is bench.bad) else (cut, high)
    return high


def _first(bench: _Bench, last: int) -> int:
    """Index of the first guilty point: bad values up to it break the good run,
    bad values up to the one before do not.
    """
    name = bench.points[last].name
    well, distance = bench.passes(bench.good, "bad", last - 1)
    bench.found.say(f"something before {name} is wrong as well", not well, rel_err=distance)
    if well:
        return last
    return _lowest(bench, bench.good, "bad", last - 1, "something up to {} is wrong")


# ---- several guilty operations: exchange modules


def _units(bench: _Bench) -> list[str]:
    """Paths of modules of the same type in both models: norms, attentions, feed-forwards,
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
    """Whether `bad` passes with these modules of `good` in place of its own."""
    good, bad = bench.good.model, bench.bad.model

    @contextmanager
    def exchanged() -> Iterator[None]:
        with bench.bad.around(), ExitStack() as undo:
            for path in paths:
                undo.enter_context(
                    replaced(bad.get_submodule(path), "forward", good.get_submodule(path).forward)
                )
            yield

    with torch.no_grad(), replace(bench.bad, around=exchanged).running(bench.input_ids) as logits:
        cured, distance = bench.judge(logits)
    bench.found.say(
        f"what is wrong lies within {', '.join(paths) or 'nothing'}", cured, rel_err=distance
    )
    return cured


def _minimal(bench: _Bench) -> tuple[str, ...]:
    """A minimal set of modules whose exchange cures, by ddmin;
    empty if exchanging all of them does not cure.

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
