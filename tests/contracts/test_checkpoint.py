"""Gates of checkpoints against real saves and real damage."""

import json
from dataclasses import replace

import pytest
import torch

from stackproof.config import load_config
from stackproof.contracts.callbacks.subject import ComparedReplicas, ComparedWeights
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject, TraineeOptions
from stackproof.museum import script
from stackproof.museum.plant import load_museum
from stackproof.subject.assemble import subject_of
from stackproof.subject.checkpoints import FILES, REQUIRED_STATE, WrittenCheckpoint
from stackproof.subject.run import small_run
from stackproof.subject.training import RunTrainee
from stackproof.train.state import build_state, live_crc32
from tests.subjects import TINY, changed


@pytest.fixture
def saved(small_cfg, dataset, subject, tmp_path) -> WrittenCheckpoint:
    state = build_state(small_run(small_cfg, TINY), dataset, torch.device("cpu"))
    live = live_crc32(state)
    subject.checkpoints.save(RunTrainee(state), tmp_path)
    (tmp_path / "latest").unlink()  # in a run it moves after the verdict
    return WrittenCheckpoint(tmp_path / "step-00000000", 0, True, live)


def judged(spec, saved):
    return call_check(spec.gates["checkpoint.reloads"], Subject(saved=saved))


def test_reloads_is_green_on_a_real_save(spec, saved):
    verdict = judged(spec, saved)
    assert verdict.outcome == "pass", verdict.message
    tied = {"live_tied": True, "reloaded_tied": True}
    assert verdict.measured == {"differing": 0, "compared": len(saved.live_checksums)} | tied


def test_reloads_is_red_on_one_flipped_bit(spec, saved):
    path = saved.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert judged(spec, saved).outcome == "fail"


def test_reloads_is_red_on_an_undeclared_file_and_on_a_wrong_step(spec, saved):
    assert "has step 0, saved was 1" in judged(spec, replace(saved, step=1)).message
    (saved.folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert "undeclared files: optimizer.pt" in judged(spec, replace(saved)).message


@pytest.mark.parametrize("key", REQUIRED_STATE)
def test_reloads_is_red_on_a_document_without_a_key(spec, saved, key):
    path = saved.folder / "state.json"
    state = json.loads(path.read_bytes())
    del state[key]
    path.write_text(json.dumps(state))
    message = judged(spec, saved).message
    assert f"lacks {key}" in message and "does not describe state.json" in message


@pytest.mark.parametrize("file", FILES)
def test_reloads_is_red_on_a_missing_file(spec, saved, file):
    (saved.folder / file).unlink()
    verdict = judged(spec, saved)
    assert verdict.outcome == "fail" and f"lacks {file}" in verdict.message


def test_reloads_is_red_where_latest_names_the_folder_before_its_verdict(spec, saved):
    (saved.folder.parent / "latest").write_text(saved.folder.name)
    assert "latest names it before its verdict" in judged(spec, saved).message
    assert judged(spec, replace(saved, published=True)).passed
    (saved.folder.parent / "latest").write_text("step-00000007")
    assert judged(spec, replace(saved)).passed


def test_reloads_judges_the_tied_head_of_a_folder(spec, saved):
    verdict = judged(spec, replace(saved, live_tied=False))
    assert verdict.outcome == "fail" and "two tensors" in verdict.message


def test_reloads_allows_no_more_tensors_than_its_limit(spec):
    """The limit is read: with one tensor allowed to differ, two are red."""
    gate = spec.gates["checkpoint.reloads"]
    one = gate.limits["differing_max"].model_copy(update={"value": 1})
    lenient = gate.model_copy(update={"limits": {"differing_max": one}})
    live = {"a": 1, "b": 2}
    for n, outcome in ((1, "pass"), (2, "fail")):
        other = live | dict.fromkeys(list(live)[:n], 9)
        saved = ComparedWeights(live, other, (True, True))
        assert call_check(lenient, Subject(saved=saved)).outcome == outcome


def test_equal_replicas_alone_are_not_run_and_other_ones_are_red(spec):
    """Several processes that hold one model have not reloaded it."""
    live = {"a": 1, "b": 2}
    verdict = judged(spec, ComparedReplicas(live, live))
    assert verdict.outcome == "not_run" and "reloaded_checksums" in verdict.message
    apart = judged(spec, ComparedReplicas(live, live | {"b": 3}))
    assert apart.outcome == "fail" and "two processes hold 1 other tensor(s): b" in apart.message


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


def test_resume_equivalence_is_red_where_no_epoch_ends(spec, subject):
    """Trainees that begin at the first row instead of near the end of an epoch."""

    def at_the_beginning(options=TraineeOptions()):
        return subject.training.trainee(replace(options, first_row=0))

    verdict = call_check(
        spec.gates["checkpoint.resume-equivalence"],
        changed(subject, training={"trainee": at_the_beginning}),
    )
    assert verdict.outcome == "fail" and "of an epoch" in verdict.message
    assert verdict.measured["crossed_epoch_end"] is False
    assert verdict.measured["differing_parts"] == 0


@pytest.mark.parametrize(
    "plant_id",
    [
        p
        for p in load_museum()
        if p.startswith("checkpoint.") and load_museum()[p].gate == "checkpoint.resume-equivalence"
    ],
)
def test_resume_equivalence_sees_each_lost_part(spec, subject, small_cfg, dataset, plant_id):
    plant, gate = load_museum()[plant_id], spec.gates["checkpoint.resume-equivalence"]
    if plant.museum:
        fixed = {key: (value, "plant") for key, value in plant.museum.items()}
        subject = subject_of(load_config(small_cfg, fixed=fixed)[0], dataset, torch.device("cpu"))
        assert call_check(gate, subject).passed
    with plant.apply():
        assert call_check(gate, subject).outcome == "fail"


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
