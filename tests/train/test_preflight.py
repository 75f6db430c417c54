"""Preflight judges the run's own model and optimizer, and leaves them as they were."""

import pytest
import torch

from stackproof.config import load_config
from stackproof.spec.errors import GateFailed
from stackproof.train import start
from stackproof.train.state import build_state, state_checksums

READERS = (
    "model.causal model.isolation model.init-law model.reference-differential "
    "model.training-forward sampling.cache-parity evaluation.byte-conservation "
    "optim.parameter-groups optim.decay-groups optim.reference-update"
).split()


def forget_a_parameter(state):
    state.optimizer.param_groups[0]["params"].pop()


def decay_a_gain(state):
    groups = state.optimizer.param_groups
    decayed, spared = (
        next(g for g in groups if bool(g["weight_decay"]) is b) for b in (True, False)
    )
    decayed["params"].append(spared["params"].pop())


@torch.no_grad()
def change_a_gain(state):
    state.model.final_norm.weight[3] = 1.0001


@pytest.mark.parametrize(
    ("change", "gate_id", "message"),
    [
        (forget_a_parameter, "optim.parameter-groups", "not in the optimizer"),
        (decay_a_gain, "optim.parameter-groups", "is not the declared one"),
        (change_a_gain, "model.init-law", "final_norm.weight does not follow"),
    ],
)
def test_a_fault_of_the_runs_own_objects_stops_it(
    small_cfg, tmp_path, monkeypatch, change, gate_id, message
):
    """Whatever else is built for a gate is sound: the fault is made after the run's state is."""

    def faulty(*parts):
        state = build_state(*parts)
        change(state)
        return state

    monkeypatch.setattr(start, "build_state", faulty)
    with pytest.raises(GateFailed, match=message) as stopped:
        start.fresh(small_cfg, (), tmp_path / "run", only=(gate_id,)).__enter__()
    assert stopped.value.gate_id == gate_id


@pytest.mark.parametrize(
    "sets", [(), ("model.ffn.kind=moe", "train.activation_checkpointing=blocks")], ids=str
)
def test_a_run_is_as_it_was_after_its_preflight(small_cfg, tmp_path, monkeypatch, sets):
    """Bit for bit, in the same memory: the probe of updates continues with the parameters."""
    cfg, _ = load_config(small_cfg, sets=sets)
    before, memory = {}, []

    def built(*parts):
        state = build_state(*parts)
        before.update(state_checksums(state))
        memory.extend(p.data_ptr() for p in state.model.parameters())
        return state

    monkeypatch.setattr(start, "build_state", built)
    with start.fresh(cfg, (), tmp_path / "run", only=READERS) as trainer:
        state = trainer.state
        assert {r.id for r in trainer.keeper.results() if r.verdict == "pass"} == set(READERS)
        assert state_checksums(state) == before
        assert [p.data_ptr() for p in state.model.parameters()] == memory
        assert all(p.grad is None for p in state.model.parameters())
