"""Triton's kernels chosen by `train.kernels`: in a real training step,
and before it under the gate.
"""

from functools import partial

import pytest
import torch

from stackproof.contracts.gate import call_check
from stackproof.contracts.kernel_call import DistinctCalls
from stackproof.kernels.table import OPERATIONS
from stackproof.kernels.triton import (
    flash_attention,
    flash_attention_kernels,
    linear_cross_entropy,
    rms_norm,
)
from stackproof.model.build import build_model
from stackproof.museum.plant import swap
from stackproof.spec.gates import load_spec
from stackproof.subject.assemble import subject_of
from stackproof.subject.run import small_run
from stackproof.subject.training import advance
from stackproof.train.device import kernels_of
from stackproof.train.state import build_state
from tests.kernels.support import DEVICE, broken
from tests.subjects import TINY

TRITON = {name: "triton" for name, op in OPERATIONS.items() if "triton" in op.kernels}
PLACE = torch.device(DEVICE)


@pytest.fixture(scope="module")
def cfg(small_cfg):
    """A model of a few hundred parameters, and rows longer than one tile of attention."""
    tiny = small_run(small_cfg, TINY)
    model = tiny.model.model_copy(update={"max_seq_len": 80})
    train = tiny.train.model_copy(
        update={"tokens_per_step": 160, "micro_batch_size": 2, "kernels": "triton"}
    )
    return tiny.model_copy(update={"model": model, "train": train})


def verdict_of(cfg, dataset):
    subject, calls = subject_of(cfg, dataset, PLACE), DistinctCalls()
    with kernels_of(cfg, PLACE):
        subject.kernels.observe_calls(calls.observe)
        return call_check(load_spec().gates["kernel.parity"], subject), list(calls)


def test_a_run_trains_with_triton_as_with_torch(cfg, dataset):
    """Three steps, dropout included: the losses differ by rounding alone, and differ.
    Measured 1e-7.
    """
    losses = {}
    for kernels in ("triton", "torch"):
        changed = cfg.model_copy(
            update={"train": cfg.train.model_copy(update={"kernels": kernels})}
        )
        with kernels_of(changed, PLACE):
            state = build_state(changed, dataset, PLACE)
            losses[kernels] = [advance(state) for _ in range(3)]
            parameters = torch.cat([p.detach().flatten() for p in state.model.parameters()])
            losses[kernels].append(float(parameters.double().square().sum()))
    assert (
        losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
        and losses["triton"] != losses["torch"]
    )
    assert len(set(losses["triton"])) == 4


def test_the_gate_judges_each_of_them_at_the_run_s_own_shapes(cfg, dataset):
    verdict, calls = verdict_of(cfg, dataset)
    used = {c.case.operation: c.kernel for c in calls}
    # Triton has no kernel for it here: the fastest on this processor is used.
    assert used.pop("linear") in OPERATIONS["linear"].kernels and used == TRITON
    assert verdict.passed and 0 < verdict.measured["rel_error"] < 2e-6, verdict  # measured 5e-7
    # the head of Triton crosses borders too
    assert verdict.measured["chunk_rows"] == 8 and verdict.measured["borders"] >= 20
    (attention,) = (c.case.arguments for c in calls if c.case.operation == "attention")
    assert attention["start_BS"].shape == (2, 80) and "mask_B1TS" not in attention


BROKEN = {
    "the key after its own is seen": (
        flash_attention_kernels,
        "<= p_M[:, None])",
        "<= p_M[:, None] + 1)",
        "attention",
    ),
    "the backward forgets the mean": (
        rms_norm,
        "(grad_ME - normal_ME * along_M[:, None])",
        "grad_ME",
        "gradient of x of rms_norm",
    ),
    "the label's slope is lost": (
        linear_cross_entropy,
        "tl.where(v0 + e_E == label, of_nats, 0.0)",
        "0.0",
        "linear_cross_entropy",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_red(cfg, dataset, name, tmp_path):
    """Forward or backward."""
    module, old, new, named = BROKEN[name]
    copied = broken(module, old, new, tmp_path)
    short = module.__name__.rpartition(".")[2]
    owner, what = (
        (flash_attention, "kernels") if module is flash_attention_kernels else (module, short)
    )
    with swap(owner, what, copied if what == "kernels" else getattr(copied, short)):
        verdict, _ = verdict_of(cfg, dataset)
    assert (
        verdict.outcome == "fail"
        and f"{named} by triton" in verdict.message
        and verdict.measured["rel_error"] > 1e-3
    )


def test_in_float64_where_checks_compare_the_model_runs_on(cfg, dataset):
    build = partial(build_model, cfg.model, dataset.tokenizer.vocab_size, seed=1, device=PLACE)
    ids = torch.randint(0, dataset.tokenizer.vocab_size, (1, 80), device=PLACE)
    wide = build().double().eval()
    with kernels_of(cfg, PLACE), torch.no_grad():
        by_triton = wide(ids)
    with torch.no_grad():
        assert torch.equal(by_triton, wide(ids))
