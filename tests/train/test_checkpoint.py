"""Checkpoints under kills, and what loading refuses."""

import os
import random
import signal
import time

import pytest
import torch

from spec.errors import CheckpointError
from stack.config import AdamW, Muon
from stack.train import checkpoint
from stack.train.preflight import advance, digest, micro, shrunk
from stack.train.state import build_state


def document(state, dataset):
    return checkpoint.state_document(
        state, tokenizer_sha256=dataset.tokenizer.sha256, vocab_size=dataset.tokenizer.vocab_size, gates={}, record="test"
    )


@pytest.fixture
def state(small_cfg, dataset):
    return build_state(micro(small_cfg), dataset, torch.device("cpu"))


def test_forty_sigkills_during_saves_always_leave_a_good_checkpoint(state, dataset, tmp_path):
    """A child saves as fast as it can and is killed at random moments; whatever `latest` names always loads."""
    checkpoint.save(tmp_path, state, document(state, dataset))
    draw, steps = random.Random(3), [0]
    for _ in range(40):
        child = os.fork()
        if child == 0:
            while True:
                state.step = (state.step + 1) % 5
                checkpoint.save(tmp_path, state, document(state, dataset))
                checkpoint.retain(tmp_path, 2)
        time.sleep(draw.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps.append(checkpoint.load(checkpoint.find(tmp_path)).state["step"])
    assert len(set(steps)) > 1, "the child did save"


def test_retain_keeps_the_newest_the_best_and_nothing_torn(state, dataset, tmp_path):
    for step in range(1, 6):
        state.step = step
        folder = checkpoint.save(tmp_path, state, document(state, dataset))
        if step == 2:
            checkpoint.point(tmp_path, "best", folder)
        (tmp_path / f".writing-step-{step}").mkdir()
        checkpoint.retain(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "step-00000002", "step-00000004", "step-00000005"]


def test_wrapper_prefixes_do_not_change_names(state, dataset, tmp_path):
    plain = checkpoint.model_tensors(state.model)
    wrapped = {f"_orig_mod.module.{n}": t for n, t in plain.items()}
    assert list(map(checkpoint.plain_name, wrapped)) == list(plain)
    checkpoint.load_model(state.model, {n: t.clone() for n, t in wrapped.items()})


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_model_are_refused(state, change):
    tensors = {n: t.clone() for n, t in checkpoint.model_tensors(state.model).items()}
    first = next(iter(tensors))
    match change:
        case "missing":
            del tensors[first]
        case "extra":
            tensors["more.weight"] = torch.zeros(1)
        case "shape":
            tensors[first] = tensors[first][:-1]
    with pytest.raises(CheckpointError, match="tensor"):
        checkpoint.load_model(state.model, tensors)


OPTIMS = {"adamw": AdamW(lr=3e-3), "muon": Muon(lr=3e-3, adamw_lr=1e-3)}


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_restored_state_is_the_saved_one_in_every_part(small_cfg, dataset, tmp_path, optim):
    small_cfg = small_cfg.model_copy(update={"optim": optim})
    state = build_state(shrunk(small_cfg), dataset, torch.device("cpu"))
    for _ in range(3):
        advance(state)
    expected = digest(state)
    checkpoint.save(tmp_path, state, document(state, dataset))
    fresh = build_state(shrunk(small_cfg), dataset, torch.device("cpu"))
    assert digest(fresh) != expected
    with torch.no_grad():
        checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path)))
    got = digest(fresh)
    assert {k for k in expected if expected[k] != got[k]} <= {"lr"}, "the rate is a function of the step and set before each update"


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_a_restored_run_goes_on_bit_for_bit(small_cfg, dataset, tmp_path, optim):
    """Three steps, a save, three more; the restored state makes the same last three, with dropout on."""
    cfg = shrunk(small_cfg.model_copy(update={"optim": optim}))
    state, fresh = (build_state(cfg, dataset, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        advance(state)
    checkpoint.save(tmp_path, state, document(state, dataset))
    expected = [advance(state) for _ in range(3)]
    with torch.no_grad():
        checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path)))
    assert [advance(fresh) for _ in range(3)] == expected and digest(fresh) == digest(state)


def test_the_state_of_another_optimizer_is_refused(small_cfg, dataset, tmp_path):
    mine, other = (build_state(micro(small_cfg.model_copy(update={"optim": o})), dataset, torch.device("cpu")) for o in OPTIMS.values())
    advance(mine)
    checkpoint.save(tmp_path, mine, document(mine, dataset))
    with torch.no_grad(), pytest.raises(CheckpointError, match="not this optimizer's"):
        checkpoint.restore(other, checkpoint.load(checkpoint.find(tmp_path)))


def test_a_restored_bandit_remembers_its_turns_and_draws_the_same_rows(small_cfg, dataset, tmp_path):
    state, fresh = (build_state(shrunk(small_cfg), dataset, torch.device("cpu")) for _ in range(2))
    for turn in range(6):
        advance(state)
        state.reader.order.reward({n: 5.0 - (turn + i) / 7 for i, n in enumerate(dataset.sources)})
    order, learnt = state.reader.order, state.reader.order.state_dict()
    checkpoint.save(tmp_path, state, document(state, dataset))
    assert fresh.reader.order.state_dict() != learnt and learnt["n_drops"] == 3
    with torch.no_grad():
        assert checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path))) == [], "no arm is dropped"
    assert fresh.reader.order.state_dict() == learnt and fresh.reader.order.focus == order.focus
    for _ in range(12):
        assert fresh.reader.draw().sample_ids == state.reader.draw().sample_ids


@pytest.mark.parametrize("missing", ["the schema", "the key"])
def test_a_checkpoint_without_a_curriculum_is_refused(state, dataset, tmp_path, monkeypatch, missing):
    whole = document(state, dataset)
    with monkeypatch.context() as former:
        if missing == "the schema":
            former.setattr(checkpoint, "SCHEMA", "stackproof/checkpoint/1")
        else:
            former.setattr(checkpoint, "STATE_KEYS", checkpoint.STATE_KEYS - {"curriculum"})
            del whole["curriculum"]
        folder = checkpoint.save(tmp_path, state, whole)
    with pytest.raises(CheckpointError, match="checkpoint/2" if missing == "the schema" else "lacks or adds keys\n.*curriculum"):
        checkpoint.load(folder)


def test_a_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path)
