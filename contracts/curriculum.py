"""Gates of the curriculum: rows come from the declared sources in the declared shares, and a
source is rewarded only for what all sources gain.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np

from stackproof.contracts.events import BatchDrawn, Event, Started, StepTaken
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    worst,
)
from stackproof.contracts.subject import Source, Subject

JUDGED_ROWS, TURN_ROWS = 8192, 256
TURNS, TREND = 90, 0.25  # nats per turn, ten times what the useful source adds to it
LEARNT_ROWS = 6 * TURN_ROWS
CAPS = {"useful": 1.0, "list": 1.0, "other": 1.0}


def _drawn(order, first: int, n: int) -> np.ndarray:
    """(sources, windows, epochs) of the next n samples, int64 (3, n)."""
    order.decide(first, first + n)
    draws = order.at(np.arange(first, first + n))
    return np.stack([draws.sources, draws.windows, draws.epochs])


def _stretch(order, first: int, n: int) -> np.ndarray:
    """As `_drawn`, with a turn of random losses after every TURN_ROWS rows where the
    order learns from losses.
    """
    losses = np.random.default_rng(7)
    parts = []
    for start in range(first, first + n, TURN_ROWS):
        parts.append(_drawn(order, start, min(TURN_ROWS, first + n - start)))
        if hasattr(order, "reward"):
            order.reward({s.name: float(losses.normal(5, 0.1)) for s in order.sources})
    return np.concatenate(parts, axis=1)


@decides("curriculum.order")
def order(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The run's sampler order: repeatable, warm-up and caps kept, shares in their bounds, windows
    once per epoch and from everywhere.

    Rows that are decided one at a time, over the end of the warm-up, are those that are decided all
    at once. A single source has all rows.
    """
    curriculum, warmup_rows = subject.curriculum, subject.curriculum.warmup_rows
    arms, declared = curriculum.sampler_order().sources, curriculum.declared_shares
    if max(len(arms), len(declared)) > 1 and (other := _undeclared(arms, declared)):
        return failed(other)
    if gap := _untiled(arms, curriculum.n_windows):
        return failed(gap)
    listed = [i for i, s in enumerate(arms) if s.name in curriculum.warmup_sources]
    warm = (
        _stretch(curriculum.sampler_order(), 0, min(warmup_rows, JUDGED_ROWS))
        if warmup_rows
        else np.zeros((3, 0), np.int64)
    )
    early = int((~np.isin(warm[0], listed)).sum())
    if early:
        return failed(
            f"{early} rows of the warm-up are of other sources than "
            f"{', '.join(curriculum.warmup_sources)}",
            early_rows=early,
        )
    before = curriculum.sampler_order().counts(warmup_rows)
    sources, windows, epochs = _stretch(curriculum.sampler_order(), warmup_rows, JUDGED_ROWS)
    if not np.array_equal(
        sources, _stretch(curriculum.sampler_order(), warmup_rows, JUDGED_ROWS)[0]
    ):
        return failed("the same seed gives two orders")
    for i, arm in enumerate(arms):
        mine = sources == i
        if message := _arm_fault(arm, int(before[i]), windows[mine], epochs[mine], limits):
            return failed(f"source {arm.name}: {message}", source=arm.name)
    n = min(warmup_rows, JUDGED_ROWS) + TURN_ROWS
    one, singly = curriculum.sampler_order(), curriculum.sampler_order()
    if not np.array_equal(
        _drawn(one, 0, n), np.concatenate([_drawn(singly, i, 1) for i in range(n)], axis=1)
    ):
        return failed("rows depend on how many of them are decided at a time")
    excess = worst(_bound_fault(arm, sources == i, len(arms), limits) for i, arm in enumerate(arms))
    fixed = not hasattr(curriculum.sampler_order(), "reward")
    share_error = _share_fault(arms, listed, warm[0], sources) if fixed else 0.0
    return decide_all(
        [
            not excess <= 0
            and f"a source leaves its bounds by {excess:.1f} rows in a window of "
            f"{limits.window_rows:g}",
            not share_error <= limits.share_abs_error_max
            and f"the share of a source is {share_error:.3f} away from the declared one",
        ],
        rows=JUDGED_ROWS,
        sources=len(arms),
        worst_excess_rows=excess,
        share_abs_error=share_error,
    )


def _share_fault(
    arms: Sequence[Source], listed: Sequence[int], warm: np.ndarray, rest: np.ndarray
) -> float:
    """Largest distance of a source's share of the rows from the declared one, in the warm-up and
    after it, beyond one row per source.
    """
    weights = np.array([arm.weight for arm in arms])
    caps, floors = (np.array([getattr(arm, k) for arm in arms]) for k in ("cap", "floor"))
    early = np.where(np.isin(np.arange(len(arms)), listed) & (caps > 0), weights, 0.0)
    if not early.any():
        early = (early == 0) * np.isin(np.arange(len(arms)), listed) * (caps > 0)
    errors = [0.0]
    for drawn, wanted in (
        (warm, early / max(early.sum(), 1e-300)),
        (rest, declared_share(weights, caps, floors)),
    ):
        if len(drawn):
            got = np.bincount(drawn, minlength=len(arms)) / len(drawn)
            errors.append(float(np.abs(got - wanted).max()) - len(arms) / len(drawn))
    return max(errors)


def declared_share(weights: np.ndarray, caps: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Shares (n,) proportional to weights between floors and caps, with sum 1: λ·weight, clipped,
    for the λ at which the clipped shares add up. Between the λ at which one more source reaches a
    bound, the sum is linear.
    """
    positive = weights > 0
    bounds = np.concatenate([caps[positive], floors[positive]]) / np.tile(weights[positive], 2)
    steps = np.unique(np.concatenate([[0.0], bounds]))
    sums = [np.clip(step * weights, floors, caps).sum() for step in steps]
    return np.clip(np.interp(1.0, sums, steps) * weights, floors, caps)


def _undeclared(arms, declared) -> str:
    """The first source with other shares than were declared, or an empty text."""
    held = {a.name: (a.weight, a.cap, a.floor) for a in arms}
    wrong = sorted(n for n in held.keys() | declared.keys() if held.get(n) != declared.get(n))
    parts = [
        f"{n} has weight, cap, floor {held.get(n)}, declared are {declared.get(n)}" for n in wrong
    ]
    return f"source {parts[0]}" if parts else ""


def _untiled(arms: Sequence[Source], n_rows: int) -> str:
    """The first source whose windows do not begin where those of the one before end, or an empty
    text: together they are all windows of the split, each once.
    """
    end = 0
    for arm in sorted(arms, key=lambda arm: (arm.first, arm.n_windows)):
        if arm.first != end:
            return f"source {arm.name} begins at window {arm.first}, those before end at {end}"
        end += arm.n_windows
    return "" if end == n_rows else f"the sources have {end} windows, the split has {n_rows}"


def _arm_fault(
    arm, before: int, windows: np.ndarray, epochs: np.ndarray, limits: SimpleNamespace
) -> str:
    """The fault in the windows drawn from one source, or an empty text."""
    if len(windows) and arm.cap == 0:
        return f"its cap is 0 and {len(windows)} rows are drawn from it"
    if ((windows < arm.first) | (windows >= arm.first + arm.n_windows)).any():
        return "rows of other sources are entered under it"
    if len(np.unique(np.stack([epochs, windows]), axis=1).T) != len(windows):
        return "a window is drawn twice in one epoch"
    if not np.array_equal(epochs, (before + np.arange(len(epochs))) // max(1, arm.n_windows)):
        return "an epoch begins before the last one is over"
    first = windows[: arm.n_windows] - arm.first
    if len(first) >= limits.uniformity_rows_min and arm.n_windows > 1:
        place = np.sort(first / (arm.n_windows - 1))
        ranks = np.arange(len(place))
        distance = max((place - ranks / len(place)).max(), ((ranks + 1) / len(place) - place).max())
        if distance > limits.uniformity_sigmas_max / math.sqrt(len(place)):
            return f"rows come from one end of it (Kolmogorov distance {distance:.2f})"
    return ""


def _bound_fault(arm, mine: np.ndarray, n_sources: int, limits: SimpleNamespace) -> float:
    """By how many rows the worst window leaves [floor, cap], the granted slack of
    one row per source aside.
    """
    window = int(limits.window_rows)
    if len(mine) < window:
        return 0.0
    total = np.concatenate([[0], np.cumsum(mine)])
    counts = total[window:] - total[:-window]
    slack = limits.slack_rows_per_source * n_sources
    return float(max(counts.max() - arm.cap * window, arm.floor * window - counts.min()) - slack)


def _play(
    bandit, own_drop: float, scale: float = 1.0, used_up: int = TURNS, trend: float = 0.0
) -> list[str]:
    """The focus of every turn in a world of three sources: turns of "useful" lower every loss,
    turns of "list" lower their own by `own_drop` at the cost of "other", so that the sum stays, and
    turns of "other" do nothing. From turn `used_up` on it is "other" that lowers every loss, and
    "useful" does nothing. Every turn lowers every loss by `trend`, whichever it is.
    """
    losses = dict.fromkeys(("useful", "list", "other"), 5.0 * scale)
    noise = np.random.default_rng(5)
    focus = []
    bandit.reward(losses)
    for turn in range(TURNS):
        chosen = bandit.sources[bandit.focus].name
        focus.append(chosen)
        drift = noise.normal(trend, 1e-3) * scale
        losses = {n: v - drift for n, v in losses.items()}
        if chosen == ("useful" if turn < used_up else "other"):
            losses = {n: v - 0.02 * scale for n, v in losses.items()}
        if chosen == "list":
            losses |= {
                "list": losses["list"] - own_drop * scale,
                "other": losses["other"] + own_drop * scale,
            }
        bandit.reward(losses)
    return focus


def _other_choices(bandit) -> int:
    """Turns of random losses after which the focus is not the declared choice: a source never
    tried, in order, else the one of the highest mean + exploration · √(log(1 + Σ pulls) / pulls).
    Pulls fade by the declared discount in every turn but the first, which has no loss to compare
    with.

    Source: Garivier and Moulines, arXiv:0805.3415.
    """
    losses, wrong, before = np.random.default_rng(3), 0, None
    for _ in range(TURNS):
        bandit.reward({s.name: float(losses.normal(5, 0.1)) for s in bandit.sources})
        state = bandit.state_dict()
        arms = state["arms"]
        wrong += before is not None and not _faded(before, arms, bandit.cfg.discount)
        before = state
        untried = [name for name, arm in arms.items() if not arm["pulls"]]
        spread = math.log(1 + sum(arm["pulls"] for arm in arms.values()))
        bounds = {
            name: arm["rewards"] / arm["pulls"]
            + bandit.cfg.exploration * math.sqrt(spread / arm["pulls"])
            for name, arm in arms.items()
            if arm["pulls"]
        }
        wrong += state["focus"] != (untried[0] if untried else max(bounds, key=bounds.get))
    return wrong


def _faded(before: Mapping, arms: Mapping[str, Mapping[str, float]], discount: float) -> bool:
    """Whether a turn has faded the pulls of every source and credited the one in focus."""
    return all(
        math.isclose(arm["pulls"], discount * was + (name == before["focus"]), rel_tol=1e-9)
        for name, arm in arms.items()
        for was in [before["arms"][name]["pulls"]]
    )


def _share_error(bandit) -> float:
    """Worst number of rows by which a source misses its share of a turn: its weight's before the
    first turn, then what the focus leaves.
    """
    weights = np.array([s.weight for s in bandit.sources])
    base, errors = weights / weights.sum(), []
    for turn in range(len(base) + 1):
        focused = bandit.cfg.focus_share * (np.arange(len(base)) == bandit.focus)
        share = base if turn == 0 else focused + (1 - bandit.cfg.focus_share) * base
        counts = np.bincount(_drawn(bandit, turn * TURN_ROWS, TURN_ROWS)[0], minlength=len(base))
        errors.append(float(np.abs(counts - TURN_ROWS * share).max()))
        bandit.reward(dict.fromkeys((s.name for s in bandit.sources), 5.0 - turn))
    return worst(errors)


@decides("curriculum.reward")
def reward(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A source that lowers only its own loss is not rewarded, and the scale of the losses does not
    matter.

    A source that lowers every loss from half of the turns on, and none before, is found again. A
    useful source is also found where all losses fall whatever is read, as they do in training. The
    rows of a turn follow its focus.
    """
    make_bandit = partial(subject.curriculum.bandit, CAPS)
    plain, cheap = _play(make_bandit(), 0.0), _play(make_bandit(), 0.4)
    if plain != cheap:
        return failed(
            "a source earns by lowering its own loss at the cost of the others",
            list_turns=cheap.count("list"),
        )
    if any(_play(make_bandit(), 0.0, scale=scale) != plain for scale in (1024.0, 1 / 1024)):
        return failed(
            "the choice of sources depends on the scale of the losses, so rewards are not "
            "normalised"
        )
    if _play(make_bandit(), 0.0) != plain:
        return failed("the same losses give two curricula")
    if (off := _share_error(make_bandit())) > limits.slack_rows_per_source * len(
        make_bandit().sources
    ):
        return failed(
            f"the rows of a turn do not follow its focus: a source is {off:.1f} of {TURN_ROWS} "
            "rows off its share",
            off_rows=off,
        )
    if wrong := _other_choices(make_bandit()):
        return failed(
            f"in {wrong} of {TURNS} turns the focus is not the source with the highest upper "
            "confidence bound, or one that was never tried",
            other_choices=wrong,
        )
    later = _play(make_bandit(), 0.0, used_up=TURNS // 2)[TURNS // 2 :]
    worlds = (plain, _play(make_bandit(), 0.0, trend=TREND))
    useful, untried = min(w.count("useful") / TURNS for w in worlds), 3 - len(set(plain))
    regained = later.count("other") / len(later)
    return decide(
        useful >= limits.useful_turns_min and regained >= limits.regained_turns_min and not untried,
        f"the source that lowers every loss had {useful:.0%} of the turns, one that does so later "
        f"{regained:.0%} of those after it, {untried} source(s) none",
        useful_turns=useful,
        regained_turns=regained,
        list_turns=plain.count("list") / len(plain),
    )


@decides("curriculum.state")
def state(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A restored curriculum draws and learns as one that was never stopped; sources that the
    configuration does not have are dropped.

    It is saved inside a turn of the warm-up and inside a later one, and both go through the same
    turns of losses after that.
    """
    curriculum, make_bandit = subject.curriculum, partial(subject.curriculum.bandit, CAPS)
    for make in (make_bandit, curriculum.sampler_order):
        for saved_at in (max(2, min(curriculum.warmup_rows, LEARNT_ROWS)), LEARNT_ROWS):
            whole, restored = make(), make()
            _stretch(whole, 0, saved_at // 2)
            _drawn(whole, saved_at // 2, saved_at - saved_at // 2)
            dropped = restored.load_state_dict(whole.state_dict())
            if dropped or not np.array_equal(
                *(_stretch(o, saved_at, LEARNT_ROWS) for o in (whole, restored))
            ):
                return failed(
                    "a restored curriculum draws other rows than one that was never stopped",
                    dropped=len(dropped),
                )
            if whole.state_dict() != restored.state_dict():
                return failed(
                    "a restored curriculum has learnt something else from the same turns than one "
                    "that was never stopped"
                )
    saved = make_bandit()
    _drawn(saved, 0, 500)
    document = saved.state_dict()
    zombie = dict(next(iter(document["arms"].values())))
    document["arms"] |= {"zombie": {**zombie, "pulls": 1.546, "drawn": 40}}
    revived = curriculum.bandit(CAPS | {"list": 0.0})
    dropped = revived.load_state_dict(document)
    drawn = {revived.sources[i].name for i in _drawn(revived, 500, 1000)[0].tolist()}
    arms = set(revived.state_dict()["arms"])
    return decide(
        set(dropped) == {"zombie", "list"} and drawn == arms == {"useful", "other"},
        f"sources {', '.join(sorted(drawn | arms))} take part, of a state with a source that is "
        "gone and one whose cap is 0 now",
        dropped=len(dropped),
        arms=len(arms),
    )


@decides("curriculum.draws")
class Draws(RuntimeCheck):
    """Every row belongs to its declared source, the warm-up draws from its own sources, and shares
    stay within caps and floors over a rolling window.
    """

    events = (Started, BatchDrawn)
    kept = ("recent", "bounds")

    def __init__(self, limits):
        super().__init__(limits)
        self.plan, self.bounds = None, []
        self.recent: deque[int] = deque(maxlen=int(limits.window_rows))

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            bounds = [[a["name"], a["cap"], a["floor"]] for a in event.plan["sources"]]
            if bounds != self.bounds:  # a changed mixture is judged from its first row
                self.recent.clear()
            self.plan, self.bounds = event.plan, bounds
            return None
        arms = self.plan["sources"]
        for row, (source, window) in enumerate(
            zip(event.sources, event.sample_ids), start=event.cursor_before
        ):
            arm = arms[source]
            if not arm["first"] <= window < arm["first"] + arm["n_windows"]:
                return failed(
                    f"step {event.step}: window {window} is declared as one of source "
                    f"{arm['name']}, which does not hold it"
                )
            if row < self.plan["warmup_rows"] and arm["name"] not in self.plan["warmup_sources"]:
                return failed(
                    f"step {event.step}: a row of {arm['name']} in the warm-up",
                    row=row,
                    source=arm["name"],
                )
            if arm["cap"] == 0:
                return failed(
                    f"step {event.step}: a row of {arm['name']}, whose cap is 0", source=arm["name"]
                )
            if row >= self.plan["warmup_rows"]:
                self.recent.append(source)
        if len(event.sources) != len(event.sample_ids):
            return failed(
                f"step {event.step}: {len(event.sample_ids)} rows, but {len(event.sources)} "
                "sources of rows"
            )
        return self._bounds(event.step, arms)

    def _bounds(self, step: int, arms: list[dict]) -> Verdict:
        n, slack = len(self.recent), self.limits.slack_rows_per_source * len(arms)
        if n < self.limits.judged_rows_min or len(arms) == 1:
            return decide(True, "", rows=n, sources=len(arms))
        counts = np.bincount(np.array(self.recent), minlength=len(arms))
        over = [(c - a["cap"] * n - slack, a["name"]) for c, a in zip(counts, arms)]
        under = [(a["floor"] * n - c - slack, a["name"]) for c, a in zip(counts, arms)]
        furthest = max(over + under)
        return decide(
            furthest[0] <= 0,
            f"step {step}: source {furthest[1]} is outside its bounds by {furthest[0]:.1f} rows in "
            f"the last {n}",
            rows=n,
            sources=len(arms),
            worst_excess_rows=float(furthest[0]),
        )


@decides("curriculum.gradient-shock")
class GradientShock(RuntimeCheck):
    """After the mixture of sources changes, the gradient norm stays within a multiple of its recent
    median.
    """

    events = (BatchDrawn, StepTaken)
    kept = ("norms", "mix", "since_switch", "switches", "worst")

    def __init__(self, limits):
        super().__init__(limits)
        self.norms: deque[float] = deque(maxlen=int(limits.median_steps))
        self.mix: list[float] = []
        self.since_switch, self.switches, self.worst = 10**9, 0, 0.0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, BatchDrawn):
            self._note_mixture(event)
            return None
        median = (
            statistics.median(self.norms)
            if len(self.norms) >= self.limits.known_steps_min
            else None
        )
        near = self.since_switch < self.limits.steps_after_switch
        ratio = event.grad_norm / median if near and median else 0.0
        self.worst = max(self.worst, ratio)
        if math.isfinite(event.grad_norm):
            self.norms.append(event.grad_norm)
        return decide(
            ratio <= self.limits.norm_over_median_max,
            f"step {event.step}: the gradient norm is {ratio:.1f} times its median right after "
            "the sources changed",
            ratio=ratio,
            worst_ratio=self.worst,
            switches=self.switches,
        )

    def _note_mixture(self, event: BatchDrawn) -> None:
        counts = np.bincount(np.array(event.sources, np.int64), minlength=len(self.mix) or 1)
        mix = (counts / max(1, counts.sum())).tolist()
        before = self.mix + [0.0] * (len(mix) - len(self.mix))
        changed = sum(abs(a - b) for a, b in zip(mix, before)) / 2
        self.since_switch += 1
        if self.mix and changed >= self.limits.share_change_min:
            self.since_switch, self.switches = 0, self.switches + 1
        self.mix = mix
