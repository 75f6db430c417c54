"""Monitors run as often as they are declared to."""

import json

import pytest

from stackproof.config import NeverStop
from stackproof.contracts.events import (
    BatchDrawn,
    Evaluated,
    Finished,
    Recomputed,
    Sampled,
    Saved,
    Started,
)
from stackproof.contracts.gate import limits_of
from stackproof.contracts.runtime import Cadence
from stackproof.museum.collection import museum_config
from stackproof.museum.plant import load_museum
from stackproof.recipes import RECIPES
from stackproof.recipes.depth import depth
from stackproof.spec.errors import GateFailed
from stackproof.spec.records import GateResult
from stackproof.train import loop
from stackproof.train.loop import train
from stackproof.train.start import fresh
from tests.contracts.test_optim import step_taken

GATE = "runtime.cadence"
EVERY = {
    "Evaluated": (10, "eval.every"),
    "Sampled": (5, "sample.every"),
    "Saved": (20, "checkpoint.every"),
    "Recomputed": (25, "train.sdc_check_every"),
}


def started(step: int = 0, max_steps: int = 100, **changed) -> Started:
    return Started(step=step, plan={"max_steps": max_steps, "intervals": EVERY | changed})


def make(spec) -> Cadence:
    return Cadence(limits_of(spec.gates[GATE]))


def drawn(step: int) -> BatchDrawn:
    return BatchDrawn(
        step=step, cursor_before=0, cursor_after=1, sample_ids=(0,), epoch=0, n_tokens=1
    )


def play(check, steps, *, without: str = "") -> int | None:
    """The step at which a loop like that of `stack train` turns red,
    in which one kind of event is missing.
    """
    for step in steps:
        shown = [drawn(step), step_taken(step=step)]
        shown += [Evaluated(step, 1.0, 1.0, (1.0,), "h", None, 2.0)] if step % 10 == 0 else []
        shown += [Sampled(step, "text")] if step % 5 == 0 else []
        shown += [Saved(step, "folder")] if step % 20 == 0 else []
        shown += [Recomputed(step, 1, ())] if step % 25 == 0 else []
        for event in shown:
            if type(event).__name__ != without and not check.observe(event).passed:
                return step
    return None


RED_WITHOUT = {
    "": None,
    "Evaluated": 11,
    "Sampled": 6,
    "Saved": 21,
    "Recomputed": 26,
    "StepTaken": 2,
    "BatchDrawn": 2,
}


@pytest.mark.parametrize(("without", "red_at"), RED_WITHOUT.items())
def test_a_gap_beyond_the_declared_interval_is_red_at_its_step(spec, without, red_at):
    check = make(spec)
    assert check.observe(started()).passed
    assert play(check, range(1, 61), without=without) == red_at


@pytest.mark.parametrize("key", ["sampled", "evaluated", "saved", "recomputed"])
def test_an_interval_that_disables_a_monitor_is_red_before_step_one(spec, key):
    """At the limit it passes, one step beyond it is red, however short the run.
    A run shorter than an allowed interval looks at its end.
    """
    name, limit = key.capitalize(), int(spec.gates[GATE].limits[f"{key}_gap_steps_max"].value)
    assert make(spec).observe(started(max_steps=10**6, **{name: (limit, "k")})).passed
    beyond = make(spec).observe(started(max_steps=10**6, **{name: (limit + 1, "the.key")}))
    assert not beyond.passed and "the.key" in beyond.message and str(limit) in beyond.message
    assert not make(spec).observe(started(max_steps=30, **{name: (limit + 1, "k")})).passed
    assert make(spec).observe(started(max_steps=30, **{name: (31, "k")})).passed
    both = make(spec).observe(
        started(Evaluated=(10**6, "eval.every"), Sampled=(10**6, "sample.every"))
    )
    assert "eval.every is 1000000" in both.message and "sample.every is 1000000" in both.message, (
        "all are told at once"
    )


def test_the_last_step_is_looked_at(spec):
    check = make(spec)
    check.observe(started())
    assert play(check, range(1, 14)) is None
    assert not check.observe(Finished(step=13, status="completed")).passed
    for seen in (Evaluated, Sampled):
        assert not check.observe(Finished(step=13, status="completed")).passed
        check.last[seen.__name__] = 13
    assert check.observe(Finished(step=13, status="completed")).passed


def test_an_interval_that_is_not_declared_is_red(spec):
    verdict = make(spec).observe(
        Started(step=0, plan={"max_steps": 100, "intervals": {"Evaluated": EVERY["Evaluated"]}})
    )
    assert not verdict.passed and "Sampled" in verdict.message


def test_clocks_go_on_over_a_resume_and_start_afresh_where_an_interval_was_changed(spec):
    check, resumed, forked = make(spec), make(spec), make(spec)
    check.observe(started())
    assert play(check, range(1, 14)) is None
    saved = json.loads(json.dumps(check.state_dict()))
    resumed.load_state_dict(saved)
    resumed.observe(started(step=13))
    assert play(resumed, range(14, 61), without="Sampled") == 16, "the last sample was at step 10"
    forked.load_state_dict(saved)
    forked.observe(started(step=13, Sampled=(2, "sample.every")))
    assert all(
        forked.observe(event(step)).passed
        for step in (14, 15)
        for event in (drawn, lambda n: step_taken(step=n))
    )
    assert forked.observe(drawn(16)).measured["monitor"] == "Sampled", (
        "13 + 2 steps are over, not 10 + 2"
    )


def test_every_recipe_keeps_the_cadence(spec):
    for cfg in [make_cfg() for make_cfg in RECIPES.values()] + [depth(n) for n in (1, 3, 8, 24)]:
        intervals = {
            "Evaluated": cfg.eval.every,
            "Sampled": cfg.sample.every,
            "Saved": cfg.checkpoint.every,
        }
        intervals["Recomputed"] = cfg.train.sdc_check_every
        verdict = make(spec).observe(
            started(max_steps=cfg.train.max_steps, **{k: (v, k) for k, v in intervals.items()})
        )
        assert verdict.passed, (cfg.recipe, verdict.message)


@pytest.fixture
def cfg(museum_folder):
    base = museum_config(museum_folder)
    return base.model_copy(
        update={"train": base.train.model_copy(update={"max_steps": 14}), "stop": NeverStop()}
    )


@pytest.mark.parametrize(
    ("plant", "step"),
    [
        ("runtime.monitor-on-another-runner", 3),
        ("runtime.evaluation-never-called", 8),
        ("runtime.interval-beyond-the-end", 0),
    ],
)
def test_plants_are_seen_at_the_first_missed_look(cfg, tmp_path, plant, step):
    with load_museum()[plant].apply(), pytest.raises(GateFailed, match=GATE) as caught:
        train(fresh(cfg, (), tmp_path / "run", only=(GATE,)))
    record = caught.value.record
    assert record.status == "halted" and record.gates[0].first_failure_step == step
    assert (tmp_path / "run" / "metrics.jsonl").exists() is (step > 0), (
        "a declared gap is refused before step 1"
    )


def test_a_gate_that_never_looked_can_neither_pass_nor_fail():
    said = {"id": GATE, "fingerprint": "a" * 64, "verdict": "pass", "checks": 1}
    assert GateResult.model_validate(said).checks == 1
    for verdict in ("pass", "fail"):
        with pytest.raises(ValueError, match="never looked"):
            GateResult.model_validate(said | {"verdict": verdict, "checks": 0})
    assert (
        GateResult.model_validate(said | {"verdict": "not_run", "checks": 0}).verdict == "not_run"
    )


def test_a_monitor_that_falls_silent_in_the_middle_is_seen_although_it_has_a_heartbeat(
    cfg, tmp_path, monkeypatch
):
    original = loop.sample
    monkeypatch.setattr(
        loop, "sample", lambda trainer: original(trainer) if trainer.state.step < 6 else None
    )
    with pytest.raises(GateFailed, match=GATE) as caught:
        train(fresh(cfg, (), tmp_path / "run", only=(GATE, "sampling.coherence")))
    looked = {g.id: g for g in caught.value.record.gates}
    assert looked["sampling.coherence"].checks == 2 and looked[GATE].first_failure_step == 7
    assert caught.value.verdict.measured["monitor"] == "Sampled"
