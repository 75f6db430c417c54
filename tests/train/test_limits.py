"""What a run is refused for before it begins: precision that is only emulated,
and memory that is not there.
"""

import pytest
import torch

from stackproof.config import Muon
from stackproof.recipes import recipe
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.train import device, memory
from stackproof.train.memory import predict_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "share, refused", [(0.06, True), (0.49, True), (0.51, False), (4.6, False)]
)
def test_an_emulated_type_is_refused_with_its_rate(monkeypatch, share, refused):
    monkeypatch.setattr(
        device, "product_s", lambda dtype: 1.0 if dtype == torch.float32 else 1.0 / share
    )
    if not refused:
        return device.refuse_emulated(torch.bfloat16, CPU, "optim.dtype")
    with pytest.raises(EnvironmentUnfit, match="no units for bfloat16") as caught:
        device.refuse_emulated(torch.bfloat16, CPU, "optim.dtype")
    assert f"{share:.2g} times" in str(caught.value) and "optim.dtype=float32" in str(caught.value)


def test_float32_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "product_s", None)
    device.refuse_emulated(None, CPU, "train.dtype")


@pytest.mark.parametrize("has_units", [True, False])
def test_a_gpu_is_asked_and_not_measured(monkeypatch, has_units):
    monkeypatch.setattr(device, "product_s", None)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation: has_units or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of 2018")
    gpu = torch.device("cuda")
    device.refuse_emulated(torch.float16, gpu, "train.dtype")
    if has_units:
        return device.refuse_emulated(torch.bfloat16, gpu, "train.dtype")
    with pytest.raises(EnvironmentUnfit, match="a GPU of 2018 has no units for bfloat16"):
        device.refuse_emulated(torch.bfloat16, gpu, "train.dtype")


def test_a_rate_is_measured():
    assert 0 < device.product_s(torch.float32) < 10


def test_a_run_beyond_the_memory_is_refused_with_both_figures(monkeypatch):
    cfg = recipe("llama-370m")
    predicted = predict_bytes(cfg, 49_152)
    needed = predicted["peak"] + predicted["copy"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(EnvironmentUnfit, match="does not fit") as caught:
        memory.require_room(cfg, 49_152, CPU)
    assert f"{needed / 2**30:.1f} GiB needed for 16 rows of 2048" in str(
        caught.value
    ) and "micro_batch_size" in str(caught.value)
    for enough in (needed, None):
        monkeypatch.setattr(memory, "available_bytes", lambda device, enough=enough: enough)
        memory.require_room(cfg, 49_152, CPU)


def test_a_model_that_could_train_but_not_be_checked_is_refused(monkeypatch):
    """Few tokens at a time: preflight needs more than the steps do."""
    base = recipe("llama-370m")
    cfg = base.model_copy(
        update={
            "train": base.train.model_copy(
                update={"micro_batch_size": 1, "activation_checkpointing": "blocks"}
            )
        }
    )
    predicted = predict_bytes(cfg, 49_152)
    between = (predicted["peak"] + predicted["copy"] + predicted["preflight"]) // 2
    assert predicted["peak"] + predicted["copy"] < between < predicted["preflight"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: between)
    with pytest.raises(EnvironmentUnfit, match="GiB needed to check it before step 1"):
        memory.require_room(cfg, 49_152, CPU)
    memory.require_room(cfg, 49_152, torch.device("cuda"))


def test_the_prediction_grows_with_what_it_should():
    cfg = recipe("tiny")
    parts = predict_bytes(cfg, 257)
    assert parts["weights"] == parts["gradients"] == parts["moments"] / 2 == 4 * 836_864
    rows = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": 32})})
    assert predict_bytes(rows, 257)["activations"] == 2 * parts["activations"]
    assert 0 < memory.available_bytes(CPU) < 2**50


@pytest.mark.parametrize(
    "section, change, part",
    [
        ("train", {"activation_checkpointing": "blocks"}, "activations"),
        ("train", {"dtype": "float32"}, "activations"),
    ],
)
def test_what_saves_memory_is_predicted_to(section, change, part):
    cfg = recipe("llama-370m")
    other = cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=change)})
    before, after = predict_bytes(cfg, 49_152), predict_bytes(other, 49_152)
    assert (
        after[part] < 0.5 * before[part]
        if change.get("activation_checkpointing")
        else after[part] > 1.5 * before[part]
    )


def test_muon_keeps_one_moment_of_a_matrix():
    cfg = recipe("llama-370m")
    muon = cfg.model_copy(update={"optim": Muon(lr=1e-3, adamw_lr=1e-3)})
    tables = 2 * 4 * 49_152 * cfg.model.d_model
    parts = predict_bytes(muon, 49_152)
    assert parts["moments"] == parts["weights"] + tables


def test_a_dry_run_says_that_this_machine_would_refuse(monkeypatch):
    """With both figures; and nothing of the kind where it would not."""
    from stackproof.cli import train as cli

    cfg = recipe("pocket")
    assert cli._refusal(cfg, 1024, CPU) == "" and "this_machine_refuses" not in cli._derived(cfg)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**6)
    said = cli._derived(cfg)["this_machine_refuses"]
    assert (
        said == cli._refusal(cfg, cli._vocab_size(cfg), CPU)
        and "memory" in said
        and "0.0 GiB" in said
    ), said
