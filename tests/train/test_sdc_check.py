"""A step computed twice: it leaves no trace, and shows one flipped bit."""

import pytest
import torch

from stackproof.museum.collection import museum_config
from stackproof.spec.errors import GateFailed
from stackproof.train import step as steps
from stackproof.train.callbacks import gradient_checksums
from stackproof.train.loop import train
from stackproof.train.start import fresh
from stackproof.train.state import build_state, differing, digest, gradient_crc32


@pytest.fixture
def state(small_cfg, dataset):
    return build_state(small_cfg, dataset, torch.device("cpu"))


def batches_of(state):
    return [state.data_loader.next_batch() for _ in range(state.cfg.accumulation())]


def test_it_leaves_no_trace_and_foretells_the_step(state, small_cfg, dataset):
    """With dropout on: the state after it is the state before it,
    and its gradients are those the step then has.
    """
    assert small_cfg.model.dropout > 0
    batches = batches_of(state)
    before = digest(state)
    first = gradient_checksums(state, batches)
    assert digest(state) == before
    steps.train_step(state, batches)
    assert differing(first, gradient_crc32(state.model)) == () and len(first) == sum(
        1 for _ in state.model.parameters()
    )


def test_a_run_that_computes_twice_is_the_run_that_does_not(small_cfg, dataset):
    ends = []
    for twice in (False, True):
        state = build_state(small_cfg, dataset, torch.device("cpu"))
        for _ in range(3):
            batches = batches_of(state)
            if twice:
                gradient_checksums(state, batches)
            steps.train_step(state, batches)
        ends.append(digest(state))
    assert ends[0] == ends[1]


def test_float16_keeps_its_loss_scale(small_cfg, dataset):
    """The first scale overflows and is halved: in both computations alike,
    and once as far as the run goes.
    """
    cfg = small_cfg.model_copy(
        update={"train": small_cfg.train.model_copy(update={"dtype": "float16"})}
    )
    state = build_state(cfg, dataset, torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batches = batches_of(state)
    first = gradient_checksums(state, batches)
    assert state.scaler.get_scale() == 2.0**40
    report = steps.train_step(state, batches)
    assert report.overflow_retries > 0 and differing(first, gradient_crc32(state.model)) == ()


def test_a_gradient_on_one_side_only_differs(state):
    batches = batches_of(state)
    first = gradient_checksums(state, batches)
    steps.train_step(state, batches)
    again = gradient_crc32(state.model)
    name = next(iter(again))
    assert differing(first, {n: c for n, c in again.items() if n != name}) == (name,)
    assert differing({}, again) == tuple(sorted(again))


def test_one_flipped_bit_halts_the_run(museum_folder, tmp_path, monkeypatch):
    """The lowest bit of one gradient entry, in the second of two computations,
    in a run through the session.
    """

    cfg = museum_config(museum_folder)
    cfg = cfg.model_copy(
        update={"train": cfg.train.model_copy(update={"max_steps": 6, "sdc_check_every": 4})}
    )
    original, calls = steps.accumulate, [0]

    def flipping(state, batches):
        result = original(state, batches)
        calls[0] += 1
        if calls[0] > 1 and state.step == 3:
            next(state.model.parameters()).grad.view(-1)[-1:].view(torch.int32).bitwise_xor_(
                calls[0] % 2
            )
        return result

    monkeypatch.setattr(steps, "accumulate", flipping)
    with pytest.raises(GateFailed) as caught:
        train(fresh(cfg, (), tmp_path / "run", only=("runtime.recomputed-step",)))
    (gate,) = caught.value.record.gates
    assert gate.seconds > 0, "the time of the check is charged to its gate"
    assert (
        caught.value.gate_id == "runtime.recomputed-step"
        and caught.value.verdict.measured["differing"] == 1
    )
