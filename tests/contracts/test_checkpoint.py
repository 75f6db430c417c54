"""Gates of checkpoints against real saves and real damage."""

import pytest
import torch

from stackproof.contracts.gate import call_check
from stackproof.gate_inputs.preflight import micro
from stackproof.museum.plant import load_museum
from stackproof.train.state import build_state, live_crc32


@pytest.fixture
def saved(small_cfg, dataset, ingredients, tmp_path):
    state = build_state(micro(small_cfg), dataset, torch.device("cpu"))
    live = live_crc32(state)
    return {
        "checkpoint_dir": ingredients["save_state"](state, tmp_path),
        "live_crc32": live,
        "expected_step": 0,
    }


def test_contract_is_green_on_a_real_save(spec, saved):
    verdict = call_check(spec.gates["checkpoint.contract"], saved)
    assert verdict.outcome == "pass", verdict.message


def test_contract_is_red_on_one_flipped_bit(spec, saved):
    path = saved["checkpoint_dir"] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert call_check(spec.gates["checkpoint.contract"], saved).outcome == "fail"


def test_contract_is_red_on_a_stranger_and_on_a_wrong_step(spec, saved):
    assert (
        call_check(spec.gates["checkpoint.contract"], saved | {"expected_step": 1}).outcome
        == "fail"
    )
    (saved["checkpoint_dir"] / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert "optimizer.pt" in call_check(spec.gates["checkpoint.contract"], saved).message


def test_durability_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["checkpoint.durability"], ingredients)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["faults"] >= 12 and verdict.measured["damages_refused"] == 4


def test_resume_equivalence_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["checkpoint.resume-equivalence"], ingredients)
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
def test_resume_equivalence_sees_each_lost_part(spec, ingredients, plant_id):
    with load_museum()[plant_id].apply():
        assert (
            call_check(spec.gates["checkpoint.resume-equivalence"], ingredients).outcome == "fail"
        )


def test_digest_holds_every_number_of_every_group(small_cfg, dataset):
    """Learning rate, peak, decay and what else a rule has: what a resume could put back wrongly."""
    import torch

    from stackproof.gate_inputs.digest import digest
    from stackproof.gate_inputs.preflight import shrunk
    from stackproof.train.state import build_state

    state = build_state(shrunk(small_cfg), dataset, torch.device("cpu"))
    before = digest(state)
    for group in state.optimizer.param_groups:
        group["weight_decay"] += 0.5
        assert (
            digest(state)[f"optim.{group['name']}.weight_decay"]
            != before[f"optim.{group['name']}.weight_decay"]
        )
    assert {
        "optim.muon.momentum",
        "optim.decay.betas",
        "optim.no-decay.lr",
        "optim.muon.peak_lr",
    } <= before.keys()
