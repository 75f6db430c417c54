"""Gates of checkpoints against real saves and real damage."""

from dataclasses import replace

import pytest
import torch

from stackproof.contracts.callbacks.subject import ComparedWeights
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject
from stackproof.museum import script
from stackproof.museum.plant import load_museum
from stackproof.subject.checkpoints import WrittenCheckpoint
from stackproof.subject.run import small_run
from stackproof.subject.training import RunTrainee
from stackproof.train.state import build_state, live_crc32
from tests.subjects import TINY


@pytest.fixture
def saved(small_cfg, dataset, subject, tmp_path) -> WrittenCheckpoint:
    state = build_state(small_run(small_cfg, TINY), dataset, torch.device("cpu"))
    live = live_crc32(state)
    subject.checkpoints.save(RunTrainee(state), tmp_path)
    return WrittenCheckpoint(tmp_path / "step-00000000", 0, live)


def judged(spec, saved):
    return call_check(spec.gates["checkpoint.reloads"], Subject(saved=saved))


def test_reloads_is_green_on_a_real_save(spec, saved):
    verdict = judged(spec, saved)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured == {"differing": 0, "compared": len(saved.live_checksums)}


def test_reloads_is_red_on_one_flipped_bit(spec, saved):
    path = saved.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert judged(spec, saved).outcome == "fail"


def test_reloads_is_red_on_an_undeclared_file_and_on_a_wrong_step(spec, saved):
    assert judged(spec, replace(saved, step=1)).outcome == "fail"
    (saved.folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert "optimizer.pt" in judged(spec, saved).message


def test_reloads_is_red_on_a_tensor_that_is_left_out(spec, saved):
    """A head of its own beside a tied embedding, or a moment that was not saved, has a name."""
    more = {**saved.live_checksums, "head.weight": 1}
    verdict = judged(spec, replace(saved, live_checksums=more))
    assert verdict.outcome == "fail" and "head.weight" in verdict.message


def test_reloads_compares_what_another_loader_has_read(spec):
    live, tied = {"embed": 1, "out": 2}, (True, True)
    assert judged(spec, ComparedWeights(live, live, tied)).passed
    verdict = judged(spec, ComparedWeights(live, live | {"out": 3}, tied))
    assert verdict.outcome == "fail" and verdict.measured["differing"] == 1
    untied = judged(spec, ComparedWeights(live, live, (True, False)))
    assert untied.outcome == "fail" and "one tensor" in untied.message


def test_reloads_is_red_on_the_foreign_plant(spec):
    with load_museum()["checkpoint.foreign-tensor-changed"].apply():
        verdict, _ = script.verdict_of("checkpoint.reloads")
    assert verdict.outcome == "fail" and verdict.measured["differing"] >= 1
    assert script.verdict_of("checkpoint.reloads")[0].passed


def test_reloads_is_red_where_nothing_was_compared(spec):
    nothing = Subject(saved=ComparedWeights({}, {}, (False, False)))
    verdict = call_check(spec.gates["checkpoint.reloads"], nothing)
    assert verdict.outcome == "fail" and verdict.measured["compared"] == 0


def test_durability_is_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates["checkpoint.durability"], subject)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["faults"] >= 12 and verdict.measured["damages_refused"] == 4


def test_resume_equivalence_is_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates["checkpoint.resume-equivalence"], subject)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["crossed_epoch_end"] is True and verdict.measured["compared_parts"] > 20


@pytest.mark.parametrize(
    "plant_id",
    [
        p
        for p in load_museum()
        if p.startswith("checkpoint.") and load_museum()[p].gate == "checkpoint.resume-equivalence"
    ],
)
def test_resume_equivalence_sees_each_lost_part(spec, subject, plant_id):
    with load_museum()[plant_id].apply():
        assert call_check(spec.gates["checkpoint.resume-equivalence"], subject).outcome == "fail"


def test_digest_holds_every_number_of_every_group(subject):
    """Learning rate, peak, decay and what else a rule has: what a resume could put back wrongly."""
    trainee = subject.training.trainee()
    before = trainee.digest()
    for group in trainee.optimizer.param_groups:
        group["weight_decay"] += 0.5
        key = f"optim.{group['name']}.weight_decay"
        assert trainee.digest()[key] != before[key]
    assert {
        "optim.muon.momentum",
        "optim.decay.betas",
        "optim.no-decay.lr",
        "optim.muon.peak_lr",
    } <= before.keys()
