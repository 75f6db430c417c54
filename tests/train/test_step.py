"""One update: how often it waits for the device, and what it says has moved."""

import sys
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stack.config import load_config
from stack.train import optimizer as opt
from stack.train import step as steps
from stack.train.preflight import micro
from stack.train.state import build_state

WAITING = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.cpu)
ROUTED = "model.ffn.kind=moe model.ffn.n_experts=4 model.ffn.top_k=2 model.ffn.expert.kind=swiglu".split()


class Waits(TorchFunctionMode):
    """Counts what would wait for the device, were it a GPU, in the functions of the step itself."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITING and sys._getframe(1).f_code.co_filename == steps.__file__:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def begun(cfg, dataset, n_layers=1, sets=()):
    cfg = micro(cfg)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"n_layers": n_layers})})
    state = build_state(load_config(cfg, sets=tuple(sets))[0], dataset, torch.device("cpu"))
    return state, [state.reader.draw() for _ in range(2)]


@pytest.mark.parametrize("sets", [(), ROUTED], ids=["dense", "experts"])
def test_a_step_reads_loss_norm_and_all_it_reports_whatever_the_depth(small_cfg, dataset, sets):
    """Loss and norm decide whether the optimizer moves; the rest comes in one transfer. Labels are counted on the host."""
    found = []
    for n_layers in (1, 3):
        state, batches = begun(small_cfg, dataset, n_layers, sets)
        steps.train_step(state, batches)  # what is built at the first step is not counted
        with Waits() as waits:
            report = steps.train_step(state, batches)
        found.append(waits.seen)
        assert len(report.expert_shares) == (n_layers if sets else 0)
        assert all(sum(layer) == pytest.approx(1, abs=1e-6) and len(layer) == 4 for layer in report.expert_shares)
    assert found[0] == found[1] == {"__float__": 2, "tolist": 1}


def test_values_of_any_shape_come_as_they_are():
    given = torch.tensor(1 / 3), torch.arange(3), torch.zeros(0), torch.tensor([[0.1, 2**60]], dtype=torch.float64)
    assert steps.on_host(*given) == [(float(given[0]),), (0.0, 1.0, 2.0), (), (0.1, 2.0**60)]


def test_the_share_of_tensors_that_moved_is_that_of_the_last_update():
    """Every tensor alone, at its first and its last probed entry, and one beside the probed ones, which is not seen."""
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
