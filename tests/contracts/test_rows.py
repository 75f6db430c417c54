"""The gate of the rows that our trainer draws: two-sided, over resumes and epochs."""

from collections import Counter

import numpy as np
import pytest

from stackproof.config import StaticCurriculum
from stackproof.contracts.events import BatchDrawn, Started
from stackproof.contracts.gate import limits_of
from stackproof.contracts.rows import Rows
from stackproof.data.curriculum import run_sampler
from stackproof.data.data_loader import DataLoader
from stackproof.data.sampler import ShuffledSampler
from stackproof.museum.plant import load_museum
from stackproof.spec.errors import GateFailed
from stackproof.train.loop import train
from stackproof.train.start import fresh
from tests.contracts.test_optim import step_taken


def orders(cfg, dataset) -> dict:
    """Makers of the orders in which a run may draw: one shuffled stream, a mixture by fixed shares,
    and the museum's bandit.
    """
    static = cfg.model_copy(
        update={"curriculum": StaticCurriculum(warmup_steps=3, warmup_sources=("grammar", "tools"))}
    )
    return {
        "uniform": lambda: ShuffledSampler(dataset.train.n_windows(288), 5),
        "static": lambda: run_sampler(static, dataset, seed=5),
        "bandit": lambda: run_sampler(cfg, dataset, seed=5),
    }


@pytest.mark.parametrize("order", ["uniform", "static", "bandit"])
@pytest.mark.parametrize("plant_id", ["data.window-drawn-twice", "data.position-skips"])
def test_rows_is_red_under_each_of_its_plants(spec, small_cfg, dataset, plant_id, order):
    """Four rows a step from the stack's own loader: green for two epochs without the plant, red
    within three steps with it.
    """
    n = dataset.train.n_windows(288)

    def verdicts(n_steps):
        loader = DataLoader(
            dataset.train, seq_len=288, seed=5, rows=4, sampler=orders(small_cfg, dataset)[order]()
        )
        sources = [
            {"name": s.name, "first": s.first, "n_windows": s.n_windows}
            for s in loader.sampler.sources
        ]
        plan = {
            "rows_per_step": 4,
            "tokens_per_step": 4 * 288,
            "sources": sources,
            "drawn": [0] * len(sources),
            "cursor": 0,
            "tokens_seen": 0,
        }
        check = Rows(limits_of(spec.gates["data.rows"]))
        check.observe(Started(step=0, plan=plan))
        for step in range(1, n_steps + 1):
            before, b = loader.cursor, loader.next_batch()
            drawn = BatchDrawn(
                step,
                before,
                loader.cursor,
                b.sample_ids,
                b.epoch,
                b.input_ids.numel(),
                b.sources,
                b.epochs,
            )
            yield check.observe(drawn).outcome

    assert set(verdicts(2 * n // 4 + 2)) == {"pass"}
    with load_museum()[plant_id].apply():
        assert "fail" in set(verdicts(3))


def plan(*n_windows: int, **changes) -> dict:
    """A plan of sources of so many windows, side by side, from the start."""
    firsts = np.cumsum([0, *n_windows]).tolist()
    sources = [
        {"name": f"s{i}", "first": firsts[i], "n_windows": n, "cap": 1.0, "floor": 0.0}
        for i, n in enumerate(n_windows)
    ]
    return {
        "rows_per_step": 4,
        "tokens_per_step": 40,
        "sources": sources,
        "drawn": [0] * len(sources),
        "cursor": 0,
        "tokens_seen": 0,
    } | changes


def drawn(step: int, cursor: int, ids=None, **changes) -> BatchDrawn:
    epoch = changes.get("epoch", 0)
    values = {
        "step": step,
        "cursor_before": cursor,
        "cursor_after": cursor + 4,
        "sample_ids": ids or tuple(range(cursor, cursor + 4)),
        "epoch": epoch,
        "n_tokens": 40,
        "sources": (0,) * 4,
        "epochs": (epoch,) * 4,
    }
    return BatchDrawn(**values | changes)


def watching(spec, declared: dict) -> Rows:
    check = Rows(limits_of(spec.gates["data.rows"]))
    check.observe(Started(step=0, plan=declared))
    return check


@pytest.fixture
def watch(spec):
    return watching(spec, plan(100))


def test_rows_is_red_on_a_repeat(watch):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 4, ids=(4, 5, 6, 0))).passed


def taken(**changes):
    """What a step of PLAN reports that trained on its own four windows."""
    values = {"n_valid_tokens": 40, "n_expected_tokens": 40, "tokens_seen": 40}
    return step_taken(**values | {"sample_ids": (0, 1, 2, 3)} | changes)


def verdict_of(spec, step):
    """The verdict on a step, after the batch of windows 0 to 3 was drawn for it."""
    check = watching(spec, plan(100))
    assert check.observe(drawn(1, 0)).passed
    return check.observe(step)


def test_rows_is_red_where_a_step_trains_on_other_windows(spec):
    for ids in ((0, 1, 2, 3), (3, 2, 1, 0)):
        assert verdict_of(spec, taken(sample_ids=ids)).passed, "in any order"
    for ids in ((4, 5, 6, 7), (0, 1, 2, 4), (0, 1, 2, 2), ()):
        verdict = verdict_of(spec, taken(sample_ids=ids))
        others = sum((Counter(ids) - Counter(range(4))).values())
        assert verdict.outcome == "fail" and verdict.measured["not_drawn"] == others


def test_rows_is_red_on_one_token(spec):
    assert verdict_of(spec, taken(n_valid_tokens=20)).passed
    for wrong in (
        {"tokens_seen": 41},
        {"n_expected_tokens": 39},
        {"n_valid_tokens": 19},
        {"n_valid_tokens": 41},
    ):
        assert verdict_of(spec, taken(**wrong)).outcome == "fail", wrong


def test_rows_adds_up_the_tokens_from_the_plan(spec):
    check = watching(spec, plan(100, tokens_seen=80))
    assert check.observe(drawn(1, 0)).passed
    assert check.observe(taken(tokens_seen=120)).passed
    assert check.observe(taken(tokens_seen=161)).outcome == "fail"


def test_a_run_that_trains_on_the_batch_before_is_halted_in_its_second_step(small_cfg, tmp_path):
    with (
        load_museum()["data.batch-held-back"].apply(),
        pytest.raises(GateFailed, match="trained on 4 window") as caught,
    ):
        train(fresh(small_cfg, (), tmp_path / "run", only=("data.rows",)))
    assert caught.value.gate_id == "data.rows"
    assert next(g.first_failure_step for g in caught.value.record.gates if g.id == "data.rows") == 2


def test_rows_is_red_on_a_gap_and_on_a_short_step(watch, spec):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 8)).passed
    assert not watching(spec, plan(100)).observe(drawn(1, 0, n_tokens=30)).passed


def test_rows_is_red_on_a_wrong_epoch(spec):
    assert not watching(spec, plan(100)).observe(drawn(1, 0, epoch=1)).passed, "the rows' own"
    batch_alone = drawn(1, 0, epoch=1, epochs=(0,) * 4)
    assert not watching(spec, plan(100)).observe(batch_alone).passed, (
        "the batch's is not that of its last row"
    )


def test_rows_is_red_on_a_window_that_does_not_exist_and_on_one_of_another_source(spec):
    assert not watching(spec, plan(100)).observe(drawn(1, 0, ids=(0, 1, 2, 100))).passed
    assert (
        watching(spec, plan(50, 50))
        .observe(drawn(1, 0, ids=(0, 1, 50, 51), sources=(0, 0, 1, 1)))
        .passed
    )
    verdict = watching(spec, plan(50, 50)).observe(
        drawn(1, 0, ids=(0, 1, 50, 51), sources=(0, 0, 0, 1))
    )
    assert not verdict.passed and verdict.measured["outside"] == 1


def test_rows_may_see_a_window_again_in_the_next_epoch(spec):
    check = watching(spec, plan(6))
    assert check.observe(drawn(1, 0, ids=(0, 1, 2, 3))).passed
    assert check.observe(drawn(2, 4, ids=(4, 5, 0, 1), epoch=1, epochs=(0, 0, 1, 1))).passed
    assert not check.observe(drawn(3, 8, ids=(2, 3, 4, 0), epoch=1)).passed


def test_rows_counts_the_epochs_of_every_source_by_itself(spec):
    """A source of two windows is in its third epoch when the other is still in its first."""
    for epochs, passes in (((1, 2, 0, 0), True), ((1, 1, 0, 0), False), ((1, 2, 1, 1), False)):
        check = watching(spec, plan(2, 20))
        assert check.observe(
            drawn(1, 0, ids=(0, 1, 0, 2), sources=(0, 0, 0, 1), epochs=(0, 0, 1, 0), epoch=1)
        ).passed
        second = drawn(
            2, 4, ids=(1, 0, 3, 4), sources=(0, 0, 1, 1), epochs=epochs, epoch=max(epochs)
        )
        assert check.observe(second).passed == passes


def test_rows_remembers_a_bounded_number_of_windows(spec):
    check = watching(spec, plan(10_000))
    for step in range(1, 400):
        assert check.observe(drawn(step, 4 * (step - 1))).passed
    assert len(check.state_dict()["recent"]) == check.limits.recent_windows_min == 512


def test_rows_counts_over_a_resume(watch, spec):
    watch.observe(drawn(1, 0))
    resumed = Rows(limits_of(spec.gates["data.rows"]))
    resumed.load_state_dict(watch.state_dict())
    assert not resumed.observe(Started(step=1, plan=plan(100))).passed, (
        "the run starts over at sample 0"
    )
    resumed.load_state_dict(watch.state_dict())
    assert resumed.observe(Started(step=1, plan=plan(100, cursor=4, drawn=[4]))) is None
    assert resumed.observe(drawn(2, 4)).passed


def test_rows_counts_the_epochs_over_a_resume_from_the_plan(spec):
    """Six windows, four of them drawn before: the second epoch begins after two more."""
    for declared, passes in (([4], True), ([0], False)):
        check = watching(spec, plan(6, cursor=4, drawn=declared))
        assert (
            check.observe(drawn(2, 4, ids=(4, 5, 0, 1), epoch=1, epochs=(0, 0, 1, 1))).passed
            == passes
        )


def test_rows_without_drawn_rows_or_without_counted_tokens_miss_a_half(spec):
    plan = {"cursor": 0, "drawn": [0], "tokens_seen": 0, "rows_per_step": 1, "tokens_per_step": 4}
    plan["sources"] = [{"name": "all", "first": 0, "n_windows": 9}]
    check = Rows(limits_of(spec.gates["data.rows"]))
    check.observe(Started(step=0, plan=plan))
    assert check.missing() == "the rows that were drawn"
    drawn = BatchDrawn(
        step=1,
        cursor_before=0,
        cursor_after=1,
        sample_ids=(3,),
        epoch=0,
        n_tokens=4,
        sources=(0,),
        epochs=(0,),
    )
    assert check.observe(drawn).passed and check.missing() == "the tokens of a step"
    assert check.observe(
        step_taken(step=1, sample_ids=(3,), tokens_seen=4, n_expected_tokens=4, n_valid_tokens=4)
    ).passed
    assert check.missing() == ""
