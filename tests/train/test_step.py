"""One update: how often it waits for the device, and what it says has moved."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stackproof.config import load_config
from stackproof.subject.run import small_run
from stackproof.train import optimizer as opt
from stackproof.train import step as steps
from stackproof.train.state import build_state
from tests.subjects import TINY

WAITING = [
    getattr(torch.Tensor, n)
    for n in "tolist item numpy __float__ __bool__ __int__ cpu nonzero equal allclose".split()
]
ROUTED = (
    "model.ffn.kind=moe model.ffn.n_experts=4 model.ffn.top_k=2 model.ffn.expert.kind=swiglu"
).split()


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU in `stackproof.train` itself,
    without the model and its kernels.
    """

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            func in WAITING
            and Path(sys._getframe(1).f_code.co_filename).parent == Path(steps.__file__).parent
        ):
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def begun(cfg, dataset, n_layers=1, sets=()):
    cfg = small_run(cfg, TINY)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"n_layers": n_layers})})
    state = build_state(load_config(cfg, sets=tuple(sets))[0], dataset, torch.device("cpu"))
    return state, [state.data_loader.next_batch() for _ in range(2)]


@pytest.mark.parametrize("sets", [(), ROUTED], ids=["dense", "experts"])
def test_a_step_reads_loss_norm_and_all_it_reports_whatever_the_depth(small_cfg, dataset, sets):
    """Loss and norm decide whether the optimizer moves; the rest comes in one transfer.
    `__int__` counts labels, which lie on the host.
    """
    found = []
    for n_layers in (1, 3):
        state, batches = begun(small_cfg, dataset, n_layers, sets)
        steps.train_step(state, batches)  # what is built at the first step is not counted
        with Waits() as waits:
            report = steps.train_step(state, batches)
        found.append(waits.seen)
        assert len(report.expert_shares) == (n_layers if sets else 0)
        assert all(
            sum(layer) == pytest.approx(1, abs=1e-6) and len(layer) == 4
            for layer in report.expert_shares
        )
    assert found[0] == found[1] == {"__float__": 2, "tolist": 1, "__int__": 2}


def test_gradients_that_overflow_at_every_scale_leave_the_weights_alone(small_cfg, dataset):
    """float16: as many attempts as there are, each at a lower scale,
    and a report instead of an error.
    """
    state, batches = begun(small_cfg, dataset, sets=("train.dtype=float16",))
    before = [p.clone() for p in state.model.parameters()]
    endless = next(state.model.parameters()).register_hook(lambda grad: grad + torch.inf)
    scale = state.scaler.get_scale()
    report = steps.train_step(state, batches)
    assert report.overflow_retries == steps.MAX_OVERFLOW_RETRIES - 1 and not report.applied
    assert report.loss_nats > 0 and report.changed_tensor_frac == 0
    assert all(torch.equal(p, q) for p, q in zip(state.model.parameters(), before))
    assert state.scaler.get_scale() == scale / 2**steps.MAX_OVERFLOW_RETRIES
    endless.remove()
    assert steps.train_step(state, batches).applied


def test_values_of_any_shape_come_as_they_are():
    given = (
        torch.tensor(1 / 3),
        torch.arange(3),
        torch.zeros(0),
        torch.tensor([[0.1, 2**60]], dtype=torch.float64),
    )
    assert steps.on_host(*given) == [(float(given[0]),), (0.0, 1.0, 2.0), (), (0.1, 2.0**60)]


@pytest.mark.parametrize("n", [1, 49, 98, 196])
def test_all_that_moved_is_exactly_all(n):
    """1 / n times n is not 1 for all of these."""
    model = torch.nn.ParameterList(torch.zeros(3) for _ in range(n))
    probe = opt.ParameterProbe(model)
    with torch.no_grad():
        torch._foreach_add_(list(model), 1.0)
    assert probe.changed_frac().item() == 1.0


def test_the_share_of_tensors_that_moved_is_that_of_the_last_update():
    """Every tensor alone, at its first and its last probed entry, and one beside the probed ones,
    which is not seen.
    """
    model = torch.nn.ParameterList(torch.zeros(n) for n in (1, 63, 64, 130, 6400))
    probe = opt.ParameterProbe(model)
    assert probe.changed_frac().item() == 0
    for p in model:
        stride = max(1, len(p) // 64)
        for entry in {0, (len(p) - 1) // stride * stride}:
            with torch.no_grad():
                p[entry] += 1
            assert probe.changed_frac().item() == 1 / 5 and probe.changed_frac().item() == 0
    with torch.no_grad():
        model[4][1] += 1
        assert probe.changed_frac().item() == 0
        for p in model[:3]:
            p.add_(1)
    assert probe.changed_frac().item() == 3 / 5
