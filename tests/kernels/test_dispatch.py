"""What is chosen, why, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stackproof.kernels import attention as torch_attention
from stackproof.kernels import choice, dispatch, eager, onednn
from stackproof.kernels.choice import Choice, Fastest
from stackproof.kernels.table import OPERATIONS
from stackproof.kernels.triton import flash_attention, launch, swiglu
from stackproof.spec.errors import EnvironmentUnfit, UsageError
from tests.kernels.support import DEVICE

EVIDENCE = Path(dispatch.__file__).parents[2] / "evidence"


def test_torch_is_chosen_until_something_else_was_measured(monkeypatch):
    monkeypatch.setattr(choice, "MEASURED", {})
    for device in ("cpu", "cuda", "mps"):
        assert {dispatch.choose(op, device).kernel for op in OPERATIONS} == {"torch"}
    assert dispatch.choose("rope", "cuda").reason.startswith("not measured on ")
    assert dispatch.choose("rope", "mps").reason.startswith("no kernel")
    name = choice.device_name(torch.device("cuda"))
    monkeypatch.setitem(choice.MEASURED, (name, "rope"), Fastest("triton", "benchmark-1"))
    monkeypatch.setattr(launch, "why_not", lambda device: "")
    assert dispatch.choose("rope", "cuda") == Choice(
        "triton", f"fastest on {name}, record benchmark-1", "shipped"
    )
    assert (
        dispatch.choose("rope", "cpu").kernel == "torch"
        and dispatch.choose("swiglu", "cuda").kernel == "torch"
    )


def test_a_processor_is_its_maker_and_its_widest_instructions(monkeypatch):
    assert (
        choice.device_name(torch.device("cpu"))
        == f"{choice.cpu_maker()} {torch.backends.cpu.get_cpu_capability()}"
    )
    monkeypatch.setattr(
        choice, "MEASURED", {(choice.CPU_NAME, "linear"): Fastest("onednn", "benchmark-1")}
    )
    monkeypatch.setattr(onednn, "WHY_NOT", "")
    assert dispatch.choose("linear", "cpu") == Choice(
        "onednn", f"fastest on {choice.CPU_NAME}, record benchmark-1", "shipped"
    )
    monkeypatch.setattr(onednn, "WHY_NOT", "it is not there")
    absent = "onednn is faster on this device but absent: it is not there"
    assert dispatch.choose("linear", "cpu") == Choice("torch", absent, "default")
    monkeypatch.setattr(choice, "CPU_NAME", "another")
    assert dispatch.choose("linear", "cpu") == Choice(
        "torch", "not measured on another yet", "default"
    )


def test_a_record_of_half_precision_names_what_runs_there(monkeypatch):
    by_hand = {"linear": "onednn", "attention": "chunks", "linear_cross_entropy": "onednn"}
    with dispatch.using(**by_hand):
        wide, half = dispatch.choices("cpu"), dispatch.choices("cpu", dtype="bfloat16")
    for op, name in by_hand.items():
        assert (
            wide[op] == OPERATIONS[op].kernels[name].title
            and half[op] == OPERATIONS[op].kernels["torch"].title
        )
        assert (
            half[f"{op}_reason"] == f"{name} is for float32, this is bfloat16"
            and half[f"{op}_name"] == name
        )


def test_what_is_for_the_cpu_is_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    q = torch.zeros(4, 1, 128, 8, device="meta")
    for mask in (None, torch.ones(1, 1, 128, 128, dtype=torch.bool, device="meta")):
        with (
            dispatch.using(attention="chunks"),
            pytest.raises(EnvironmentUnfit, match="it is for the CPU"),
        ):
            dispatch.attention(q, q, q, mask_B1TS=mask)
    with (
        dispatch.using(linear="onednn"),
        pytest.raises(EnvironmentUnfit, match="it is for the CPU"),
    ):
        dispatch.linear(torch.zeros(2, 3, device="meta"), torch.zeros(4, 3, device="meta"))


@pytest.mark.parametrize(("device", "op"), choice.MEASURED)
def test_a_default_is_what_its_record_shows_to_be_fastest(device, op):
    """In every section of the operation the slowest round beats torch's by more than nothing, or
    the record is not about it.
    """
    winner = choice.MEASURED[device, op]
    metrics = json.loads((EVIDENCE / winner.record / "metadata.json").read_text("utf-8"))["metrics"]
    section = {"linear_cross_entropy": "head"}.get(op, op)
    ratios = [
        m["value"]
        for name, m in metrics.items()
        if name.startswith(f"ratio_to_{section}_") and name.endswith("__torch_min")
    ]
    assert any(
        name.startswith(f"rate_{section}_") and name.endswith(f"__{winner.kernel}")
        for name in metrics
    )
    assert len(ratios) >= 2 and min(ratios) > 1


def test_choices_are_json_ready_and_give_every_reason():
    document = json.loads(json.dumps(dispatch.choices("cpu")))
    assert all(document[op] and document[f"{op}_reason"] for op in OPERATIONS)
    with dispatch.using(attention="triton"):
        assert dispatch.choices("cpu")["attention"] == "triton flash attention"
        assert dispatch.choices("cpu")["attention_reason"] == "chosen by hand"
    assert dispatch.choices("cpu") == document


def test_the_choice_holds_within_its_block_alone():
    before = dispatch.kernel("attention", DEVICE)
    assert dispatch.kernel("swiglu", DEVICE) is eager.swiglu
    with dispatch.using(swiglu="triton"):
        assert dispatch.kernel("swiglu", DEVICE) is swiglu.swiglu
        with dispatch.using(swiglu="torch", attention="triton"):
            assert dispatch.kernel("swiglu", DEVICE) is eager.swiglu
            assert dispatch.kernel("attention", DEVICE) is flash_attention.attention
        assert dispatch.kernel("attention", DEVICE) is before
        with dispatch.using(attention="torch"):
            assert dispatch.kernel("attention", DEVICE) is torch_attention.attention
        with pytest.raises(ZeroDivisionError), dispatch.using(swiglu="torch"):
            _ = 1 / 0
        assert dispatch.kernel("swiglu", DEVICE) is swiglu.swiglu
    assert dispatch.kernel("swiglu", DEVICE) is eager.swiglu


def test_what_is_unknown_is_refused_with_what_there_is():
    with (
        pytest.raises(UsageError, match="not an operation") as caught,
        dispatch.using(atention="triton"),
    ):
        pass
    assert "attention" in caught.value.allowed
    with (
        pytest.raises(UsageError, match="rope has no kernel library") as caught,
        dispatch.using(rope="library"),
    ):
        pass
    assert sorted(caught.value.allowed.split(", ")) == ["torch", "triton"]


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(launch, "installed", lambda: False)
    with pytest.raises(EnvironmentUnfit, match="not installed"), dispatch.using(rope="triton"):
        pass
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentUnfit, match="interpreter"), dispatch.using(rope="triton"):
        pass
    monkeypatch.setattr(eager, "why_no_library_linear_cross_entropy", lambda: "too old")
    with (
        pytest.raises(EnvironmentUnfit, match="too old"),
        dispatch.using(linear_cross_entropy="library"),
    ):
        pass


def test_a_kernel_on_a_device_it_cannot_run_on_is_refused_not_replaced(monkeypatch):
    x = torch.zeros(2, 3)
    with dispatch.using(swiglu="triton"):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        with pytest.raises(EnvironmentUnfit, match="cannot run on cpu"):
            dispatch.swiglu(x, x)
    with pytest.raises(EnvironmentUnfit, match="cannot run on cpu"):
        swiglu.swiglu(x, x)


def test_every_operation_gives_the_same_through_either():
    """One call of each, by torch and by Triton; that the numbers are right is what the
    tests of each kernel show.
    """
    q, x, weight = (torch.randn(*n, device=DEVICE) for n in ((1, 2, 9, 32), (9, 32), (50, 32)))
    labels, table = torch.randint(50, (9,), device=DEVICE), torch.rand(9, 16, device=DEVICE)

    def everything():
        return [
            dispatch.attention(q, q, q, window=4),
            dispatch.attention(q, q, q),
            dispatch.rms_norm(x, weight[0], 1e-5),
            *dispatch.rms_norm(x, weight[0], 1e-5, x),
            dispatch.rope(q, table, table),
            dispatch.swiglu(x, x),
            *dispatch.linear_cross_entropy(x, weight, labels, softcap=5.0, z_loss=0.1),
        ]

    with dispatch.using(**dict.fromkeys(OPERATIONS, "torch")):
        by_torch = everything()
    with dispatch.using(
        **{name: "triton" for name, op in OPERATIONS.items() if "triton" in op.kernels}
    ):
        by_triton = everything()
    # float32 twice; measured worst case 5e-7
    torch.testing.assert_close(by_triton, by_torch, rtol=1e-5, atol=2e-6)
    # it was not the same function twice
    assert not all(torch.equal(a, b) for a, b in zip(by_torch, by_triton))


def test_gradients_of_gradients_are_refused_not_wrong():
    """The kernels know the first derivative.
    A second one through them would leave out what they do not know.
    """
    x, table = (
        torch.randn(1, 1, 5, 32, device=DEVICE, requires_grad=True),
        torch.rand(5, 16, device=DEVICE),
    )
    labels = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    calls = {
        "attention": lambda: dispatch.attention(x, x, x),
        "rms_norm": lambda: dispatch.rms_norm(x, x[0, 0, 0], 1e-5),
        "rope": lambda: dispatch.rope(x, table, table),
        "swiglu": lambda: dispatch.swiglu(x, x),
        "linear_cross_entropy": lambda: dispatch.linear_cross_entropy(x[0, 0], x[0, 0], labels)[0],
    }
    for op, call in calls.items():
        with dispatch.using(**{op: "triton"}):
            (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_triton_is_not_imported_until_it_is_chosen():
    code = (
        "import sys, torch; from stackproof.kernels import dispatch; x = torch.zeros(1, 1, 4, "
        "32);dispatch.attention(x, x, x); dispatch.swiglu(x, x); dispatch.choices('cuda'); assert "
        "'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
