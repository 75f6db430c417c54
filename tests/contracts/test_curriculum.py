"""Gates of the curriculum: green on the stack, red on what they are for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import BanditCurriculum, StaticCurriculum
from stackproof.contracts.curriculum import CAPS, Draws, GradientShock, declared_share
from stackproof.contracts.events import BatchDrawn, Started, StepTaken
from stackproof.contracts.gate import call_check, limits_of
from stackproof.data.curriculum import make_sampler
from stackproof.data.sampler import MixtureSampler, Source, shares
from stackproof.museum.edit import Edit, edited
from stackproof.museum.plant import load_museum, touch, touches
from stackproof.spec.errors import ConfigError
from stackproof.subject.assemble import subject_of
from stackproof.train import step as steps
from stackproof.train.state import build_state
from tests.contracts.test_optim import step_taken
from tests.subjects import changed

CPU = torch.device("cpu")
PREFLIGHT = ["curriculum.order", "curriculum.reward", "curriculum.state"]


def judge(gate_id, spec, subject, **curriculum):
    """The verdict on a curriculum in which some members are others."""
    return call_check(spec.gates[gate_id], changed(subject, curriculum=curriculum))


def plants_of(*gate_ids):
    return [p.id for p in load_museum().values() if p.gate in gate_ids]


@pytest.mark.parametrize("gate_id", PREFLIGHT)
def test_each_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("gate_id", PREFLIGHT)
def test_each_gate_is_green_on_fixed_shares_and_on_one_source_that_is_left(
    spec, small_cfg, dataset, gate_id
):
    fixed = StaticCurriculum(warmup_steps=3, warmup_sources=("grammar", "tools"))
    alone = StaticCurriculum(
        caps={"objects": 0.0, "tools": 0.0, "retired": 0.0}, floors={"objects": 0.0, "tools": 0.0}
    )
    for curriculum in (fixed, alone):
        cfg = small_cfg.model_copy(update={"curriculum": curriculum})
        verdict = call_check(spec.gates[gate_id], subject_of(cfg, dataset, CPU))
        assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("plant_id", plants_of(*PREFLIGHT))
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, dataset, plant_id):
    plant, before, cfg = load_museum()[plant_id], touches(), small_cfg
    if "curriculum.kind" in plant.museum:
        cfg = small_cfg.model_copy(update={"curriculum": StaticCurriculum()})
    with plant.apply():
        verdict = call_check(spec.gates[plant.gate], subject_of(cfg, dataset, CPU))
    assert verdict.outcome == "fail" and verdict.message and touches() > before
    assert plant.id in spec.gates[plant.gate].plants


@pytest.mark.parametrize("cfg", [StaticCurriculum, BanditCurriculum])
@pytest.mark.parametrize("number", ["weight", "cap", "floor"])
def test_order_is_red_where_any_share_is_another_than_declared(
    spec, small_cfg, dataset, cfg, number
):
    own = {"weights": {"tools": 3.0}, "caps": {"tools": 0.7}, "floors": {"grammar": 0.05}}
    run = small_cfg.model_copy(update={"curriculum": cfg(**own)})
    subject = subject_of(run, dataset, CPU)
    declared = subject.curriculum.declared_shares
    assert (
        declared["tools"] == (3.0, 0.7, 0.1)
        and declared["grammar"] == (2.0, 1.0, 0.05)
        and declared["objects"] == (1.0, 0.5, 0.2)
    )
    assert call_check(spec.gates["curriculum.order"], subject).passed

    def other():
        order = subject.curriculum.sampler_order()
        order.sources = tuple(
            replace(s, **{number: getattr(s, number) * 0.99}) if s.name == "tools" else s
            for s in order.sources
        )
        return order

    verdict = judge("curriculum.order", spec, subject, sampler_order=other)
    assert verdict.outcome == "fail" and "source tools has weight, cap, floor" in verdict.message


# --- order ----------------------------------------------------------------------------------------


class Declares:
    """An order that declares other arms than it draws by."""

    def __init__(self, inner, change):
        self._inner, self.sources = inner, tuple(map(change, inner.sources))

    def __getattr__(self, name):
        return getattr(self._inner, name)


def shares_of(arms) -> dict:
    """As a configuration would have declared these arms."""
    return {s.name: (s.weight, s.cap, s.floor) for s in arms}


ARMS = (
    Source("a", 0, 500, 1.0, 1.0, 0.0),
    Source("b", 500, 400, 1.0, 1.0, 0.0),
    Source("c", 900, 600, 2.0, 1.0, 0.0),
)


PLAIN = {"warmup_rows": 0, "warmup_sources": (), "n_windows": 1500}
PLAIN |= {"declared_shares": shares_of(ARMS)}


def declared(spec, subject, **bounds):
    """The verdict on a mixture of shares 1/4, 1/4 and 1/2 whose source `a` is
    declared with other bounds.
    """
    make = lambda: Declares(  # noqa: E731
        MixtureSampler(ARMS, 5), lambda s: replace(s, **bounds) if s.name == "a" else s
    )
    members = PLAIN | {"sampler_order": make, "declared_shares": shares_of(make().sources)}
    return judge("curriculum.order", spec, subject, **members)


def test_order_is_red_on_a_share_out_of_bounds(spec, subject):
    """A share of 0.25 gives 250 or 251 of 1,000 rows: three of slack granted,
    0.246 is no cap of it and 0.254 no floor.
    """
    for bounds in ({}, {"cap": 0.25}, {"floor": 0.25}):
        assert declared(spec, subject, **bounds).passed
    for bounds in ({"cap": 0.246}, {"floor": 0.254}):
        verdict = declared(spec, subject, **bounds)
        assert verdict.outcome == "fail" and 0 < verdict.measured["worst_excess_rows"] <= 2


class Redrawn(Declares):
    """An order whose draws are changed by a function."""

    def __init__(self, inner, change):
        super().__init__(inner, lambda s: s)
        self._change = change

    def at(self, numbers):
        return self._change(self._inner.at(numbers), numbers)


def redrawn(spec, subject, change):
    members = PLAIN | {"sampler_order": lambda: Redrawn(MixtureSampler(ARMS, 5), change)}
    return judge("curriculum.order", spec, subject, **members)


def test_order_is_red_on_a_window_drawn_twice(spec, subject):
    assert redrawn(spec, subject, lambda draws, numbers: draws).passed

    def again(draws, numbers):
        mine = np.flatnonzero(draws.sources == 1)[:2]
        windows = draws.windows.copy()
        windows[mine[1]] = windows[mine[0]]
        return replace(draws, windows=windows)

    verdict = redrawn(spec, subject, again)
    assert (
        verdict.outcome == "fail"
        and "twice" in verdict.message
        and verdict.measured["source"] == "b"
    )


def test_order_is_red_on_rows_of_a_neighbour(spec, subject):
    def astray(draws, numbers):
        return replace(
            draws, windows=np.where(numbers == 17, (draws.windows + 700) % 1500, draws.windows)
        )

    assert "of other sources" in redrawn(spec, subject, astray).message


def test_order_is_red_on_an_early_epoch(spec, subject):
    def early(draws, numbers):
        return replace(draws, epochs=draws.epochs + (numbers > 4000))

    assert "an epoch begins before" in redrawn(spec, subject, early).message


def test_order_is_red_on_an_order_that_is_not_repeatable(spec, subject):
    calls = iter(range(100))

    def make():
        return MixtureSampler([*ARMS[:2], replace(ARMS[2], weight=2 + next(calls))], 5)

    verdict = judge("curriculum.order", spec, subject, **PLAIN, sampler_order=make)
    assert verdict.outcome == "fail" and "two orders" in verdict.message


def test_order_is_red_on_one_row_of_the_warm_up(spec, subject):
    """The 33rd row is no warm-up of 32 rows."""
    make = lambda: MixtureSampler(ARMS, 5, warmup_rows=32, warmup_sources=("b",))  # noqa: E731
    for rows, outcome in ((32, "pass"), (33, "fail"), (34, "fail")):
        members = PLAIN | {"sampler_order": make, "warmup_rows": rows, "warmup_sources": ("b",)}
        assert judge("curriculum.order", spec, subject, **members).outcome == outcome


# --- reward and state -----------------------------------------------------------------------------


class Fixed:
    """A bandit whose focus goes round, whatever it is told; every
    source has a third of the rows. Its state is one under which that focus has the highest bound.
    """

    cfg = SimpleNamespace(focus_share=0.0, exploration=0.0, discount=1.0)

    sources = (
        Source("useful", 0, 9, 1, 1, 0),
        Source("list", 9, 9, 1, 1, 0),
        Source("other", 18, 9, 1, 1, 0),
    )

    def __init__(self, turns):
        self._turns, self.focus = iter(turns), 0
        self._pulls = [1.0] * len(self.sources)

    def decide(self, before, after):
        pass

    def at(self, numbers):
        return SimpleNamespace(sources=numbers % 3, windows=numbers, epochs=0 * numbers)

    def reward(self, losses):
        self._pulls[self.focus] += 1
        self.focus = next(self._turns)

    def state_dict(self):
        names = [s.name for s in self.sources]
        arms = {
            n: {"pulls": pulls, "rewards": pulls * (n == names[self.focus])}
            for n, pulls in zip(names, self._pulls)
        }
        return {"focus": names[self.focus], "arms": arms}


@pytest.mark.parametrize(
    ("target", "old", "new", "gate"),
    [
        (
            "stackproof.data.bandit:DiscountedUcb.__init__",
            "self.discount, self.exploration = discount, exploration",
            "self.discount, self.exploration = exploration, exploration",
            "curriculum.reward",
        ),
        (
            "stackproof.data.curriculum:make_sampler",
            "len(sources) == 1 and",
            "len(sources) != 1 and",
            "curriculum.order",
        ),
        (
            "stackproof.data.shard_table:ShardTable.spans",
            "spans, first = {}, 0",
            "spans, first = {}, 1",
            "curriculum.order",
        ),
        (
            "stackproof.data.shard_table:ShardTable.spans",
            "first += n",
            "first += n + 1",
            "curriculum.order",
        ),
    ],
)
def test_mistakes_in_the_order_and_in_what_a_bandit_forgets_are_red(
    spec, small_cfg, dataset, target, old, new, gate
):
    """A mixture that is read as its first source alone; sources whose windows are not theirs."""
    static = gate == "curriculum.order"
    kind = StaticCurriculum() if static else small_cfg.curriculum
    cfg = small_cfg.model_copy(update={"curriculum": kind})
    assert call_check(spec.gates[gate], subject_of(cfg, dataset, CPU)).passed
    with edited([Edit(target, old, new)], touch):
        verdict = call_check(spec.gates[gate], subject_of(cfg, dataset, CPU))
    assert verdict.outcome == "fail" and verdict.message


def test_reward_is_red_on_a_bandit_that_never_learns(spec, subject):
    in_turn = lambda caps: Fixed(n % 3 for n in range(91))  # noqa: E731
    blind = judge("curriculum.reward", spec, subject, bandit=in_turn)
    assert blind.outcome == "fail" and blind.measured["useful_turns"] == pytest.approx(
        1 / 3, abs=0.02
    )
    learned = call_check(spec.gates["curriculum.reward"], subject)
    assert learned.passed and learned.measured["useful_turns"] > 0.5  # measured 0.84


def test_reward_is_red_where_a_source_is_never_tried(spec, subject):
    two_of_three = lambda caps: Fixed(n % 2 for n in range(91))  # noqa: E731
    verdict = judge("curriculum.reward", spec, subject, bandit=two_of_three)
    assert verdict.outcome == "fail" and "1 source(s) none" in verdict.message


@pytest.mark.parametrize("arm", ["useful", "list", "other"])
def test_reward_is_red_where_the_focus_is_not_the_highest_bound(spec, subject, arm):
    class Stubborn(type(subject.curriculum.bandit(CAPS))):
        def _choose(self):
            return [s.name for s in self.sources].index(arm)

    def bandit(caps):
        made = subject.curriculum.bandit(caps)
        made.__class__ = Stubborn
        return made

    verdict = judge("curriculum.reward", spec, subject, bandit=bandit)
    assert verdict.outcome == "fail" and verdict.measured["other_choices"] > 10


def test_state_is_red_on_a_revived_arm(spec, subject):
    """A cap of 0 that is not looked at when a state is loaded: the source takes part again."""
    honest = subject.curriculum.bandit
    assert call_check(spec.gates["curriculum.state"], subject).passed
    verdict = judge("curriculum.state", spec, subject, bandit=lambda caps: honest(CAPS))
    assert verdict.outcome == "fail" and "list" in verdict.message and verdict.measured["arms"] == 3


def test_state_is_red_on_dropped_arms_that_are_not_named(spec, subject):
    def silent(caps):
        made = subject.curriculum.bandit(caps)
        load = made.load_state_dict
        made.load_state_dict = lambda state: load(state) and []
        return made

    assert judge("curriculum.state", spec, subject, bandit=silent).outcome == "fail"


# --- draws ----------------------------------------------------------------------------------------


def plan_of(order, *, warmup_rows=0, warmup_sources=(), **bounds):
    sources = [
        {k: getattr(s, k) for k in ("name", "first", "n_windows", "cap", "floor")} | bounds
        for s in order.sources
    ]
    return {"sources": sources, "warmup_rows": warmup_rows, "warmup_sources": list(warmup_sources)}


def drawn(step, before, sources, windows):
    return BatchDrawn(step, before, before + len(windows), tuple(windows), 0, 40, tuple(sources))


def draws_gate(spec, plan):
    check = Draws(limits_of(spec.gates["curriculum.draws"]))
    assert check.observe(Started(0, plan)) is None
    return check


def watched(spec, cfg, dataset, n_steps):
    """Outcomes of the gate over the first steps of the stack's own loader,
    with a turn of losses after every second one.
    """
    loader = build_state(cfg, dataset, CPU).data_loader
    check = draws_gate(
        spec,
        plan_of(loader.sampler, warmup_rows=12, warmup_sources=cfg.curriculum.warmup_sources),
    )
    for step in range(1, n_steps + 1):
        before, batches = (
            loader.cursor,
            [loader.next_batch() for _ in range(cfg.accumulation())],
        )
        sources, windows = (
            [x for b in batches for x in getattr(b, key)] for key in ("sources", "sample_ids")
        )
        yield check.observe(drawn(step, before, sources, windows)).outcome
        if step % cfg.curriculum.probe_every == 0:
            loader.sampler.reward({s.name: 5 - 0.01 * step for s in loader.sampler.sources})


@pytest.mark.parametrize("plant_id", plants_of("curriculum.draws"))
def test_draws_is_red_under_each_of_its_plants(spec, small_cfg, dataset, plant_id):
    """Green for 400 steps of four rows without the plant, red within the
    museum's 28 steps with it.
    """
    assert set(watched(spec, small_cfg, dataset, 400)) == {"pass"}
    before = touches()
    with load_museum()[plant_id].apply():
        assert "fail" in set(watched(spec, small_cfg, dataset, small_cfg.train.max_steps))
    assert touches() > before and plant_id in spec.gates["curriculum.draws"].plants


def alternating(n, period):
    """Rows 0 … n-1: every `period`-th is of source b, the others are of a."""
    sources = [int(i % period == period - 1) for i in range(n)]
    return sources, [500 * s + i % 400 for i, s in enumerate(sources)]


def two(cap=1.0, floor=0.0):
    return plan_of(MixtureSampler(ARMS[:2], 5)) | {
        "sources": [
            {"name": "a", "first": 0, "n_windows": 500, "cap": cap, "floor": 0.0},
            {"name": "b", "first": 500, "n_windows": 400, "cap": 1.0, "floor": floor},
        ]
    }


@pytest.mark.parametrize(
    ("bounds", "outcome"),
    [
        ({"cap": 0.9}, "pass"),
        ({"cap": 0.897}, "fail"),
        ({"floor": 0.1}, "pass"),
        ({"floor": 0.103}, "fail"),
    ],
)
def test_draws_knows_a_share_of_a_tenth_to_within_two_rows_of_a_thousand(spec, bounds, outcome):
    check, (sources, windows) = draws_gate(spec, two(**bounds)), alternating(1000, 10)
    assert check.observe(drawn(1, 0, sources, windows)).outcome == outcome


def test_draws_does_not_judge_a_handful_of_rows(spec):
    check = draws_gate(spec, two(floor=0.5))
    for rows, outcome in ((63, "pass"), (1, "fail")):
        assert check.observe(drawn(1, 0, [0] * rows, range(rows))).outcome == outcome


def test_draws_forgets_what_left_the_window(spec):
    """A thousand rows of one source alone are red under a floor of 0.4;
    a thousand even ones later they are forgotten.
    """
    check, (sources, windows) = draws_gate(spec, two(floor=0.4)), alternating(1000, 2)
    assert check.observe(drawn(1, 0, [0] * 1000, [i % 500 for i in range(1000)])).outcome == "fail"
    assert check.observe(drawn(2, 1000, sources, windows)).outcome == "pass"


@pytest.mark.parametrize(
    ("former", "outcome", "rows"), [({}, "pass", 80), ({"floor": 0.5}, "fail", 140)]
)
def test_draws_judges_a_changed_mixture_afresh(spec, former, outcome, rows):
    """Rows drawn under other floors say nothing about these; under the same ones they
    still count after a restart.
    """
    check = draws_gate(spec, two(**former))
    assert check.observe(drawn(1, 0, [0] * 60, range(60))).passed, "too few to be judged"
    restored = Draws(check.limits)
    restored.load_state_dict(check.state_dict())
    restored.observe(Started(1, two(floor=0.5)))
    verdict = restored.observe(drawn(2, 60, *alternating(80, 2)))
    assert verdict.outcome == outcome and verdict.measured["rows"] == rows


def test_draws_is_red_on_one_wrong_row(spec):
    """A window of another source, a source of cap 0, another source in the warm-up,
    and a row without an entry.
    """
    rows = ([0, 1], [3, 503])
    assert draws_gate(spec, two()).observe(drawn(1, 0, *rows)).passed
    assert (
        "does not hold it" in draws_gate(spec, two()).observe(drawn(1, 0, [0, 1], [3, 499])).message
    )
    assert "whose cap is 0" in draws_gate(spec, two(cap=0.0)).observe(drawn(1, 0, *rows)).message
    warm = two() | {"warmup_rows": 2, "warmup_sources": ["a"]}
    assert "in the warm-up" in draws_gate(spec, warm).observe(drawn(1, 0, *rows)).message
    assert draws_gate(spec, warm | {"warmup_rows": 1}).observe(drawn(1, 0, *rows)).passed
    assert "sources of rows" in draws_gate(spec, two()).observe(drawn(1, 0, [0], [3, 4])).message


# --- gradient shock -------------------------------------------------------------------------------


@pytest.mark.parametrize("plant_id", plants_of("curriculum.gradient-shock"))
def test_gradient_shock_is_red_under_each_of_its_plants(spec, small_cfg, dataset, plant_id):
    """The museum's run, step by step as the loop takes them: green without the plant,
    red with it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def outcomes():
        state, check = (
            build_state(small_cfg, dataset, CPU),
            GradientShock(limits_of(spec.gates["curriculum.gradient-shock"])),
        )
        for step in range(1, small_cfg.train.max_steps + 1):
            before, batches = (
                state.data_loader.cursor,
                [state.data_loader.next_batch() for _ in range(small_cfg.accumulation())],
            )
            sources, windows = (
                [x for b in batches for x in getattr(b, key)] for key in ("sources", "sample_ids")
            )
            assert check.observe(drawn(step, before, sources, windows)) is None
            yield check.observe(
                step_taken(step=step, grad_norm=steps.train_step(state, batches).grad_norm)
            ).outcome
            if step % small_cfg.curriculum.probe_every == 0:
                state.data_loader.sampler.reward(
                    {s.name: 5 - 0.01 * step for s in state.data_loader.sampler.sources}
                )
        assert check.switches > 2

    assert set(outcomes()) == {"pass"}
    before = touches()
    with load_museum()[plant_id].apply():
        assert "fail" in set(outcomes())
    assert touches() > before and plant_id in spec.gates["curriculum.gradient-shock"].plants
    torch.set_num_threads(threads)


def shocks(spec, mixtures, norms):
    """The last verdict on steps with these mixtures of four rows and gradient norms,
    and the check.
    """
    check = GradientShock(limits_of(spec.gates["curriculum.gradient-shock"]))
    for step, (sources, norm) in enumerate(zip(mixtures, norms, strict=True), start=1):
        check.observe(drawn(step, 4 * step, sources, range(4)))
        verdict = check.observe(step_taken(step=step, grad_norm=norm))
    return verdict, check


def test_gradient_shock_needs_a_switch(spec):
    """A norm of nine times the median is a shock where a quarter of the rows came from elsewhere,
    and none where nothing changed.
    """
    same, other, whole = (0, 0, 0, 1), (0, 0, 1, 1), (1, 1, 1, 1)
    norms = [1.0] * 20 + [9.0]
    assert shocks(spec, [same] * 21, norms)[0].passed
    assert shocks(spec, [same] * 20 + [other], norms)[0].outcome == "fail"
    assert shocks(spec, [same] * 20 + [whole], norms)[0].outcome == "fail"
    assert shocks(spec, [same] * 20 + [other], [1.0] * 20 + [7.9])[0].passed
    assert shocks(spec, [same] * 20 + [(1, 0, 0, 0)], norms)[0].passed, (
        "the same rows in another order are no change"
    )


def test_gradient_shock_watches_three_steps_and_no_more(spec):
    same, other = (0, 0, 0, 1), (0, 1, 1, 1)
    for after, outcome in ((0, "fail"), (1, "fail"), (2, "fail"), (3, "pass")):
        verdict, check = shocks(
            spec, [same] * 20 + [other] * (after + 1), [1.0] * (20 + after) + [9.0]
        )
        assert verdict.outcome == outcome and check.switches == 1


def test_gradient_shock_has_no_opinion_before_it_knows_a_median(spec):
    same, other = (0, 0, 0, 1), (0, 1, 1, 1)
    for known, outcome in ((7, "pass"), (8, "fail")):
        assert shocks(spec, [same] * known + [other], [1.0] * known + [9.0])[0].outcome == outcome


def test_runtime_gates_go_on_over_a_resume(spec):
    _, check = shocks(spec, [(0, 0, 0, 1)] * 20, [1.0] * 20)
    resumed = GradientShock(check.limits)
    resumed.load_state_dict(check.state_dict())
    resumed.observe(drawn(21, 84, (1, 1, 1, 1), range(4)))
    assert resumed.observe(step_taken(step=21, grad_norm=9.0)).outcome == "fail"
    assert {BatchDrawn, StepTaken} == set(GradientShock.events) and Started in Draws.events


def test_a_run_of_one_source_has_nothing_to_judge(spec, dataset, small_cfg):
    order = make_sampler(StaticCurriculum(), [ARMS[0]], seed=1, rows_per_step=4)
    check = draws_gate(spec, plan_of(order, floor=0.0))
    assert check.observe(drawn(1, 0, [0] * 100, range(100))).measured == {"rows": 100, "sources": 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.integers(0, 3)), min_size=1))
def test_declared_shares_are_those_of_the_sampler(rows):
    sources = [
        Source(str(i), 0, 9, float(w), cap / 10, min(floor / 40, cap / 10))
        for i, (w, cap, floor) in enumerate(rows)
    ]
    try:
        wanted = shares(sources)
    except ConfigError:
        return
    got = declared_share(
        *(np.array([getattr(s, k) for s in sources]) for k in ("weight", "cap", "floor"))
    )
    np.testing.assert_allclose(got, wanted, atol=1e-9)
