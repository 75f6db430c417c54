"""What our trainer shows to its runtime gates."""

import json
from contextlib import contextmanager

import pytest
import torch

from stackproof.config import NeverStop
from stackproof.contracts.conditions import ContractError
from stackproof.evaluate import bits_per_byte
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import GateFailed
from stackproof.train.callbacks import GateEvents
from stackproof.train.loop import train
from stackproof.train.start import fresh


@pytest.fixture
def cfg(museum_folder):
    base = museum_config(museum_folder)
    return base.model_copy(
        update={"train": base.train.model_copy(update={"max_steps": 8}), "stop": NeverStop()}
    )


def test_a_model_that_is_scored_in_training_mode_halts_the_run(cfg, tmp_path, monkeypatch):
    """Both phases are judged: eight steps and two evaluations without the fault."""
    only = ("runtime.mode",)
    (result,) = train(fresh(cfg, (), tmp_path / "clean", only=only)).gates
    assert (result.verdict, result.checks) == ("pass", 10)

    @contextmanager
    def without_switching(model):
        with torch.no_grad():
            yield

    monkeypatch.setattr(bits_per_byte, "evaluating", without_switching)
    with pytest.raises(GateFailed, match="not in evaluation mode") as caught:
        train(fresh(cfg, (), tmp_path / "faulty", only=only))
    assert caught.value.record.gates[0].first_failure_step == 7


def test_the_first_update_and_each_read_only_section_are_judged_as_movement(cfg, tmp_path):
    """Eight updates, the time before each, and the first and last evaluation, sample and save."""
    (result,) = train(fresh(cfg, (), tmp_path / "run", only=("optim.movement",))).gates
    assert (result.verdict, result.checks) == ("pass", 22)


def test_a_run_whose_end_no_gate_has_judged_ends_as_a_bug(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(GateEvents, "on_train_end", lambda self, trainer, status: None)
    with pytest.raises(ContractError, match="have judged its end"):
        train(fresh(cfg, (), tmp_path / "run", only=("checkpoint.pointers",)))
    record = json.loads((tmp_path / "run/metadata.json").read_text())
    assert record["status"] == "failed" and record["exit_code"] == 1
