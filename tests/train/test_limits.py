"""What a run is refused for before it begins: precision that is only emulated, and memory that is not there."""

import pytest
import torch

from spec.errors import EnvironmentUnfit
from stack.recipes import recipe
from stack.train import memory, precision
from stack.train.memory import predict_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("share, refused", [(0.06, True), (0.49, True), (0.51, False), (4.6, False)])
def test_an_emulated_type_is_refused_with_its_rate(monkeypatch, share, refused):
    monkeypatch.setattr(precision, "product_s", lambda dtype: 1.0 if dtype == torch.float32 else 1.0 / share)
    if not refused:
        return precision.refuse_emulated(torch.bfloat16, CPU, "optim.dtype")
    with pytest.raises(EnvironmentUnfit, match="no units for bfloat16") as caught:
        precision.refuse_emulated(torch.bfloat16, CPU, "optim.dtype")
    assert f"{share:.2g} times" in str(caught.value) and "optim.dtype=float32" in str(caught.value)


def test_float32_and_other_devices_are_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "product_s", None)
    precision.refuse_emulated(None, CPU, "train.dtype")
    precision.refuse_emulated(torch.bfloat16, torch.device("cuda"), "train.dtype")


def test_a_rate_is_measured():
    assert 0 < precision.product_s(torch.float32) < 10


def test_a_run_beyond_the_memory_is_refused_with_both_figures(monkeypatch):
    cfg = recipe("llama-370m")
    needed = predict_bytes(cfg, 49_152)["peak"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(EnvironmentUnfit, match="does not fit") as caught:
        memory.refuse_too_large(cfg, 49_152, CPU)
    assert f"{needed / 2**30:.1f} GiB needed for 16 rows of 2048" in str(caught.value) and "micro_batch_size" in str(caught.value)
    for enough in (needed, None):
        monkeypatch.setattr(memory, "available_bytes", lambda device, enough=enough: enough)
        memory.refuse_too_large(cfg, 49_152, CPU)


def test_the_prediction_grows_with_what_it_should():
    cfg = recipe("pocket")
    parts = predict_bytes(cfg, 1024)
    assert parts["weights"] == parts["gradients"] == parts["moments"] / 2 == 4 * 869_504
    rows = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": 32})})
    assert predict_bytes(rows, 1024)["activations"] == 2 * parts["activations"]
    assert 0 < memory.available_bytes(CPU) < 2**50
