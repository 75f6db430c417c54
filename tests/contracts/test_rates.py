"""How often a statistical gate is wrong, in both directions: each figure in a gate's `rates` is
measured here, or in the test it names.

A rate of 0 in n trials is stated as 3/n, its upper bound at 95 percent.
Every simulation has its own seed.
"""

import dataclasses
import functools
import itertools
import math
import pydoc_data.topics
import random
import statistics
from types import SimpleNamespace

import numpy as np
import torch

from stackproof.contracts.coherence import Dominance, Loops, coherence
from stackproof.contracts.curriculum import GradientShock, _arm_fault
from stackproof.contracts.evaluation import OverfitOnset
from stackproof.contracts.events import BatchDrawn, Evaluated, RowHashes, Sampled, Started
from stackproof.contracts.expert_choices import RouterCollapse
from stackproof.contracts.gate import call_check, limits_of
from stackproof.contracts.initial import _law_z
from stackproof.contracts.memorization import Memorized, chance_of
from stackproof.contracts.rows import FreshRows
from stackproof.contracts.runtime import LossNotConstant, LossSpike, Trend
from stackproof.contracts.subject import DataLoader, Subject
from stackproof.data.sampler import Source
from tests.contracts.test_dropout import Replayed
from tests.contracts.test_optim import step_taken
from tests.subjects import changed

WORDS = 60  # of a sample of 96 tokens


def test_a_statistical_gate_states_both_rates(spec):
    """A gate without rates is one of those in spec/chance.toml, and one with rates is red more
    often on its effect than without.
    """
    rated = {g.id: g.rates for g in spec.gates.values() if g.rates}
    assert not set(rated) & set(spec.certain) and set(rated) | set(spec.certain) == set(spec.gates)
    assert len(rated) >= 18 and all(r.power > 0.9 > 0.02 > r.false_alarm for r in rated.values())


def test_rates_are_not_normative(spec):
    gate = spec.gates["runtime.trend"]
    assert gate.normative() == gate.model_copy(update={"rates": None}).normative()


def stated(spec, gate_id, false_alarms, trials, caught, planted):
    """The figures of the gate against those measured: no more false alarms than stated,
    and no less power.
    """
    rates = spec.gates[gate_id].rates
    assert max(false_alarms, 3) / trials <= rates.false_alarm * 1.0001, (false_alarms, trials)
    assert caught / planted >= rates.power, (caught, planted)


def windows():
    """Every piece of 60 words of the interpreter's help topics that does not overlap:
    healthy prose, tables and code.
    """
    for name in sorted(pydoc_data.topics.topics):
        words = pydoc_data.topics.topics[name].split()
        yield from (words[i : i + WORDS] for i in range(0, len(words) - WORDS, WORDS))


def looped(words, draw, filled):
    """The first words of a piece, then a loop of 1 to 12 of them that
    fills `filled` of its length.
    """
    period = draw.randint(1, 12)
    head = words[: round(WORDS * (1 - filled))]
    return " ".join((head + words[-period:] * WORDS)[:WORDS])


def test_coherence(spec):
    draw, prose = random.Random(1), list(windows())
    low = spec.gates["sampling.coherence"].limits["score_min"].value
    false = sum(coherence(" ".join(w)).score < low for w in prose)
    caught = sum(coherence(looped(w, draw, 1.0)).score < low for w in prose)
    stated(spec, "sampling.coherence", false, len(prose), caught, len(prose))


def test_dominance(spec):
    draw, prose = random.Random(2), list(windows())
    limits = limits_of(spec.gates["sampling.dominance"])

    def high(words):
        check = Dominance(limits)
        check.observe(Sampled(step=1, text=" ".join(words)))
        return check.high

    false = sum(map(high, prose))
    caught = sum(high([w if draw.random() > 0.26 else "a" for w in words]) for words in prose)
    stated(spec, "sampling.dominance", false, len(prose), caught, len(prose))


def test_loops(spec):
    draw, prose = random.Random(3), list(windows())
    check = Loops(limits_of(spec.gates["sampling.loops"]))
    false = sum(not check.observe(Sampled(step=1, text=" ".join(w))).passed for w in prose)
    caught = sum(
        not check.observe(Sampled(step=1, text=looped(w, draw, 0.75))).passed for w in prose
    )
    stated(spec, "sampling.loops", false, len(prose), caught, len(prose))


def test_fresh_rows(spec):
    """A thousand runs of 100 epochs over eight rows, four at a time."""
    draw, limits, false, caught = random.Random(6), limits_of(spec.gates["data.fresh-rows"]), 0, 0
    for _ in range(1000):
        shuffled, sorted_ = FreshRows(limits), FreshRows(limits)
        orders = [draw.sample(range(8), 8) for _ in range(100)]
        false += any(
            shuffled.observe(RowHashes(1, "training", tuple(o[i : i + 4]))).outcome == "fail"
            for o in orders
            for i in (0, 4)
        )
        caught += any(
            sorted_.observe(RowHashes(1, "training", tuple(orders[0][i : i + 4]))).outcome == "fail"
            for _ in orders
            for i in (0, 4)
        )
    stated(spec, "data.fresh-rows", false, 1000, caught, 1000)


def test_memorised(spec):
    """Losses of honest samples are normal around 2 nats; the worst case,
    that each of them is found in the corpus.
    """
    limits = limits_of(spec.gates["sampling.memorised"])
    draw, false, caught = np.random.default_rng(4), 0, 0
    for _ in range(300):
        check, found = Memorized(limits), lambda: 1.0
        honest = draw.normal(2.0, 0.25, 40)
        false += sum(
            not check.observe(
                Sampled(step=1, text="", loss_nats=float(x), found_in_corpus=found)
            ).passed
            for x in honest
        )
        caught += not check.observe(
            Sampled(step=1, text="", loss_nats=2.0 - 6 * 0.25, found_in_corpus=found)
        ).passed
    stated(spec, "sampling.memorised", false, 300 * 40, caught, 300)


def test_recitation(spec):
    """Exact: with 32 and 32 passages, the same rate on both sides, the worst rate of all; and half
    of the training text known.
    """
    p_min, n = spec.gates["sampling.recitation"].limits["p_value_min"].value, 32
    red = np.array([[chance_of(a, n, b, n) < p_min for b in range(n + 1)] for a in range(n + 1)])

    def probabilities(rate):
        log = [
            sum(np.log(np.arange(n - k + 1, n + 1))) - sum(np.log(np.arange(1, k + 1)))
            for k in range(n + 1)
        ]
        k = np.arange(n + 1)
        return np.exp(np.array(log) + k * np.log(rate) + (n - k) * np.log1p(-rate))

    worst = max(
        float(probabilities(r) @ red @ probabilities(r)) for r in np.linspace(0.01, 0.99, 99)
    )
    power = float(probabilities(0.5)[red[:, 0]].sum())
    rates = spec.gates["sampling.recitation"].rates
    assert worst <= rates.false_alarm < 1.2 * worst and rates.power <= power < rates.power + 0.01


def heavy_tailed(draw, spread):
    return draw.gauss(0, spread) * (4 if draw.random() < 0.01 else 1)


def red_steps(check, losses):
    if Started in check.events:
        check.observe(Started(step=0, plan={"random_loss_nats": 10.8, "warmup_steps": 5}))
    return [
        s
        for s, loss in enumerate(losses, 1)
        if not check.observe(step_taken(step=s, loss_nats=loss)).passed
    ]


def test_trend(spec):
    """200 runs of 1,500 steps under noise of 0.3 nats; then the same that lose 0.004
    nats a step from step 500 on.
    """
    limits, draw = limits_of(spec.gates["runtime.trend"]), random.Random(5)
    curve = [2.5 + 6 * 0.995**s for s in range(1500)]
    false = sum(
        bool(red_steps(Trend(limits), [x + heavy_tailed(draw, 0.3) for x in curve]))
        for _ in range(200)
    )
    sick = [x + max(0, s - 500) * 0.004 for s, x in enumerate(curve)]
    caught = sum(
        bool(red_steps(Trend(limits), [x + heavy_tailed(draw, 0.3) for x in sick[:1000]]))
        for _ in range(100)
    )
    stated(spec, "runtime.trend", false, 200, caught, 100)


def test_loss_spike(spec):
    """60,000 looks of clean runs; then runs that leave their basin by a nat for good."""
    limits, draw = limits_of(spec.gates["runtime.loss-spike"]), random.Random(6)
    curve = [2.5 + 3 * 0.99**s for s in range(600)]
    false = sum(
        len(red_steps(LossSpike(limits), [x + heavy_tailed(draw, 0.05) for x in curve]))
        for _ in range(100)
    )
    jumps = [x + (s > 300) for s, x in enumerate(curve[:320])]
    caught = sum(
        bool(red_steps(LossSpike(limits), [x + heavy_tailed(draw, 0.05) for x in jumps]))
        for _ in range(100)
    )
    stated(spec, "runtime.loss-spike", false, 60_000, caught, 100)


def test_loss_not_constant(spec):
    """Equal neighbours among ten million float32 losses with noise of 0.05 nats;
    the gate wants two such pairs in a row.
    """
    losses = np.random.default_rng(7).normal(3.0, 0.05, 10_000_000).astype(np.float32)
    twice = max(3, int((losses[1:] == losses[:-1]).sum())) / len(losses)
    assert twice**2 <= spec.gates["runtime.loss-not-constant"].rates.false_alarm
    assert red_steps(
        LossNotConstant(limits_of(spec.gates["runtime.loss-not-constant"])), [3.0] * 5
    ) == [3, 4, 5]


def test_overfit_onset(spec):
    """Twelve evaluations of 16 batches, paired spread 0.03 nats; held-out loss stands still,
    or rises by 0.03 a round.
    """
    limits, draw = limits_of(spec.gates["evaluation.overfit-onset"]), np.random.default_rng(8)
    base = Evaluated(1, 0.0, 1.0, (), "a", None, 10.0)

    def reds(rise):
        check, difficulty, found = OverfitOnset(limits), draw.normal(3, 0.5, 16), 0
        for r in range(12):
            batches = difficulty + rise * r + draw.normal(0, 0.03 / 2**0.5, 16)
            seen = dataclasses.replace(
                base,
                loss_nats=float(batches.mean()),
                batch_nats=tuple(batches.tolist()),
                train_loss_nats=2.0 - 0.01 * r,
            )
            found += not check.observe(seen).passed
        return found

    false = sum(reds(0.0) for _ in range(500))
    caught = sum(reds(0.03) > 0 for _ in range(200))
    stated(spec, "evaluation.overfit-onset", false, 500 * 12, caught, 200)


def test_init_law(spec):
    """Normal draws of 16,384 entries: the largest deviation in 2,000,
    and a spread of five percent less.
    """
    z_max, draw = (
        spec.gates["model.init-law"].limits["z_max"].value,
        torch.Generator().manual_seed(9),
    )
    honest = [
        _law_z(0.02 * torch.randn(16_384, generator=draw), "normal", 0.02) for _ in range(2000)
    ]
    narrow = [
        _law_z(0.019 * torch.randn(16_384, generator=draw), "normal", 0.02) for _ in range(300)
    ]
    # mean and spread, two sides each; 2,000 draws cannot see so little
    beyond = 2 * (1 - statistics.NormalDist().cdf(z_max)) * 2
    assert max(honest) < 5 and beyond <= spec.gates["model.init-law"].rates.false_alarm
    assert sum(z > z_max for z in narrow) / 300 >= spec.gates["model.init-law"].rates.power


# --- before step 1: order, mixture, corpus, dropout -----------------------------------------------


class Shuffled(DataLoader):
    """A data loader over 120 windows, the fewest that the gate judges in full; `spoil(order)`
    changes the order of each epoch.
    """

    n_rows = 120

    def __init__(self, key, spoil=lambda order: order):
        self.key, self.spoil = key, spoil

    def fresh(self, *, n_rows, rows, cursor=0, seed=1):
        epochs = [
            self.spoil(np.random.default_rng([self.key, seed, epoch]).permutation(120))
            for epoch in range(2)
        ]
        left = iter(np.concatenate(epochs)[cursor:].tolist())
        draw = lambda: SimpleNamespace(sample_ids=list(itertools.islice(left, 120)))  # noqa: E731
        return SimpleNamespace(next_batch=draw)


def shuffled_green(spec, key, *spoil):
    return call_check(spec.gates["data.order"], Subject(data_loader=Shuffled(key, *spoil))).passed


def in_halves(order):
    """A shuffle that never leaves its half of the corpus."""
    return np.concatenate([order[order < 60], order[order >= 60]])


def in_pairs(order):
    """One window of six is followed by its neighbour in the corpus."""
    heads = order[order % 6 != 1]
    return np.array(
        [w for head in heads.tolist() for w in ((head, head + 1) if head % 6 == 0 else (head,))]
    )


def kept(order):
    """One place of seven holds the same window in every epoch."""
    return np.concatenate([np.arange(18), order[order >= 18]])


def test_data_order(spec):
    """7,500 uniform orders; then 200 of each of three ways to shuffle only in part."""
    false = sum(not shuffled_green(spec, key) for key in range(7_500))
    ways = (in_halves, in_pairs, kept)
    caught = [sum(not shuffled_green(spec, key, way) for key in range(200)) for way in ways]
    stated(spec, "data.order", false, 7_500, min(caught), 200)


def test_curriculum_order(spec):
    """Of all that the gate looks at only the place of rows in their source is left to chance:
    20,000 sources of 64 rows, then 500 sources of 1,000 rows whose last tenth is left out. They are
    so large that no window comes twice.
    """
    limits, draw, arm = (
        limits_of(spec.gates["curriculum.order"]),
        np.random.default_rng(11),
        Source("a", 0, 10**12, 1.0, 1.0, 0.0),
    )

    def fault(rows, until):
        return _arm_fault(arm, 0, draw.integers(0, until, rows), np.zeros(rows, int), limits)

    false = sum(bool(fault(64, 10**12)) for _ in range(20_000))
    faults = [fault(1000, 9 * 10**11) for _ in range(500)]
    stated(spec, "curriculum.order", false, 20_000, sum("one end" in f for f in faults), 500)


def test_filters(spec, subject):
    """Sources of which 200 documents are filtered again: 5,000 in which one of 5,000 changed on its
    way, 1,000 with three bad in 100.
    """
    draw, reject = random.Random(12), functools.cache(subject.corpus.rejection)
    documents = [*subject.corpus.sample_documents(0.01, 20)]
    others = {source: (source, text) for source, text in documents}
    _, (name, good) = others.popitem()
    assert reject(good, ("en",)) is None and reject("region " * 60, ("en",)) == "low-diversity"

    def passes(bad):
        mine = [(name, "region " * 60 if draw.random() < bad else good) for _ in range(200)]
        corpus = {
            "sample_documents": lambda frac, least: [*others.values(), *mine],
            "rejection": reject,
        }
        return call_check(spec.gates["corpus.filters"], changed(subject, corpus=corpus)).passed

    false, caught = (
        sum(not passes(1 / 5000) for _ in range(5000)),
        sum(not passes(0.03) for _ in range(1000)),
    )
    stated(spec, "corpus.filters", false, 5000, caught, 1000)


def test_dropout_law(spec):
    """Exact, for the 512 numbers that the gate wants at least: the share that is dropped leaves its
    band by chance, at the worst rate between 0.02 and 0.5. Then the whole check on 100 runs whose
    branches drop a fifth of 4,096 numbers where a tenth is declared.
    """
    z_max, n = spec.gates["model.dropout-law"].limits["rate_z_max"].value, 512
    rates, k = spec.gates["model.dropout-law"].rates, np.arange(n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])

    def beyond(p):
        far = np.abs(k - n * p) > z_max * math.sqrt(n * p * (1 - p))
        return float(np.exp(ways + k * np.log(p) + (n - k) * np.log1p(-p))[far].sum())

    worst, draw = max(map(beyond, np.linspace(0.02, 0.5, 97))), torch.Generator().manual_seed(13)

    def draws(dropped):
        for where in itertools.product(range(2), ("attention", "ffn")):
            given = torch.randn(64, 64, generator=draw)
            yield (
                where,
                given,
                given * (torch.rand(64, 64, generator=draw) >= dropped) / (1 - dropped),
            )

    def passes(dropped):
        declared = SimpleNamespace(architecture={"dropout": 0.1, "n_layers": 2})
        judged = Subject(declared=declared, training=Replayed(draws(dropped)))
        return call_check(spec.gates["model.dropout-law"], judged).passed

    assert worst <= rates.false_alarm < 1.2 * worst and all(passes(0.1) for _ in range(100))
    assert sum(not passes(0.2) for _ in range(100)) / 100 >= rates.power


# --- within the run: sources that change, routers that choose -------------------------------------


def test_gradient_shock(spec):
    """Norms spread by a quarter, one step in a hundred by four times as much, which is as wide as
    those of thirteen recorded runs: there 4 of 4,186 steps were above 8 times the median. The
    mixture changes at every fourth step. Then one norm is twenty times as large.
    """
    limits, draw, base = (
        limits_of(spec.gates["curriculum.gradient-shock"]),
        random.Random(14),
        step_taken(),
    )

    def reds(steps, shock):
        check, found = GradientShock(limits), 0
        for step in range(steps):
            check.observe(
                BatchDrawn(
                    step,
                    4 * step,
                    4 * step + 4,
                    (0,) * 4,
                    0,
                    4,
                    ((0, 0, 0, 1), (0, 1, 1, 1))[step // 4 % 2],
                )
            )
            norm = math.exp(heavy_tailed(draw, 0.25)) * (20 if step == shock else 1)
            found += not check.observe(dataclasses.replace(base, step=step, grad_norm=norm)).passed
        return found

    false = sum(reds(600, -1) for _ in range(50))
    caught = sum(reds(49, 48) > 0 for _ in range(400))
    stated(spec, "curriculum.gradient-shock", false, 30_000, caught, 400)


def test_router_collapse(spec):
    """200 runs of 600 steps whose router wanders between four experts: for up to 114 steps in the
    median of sixteen runs it leaves the band, while the longest stretches of clean runs had 67
    and 128. Then 100 routers that send nine tokens of ten to one expert, and 100 that send three of
    a thousand, under the noise of 1,024 tokens a step.
    """
    limits, draw = limits_of(spec.gates["moe.router-collapse"]), np.random.default_rng(15)

    def red(shares):
        check = RouterCollapse(limits)
        check.observe(
            Started(0, {"warmup_steps": 10, "expert_layers": 1, "n_experts": 4, "top_k": 1})
        )
        seen = (
            SimpleNamespace(step=step, expert_shares=(tuple(s),))
            for step, s in enumerate(shares.tolist(), 11)
        )
        return any(not check.observe(event).passed for event in seen)

    def wandering(steps, spread=1.5, memory=math.exp(-1 / 80)):
        z, path = draw.normal(0, spread, 4), []
        for _ in range(steps):
            z = memory * z + spread * math.sqrt(1 - memory**2) * draw.normal(size=4)
            path.append(np.exp(z) / np.exp(z).sum())
        return np.array(path)

    false = sum(red(wandering(600)) for _ in range(200))
    sick = ([0.9, 0.04, 0.03, 0.03], [0.003, 0.333, 0.332, 0.332])
    caught = [sum(red(draw.multinomial(1024, p, 300) / 1024) for _ in range(100)) for p in sick]
    stated(spec, "moe.router-collapse", false, 200, min(caught), 100)
