"""SwiGLU against float64. B batch, T tokens, F d_ff"""

import itertools

import pytest
import torch

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import eager
from stackproof.kernels.triton import swiglu
from stackproof.spec.errors import UsageError
from tests.kernels.support import (
    DEVICE,
    FLOATS,
    Margins,
    broken,
    cases,
    compare,
    double,
    flipped,
    gradients,
    is_red,
    walled,
)

F32, F16, BF16 = FLOATS
SMALL = [(F32, 1, 1), (F32, 5, 1025), (F16, 3, 88), (BF16, 2, 2048), (BF16, 33, 80)]
FULL = list(itertools.product(FLOATS, (1, 7, 65, 1025), (1, 80, 1023, 1024, 1025, 2816, 8192)))


def inputs(dtype, rows, F, device):
    gate, up = (
        walled((torch.randn(2, rows, F, device=device) * 3).to(dtype).requires_grad_())
        for _ in range(2)
    )
    return gate, up, walled(torch.randn(2, rows, F, device=device).to(dtype))


def compare_all(kernel, gate, up, grad):
    wide = double(gate, up)
    out, want = kernel(gate, up), reference.swiglu(*wide)
    for what, a, b in zip(
        ("result", "dgate", "dup"),
        (out, *gradients(out, (gate, up), [grad])),
        (want, *gradients(want, wide, [grad])),
    ):
        compare(what, a, b, gate.dtype)


@pytest.mark.parametrize(("device", "dtype", "rows", "F"), cases(SMALL, FULL))
def test_result_and_gradients_equal_float64(guard, device, dtype, rows, F):
    compare_all(swiglu.swiglu, *inputs(dtype, rows, F, device))


@pytest.mark.parametrize(
    "layout",
    ["contiguous", "halves of one projection", "one contiguous, one not", "gradient spread"],
)
def test_every_layout_gives_the_same(guard, layout):
    gate, up, grad = (x.detach().contiguous() for x in inputs(F32, 4, 1024, DEVICE))
    match layout:
        case "halves of one projection":
            gate, up = torch.cat((gate, up), -1).chunk(2, -1)
        case "one contiguous, one not":
            up = up.transpose(0, 1).contiguous().transpose(0, 1)
        case "gradient spread":
            grad = grad[:1, :1, :1].expand(2, 4, 1024)
    compare_all(swiglu.swiglu, gate.detach().requires_grad_(), up.detach().requires_grad_(), grad)


def test_large_gates_neither_overflow_nor_lose_their_sign():
    gate = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4]], device=DEVICE, requires_grad=True)
    up = torch.full_like(gate, 2.0)
    out = swiglu.swiglu(gate, up)
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert out[0].tolist() == pytest.approx([0, 0, 0, 0, 180, 2e4], abs=1e-30)
    assert slope[0].tolist() == pytest.approx([0, 0, 1, 1, 2, 2], abs=1e-30)


@pytest.mark.parametrize(("device", "dtype"), cases([(F32,), (BF16,)], [(d,) for d in FLOATS]))
def test_a_wrong_scale_and_a_turned_channel_are_seen(device, dtype):
    gate, up, grad = inputs(dtype, 9, 64, device)
    wide = double(gate, up)
    out, want = swiglu.swiglu(gate, up), reference.swiglu(*wide)
    for a, b in (
        (out, want),
        *zip(gradients(out, (gate, up), [grad]), gradients(want, wide, [grad])),
    ):
        assert not is_red("as it is", a, b, dtype)
        assert is_red("1 % more", a * 1.01, b, dtype) and is_red(
            "one channel", flipped(a), b, dtype
        )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("slope_E = on_E + silu_E * (1.0 - on_E)", "slope_E = on_E + silu_E * on_E"),
        ("tl.program_id(1) * E + tl.arange", "tl.program_id(1) * 0 + tl.arange"),
        ("tl.load(up + r * up_stride[0]", "tl.load(up + r * gate_stride[1]"),
    ],
)
def test_a_broken_copy_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="errors"):
        compare_all(broken(swiglu, old, new, tmp_path).swiglu, *inputs(F32, 3, 1100, DEVICE))


def test_a_copy_without_its_mask_is_caught(monkeypatch, tmp_path):
    margins = Margins()
    margins.install(monkeypatch)
    copy = broken(swiglu, "mask=e_E < F)", "mask=e_E < F + 1)", tmp_path)
    gate, up, _ = inputs(F32, 1, 80, DEVICE)
    copy.swiglu(gate, up)
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()


def test_torchs_own_equals_the_definition():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # float64; measured 4e-16
    torch.testing.assert_close(
        eager.swiglu(gate, up), reference.swiglu(gate, up), rtol=0, atol=1e-14
    )
    assert torch.autograd.gradcheck(eager.swiglu, (gate, up))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 3)
    for bad, message in (
        ((x, torch.zeros(2, 4)), "fit"),
        ((x, x.half()), "fit"),
        ((x.double(), x.double()), "dtype"),
    ):
        with pytest.raises(UsageError, match=message):
            swiglu.swiglu(*bad)
