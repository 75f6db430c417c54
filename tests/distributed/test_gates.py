"""Gates of a run on several ranks, in real processes."""

import pytest
import torch

from stackproof.config import load_config
from stackproof.contracts.distributed import (
    EvaluationOfOneProcess,
    MasksOfOneProcess,
    OneProcessStep,
)
from stackproof.contracts.events import EvaluationRepeated, StepRepeated
from stackproof.contracts.gate import limits_of
from stackproof.museum.prove import Prover
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.gates import load_spec
from stackproof.train.device import refuse_emulated
from stackproof.train.mask_comparison import Masks, compare_masks

GATES = [g for g in load_spec().gates.values() if g.subsystem == "distributed"]
FOREIGN = [g for g in GATES if "foreign" in g.kinds]


@pytest.fixture(scope="module")
def prover(museum_folder, ranks):
    prover = Prover(museum_folder)
    prover._ranks = ranks
    return prover


@pytest.fixture(scope="module")
def clean(prover):
    """Verdicts of all gates in one run without a plant."""
    (dropout,) = [g for g in GATES if g.needs]
    cfg, gates = prover.config(dropout), tuple(g.id for g in GATES)
    job = cfg, gates, None, prover.root / "cache", prover.run_dir()
    first, second = prover._ranks.run("stackproof.museum.ranks:judge", *job)
    assert not first.raised and not second.raised
    assert not second.value.verdicts  # rank 0 alone has gates
    return first.value.verdicts


@pytest.mark.parametrize("gate", GATES, ids=lambda g: g.id)
def test_gate_is_green_and_red_on_a_plant(prover, clean, gate):
    from stackproof.museum.plant import load_museum

    green, _ = clean[gate.id]
    assert green.outcome == "pass" and green.measured
    seen = prover.planted(gate, load_museum()[gate.plants[0]])
    assert seen.outcome == "killed", seen.verdict.message
    assert seen.touches > 0


@pytest.fixture(scope="module")
def clean_script(prover):
    """Verdicts of the gates of other trainers on each rank of the script, without a plant."""
    gates = tuple(g.id for g in FOREIGN)
    answers = prover._ranks.run("stackproof.museum.ranks:judge_script", gates, None)
    assert not [a.raised for a in answers if a.raised]
    return [answer.value.verdicts for answer in answers]


@pytest.mark.parametrize("gate", FOREIGN, ids=lambda g: g.id)
def test_gate_of_other_trainers_is_green_and_red_on_a_plant(prover, clean_script, gate):
    from stackproof.museum.plant import load_museum

    for verdicts in clean_script:
        assert verdicts[gate.id][0].outcome == "pass" and verdicts[gate.id][0].measured
    plant = next(p for p in map(load_museum().get, gate.plants) if p.trainer == "script")
    seen = prover.planted(gate, plant)
    assert seen.outcome == "killed", seen.verdict.message
    assert seen.touches > 0


@pytest.fixture
def half_units():
    """Skips where a run in bfloat16 is refused."""
    try:
        refuse_emulated(torch.bfloat16, torch.device("cpu"), "train.dtype")
    except EnvironmentUnfit as e:
        pytest.skip(str(e.what))


STEP = "distributed.one-process-step"


def in_bfloat16(prover, plant_id=None):
    """The verdict on the first step of a tensor group in bfloat16."""
    fixed = {"train.dtype": "bfloat16", "parallel.tensor": 2, "model.dropout": 0.1}
    fixed |= {"train.max_steps": 4, "schedule.warmup_steps": 1}
    gate = load_spec().gates[STEP]
    cfg = prover.config(gate)
    cfg = load_config(cfg, fixed={key: (value, "test") for key, value in fixed.items()})[0]
    job = cfg, (STEP,), plant_id, prover.root / "cache", prover.run_dir()
    first, _ = prover._ranks.run("stackproof.museum.ranks:judge", *job)
    assert not first.raised
    return first.value.verdicts[STEP][0]


def test_step_in_half_precision_is_green_and_red_on_a_plant(prover, half_units):
    green = in_bfloat16(prover)
    # Red by the limits of float32: the parts of a product are rounded before they are added.
    assert green.outcome == "pass" and 1e-3 < green.measured["half_gradient_rel_error"] <= 3e-2
    red = in_bfloat16(prover, "distributed.norm-gradient-of-a-slice")
    assert red.outcome == "fail" and red.measured["half_gradient_rel_error"] > 0.5


@pytest.mark.parametrize("name", ["loss", "grad_norm", "gradient", "update"])
@pytest.mark.parametrize("half", [False, True])
def test_each_error_of_a_step_has_a_limit(name, half):
    limits = limits_of(load_spec().gates[STEP])
    key = f"half_{name}" if half and name != "update" else name
    limit = getattr(limits, f"{key}_rel_error_max")
    none = dict.fromkeys(("loss", "grad_norm", "gradient", "update"), 0.0)
    for error, outcome in ((limit, "pass"), (1.01 * limit, "fail"), (float("nan"), "fail")):
        event = StepRepeated(1, 20, none | {name: error}, "embed.weight", {}, half=half)
        verdict = OneProcessStep(limits).observe(event)
        assert verdict.outcome == outcome
        assert (f"the {name} of" in verdict.message) == (outcome == "fail")


@pytest.mark.parametrize("half", [False, True])
def test_evaluation_has_a_limit_in_each_precision(half):
    limits = limits_of(load_spec().gates["distributed.evaluation"])
    limit = limits.half_rel_error_max if half else limits.rel_error_max
    for error, outcome in ((limit, "pass"), (1.01 * limit, "fail"), (float("nan"), "fail")):
        event = EvaluationRepeated(1, "sample", error, half=half)
        assert EvaluationOfOneProcess(limits).observe(event).outcome == outcome


@pytest.fixture
def masks_gate():
    return MasksOfOneProcess(limits_of(load_spec().gates["distributed.dropout"]))


def test_masks_are_told_apart(masks_gate):
    masks = [Masks(4, 0, ("a", "b")), Masks(4, 0, ("c", "d"))]
    event, before = compare_masks(1, masks, set())
    assert (event.n_masks, event.n_telling, event.n_repeated) == (8, 4, 0)
    assert masks_gate.observe(event).outcome == "pass"
    for found, seen_before, repeated in (
        ([Masks(2, 0, ("a", "b")), Masks(2, 0, ("b", "e"))], set(), 1),
        ([Masks(2, 0, ("a", "x"))], before, 1),
        ([Masks(3, 0, ("a", "a", "x"))], before, 2),
    ):
        event, _ = compare_masks(2, found, seen_before)
        assert event.n_repeated == repeated
        verdict = masks_gate.observe(event)
        assert verdict.outcome == "fail" and "another row" in verdict.message
    foreign, _ = compare_masks(1, [Masks(2, 1, ())], set())
    assert "one process" in masks_gate.observe(foreign).message
    few, _ = compare_masks(1, [Masks(2, 0, ())], set())
    assert masks_gate.observe(few).outcome == "not_run"


def test_a_job_that_fails_is_an_error_and_no_verdict(prover):
    answers = prover._ranks.run("stackproof.museum.ranks:judge", "no configuration")
    assert all("TypeError" in answer.raised for answer in answers)
