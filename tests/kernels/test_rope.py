"""Rotary positions against float64. B batch, N heads, T tokens, H head_dim, J = H/2"""

import itertools

import pytest
import torch

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import eager
from stackproof.kernels.triton import rope
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
SMALL = [
    (F32, 1, 64, False),
    (F32, 65, 80, True),
    (F16, 127, 96, False),
    (BF16, 33, 32, True),
    (BF16, 5, 2, False),
]
FULL = list(
    itertools.product(FLOATS, (1, 63, 65, 1025), (2, 32, 64, 80, 96, 128, 256), (False, True))
)


def inputs(dtype, T, H, own_positions, device):
    """Heads of a projection, tables in float32 of shape (T, J) or (B, 1, T, J), and a gradient."""
    x = walled(torch.randn(2, T, 3, H, device=device).to(dtype).requires_grad_()).transpose(1, 2)
    angle = torch.rand(*((2, 1, T, H // 2) if own_positions else (T, H // 2)), device=device) * 6
    return (
        x,
        walled(angle.cos()),
        walled(angle.sin()),
        walled(torch.randn(2, 3, T, H, device=device).to(dtype)),
    )


def check(kernel, dtype, T, H, own_positions, device):
    x, cos, sin, grad = inputs(dtype, T, H, own_positions, device)
    wide = double(x)[0]
    y, want = kernel(x, cos, sin), reference.rope(wide, cos, sin)
    compare("result", y, want, dtype)
    compare("gradient", *gradients(y, [x], [grad]), *gradients(want, [wide], [grad]), dtype)


@pytest.mark.parametrize(("device", "dtype", "T", "H", "own_positions"), cases(SMALL, FULL))
def test_result_and_gradient_equal_float64(guard, device, dtype, T, H, own_positions):
    check(rope.rope, dtype, T, H, own_positions, device)


def test_equals_what_the_model_does():
    from stackproof.model.positions import rotary_tables, rotate

    x, tables = (
        torch.randn(2, 3, 20, 16, device=DEVICE),
        [t.to(DEVICE) for t in rotary_tables(16, 20, 1e4)],
    )
    # float32, one rounding in another place: measured worst case 2.4e-7 on values up to 4
    torch.testing.assert_close(rope.rope(x, *tables), rotate(x, *tables), rtol=0, atol=1e-6)
    assert torch.equal(eager.rope(x, *tables), rotate(x, *tables))


def test_there_and_back_is_where_it_began():
    x, cos, sin, _ = inputs(F32, 50, 64, True, DEVICE)
    back = rope.rope(rope.rope(x, cos, sin), cos, -sin)
    # two rotations in float32: measured worst case 4.8e-7
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("device", "dtype"), cases([(F32,), (BF16,)], [(d,) for d in FLOATS]))
def test_a_wrong_scale_and_a_turned_channel_are_seen(device, dtype):
    x, cos, sin, _ = inputs(dtype, 9, 64, True, device)
    want, y = reference.rope(double(x)[0], cos, sin), rope.rope(x, cos, sin)
    assert not is_red("as it is", y, want, dtype)
    assert is_red("1 % more", y * 1.01, want, dtype) and is_red(
        "one channel", flipped(y), want, dtype
    )
    assert is_red(
        "another pairing",
        rope.rope(x.unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2), cos, sin),
        want,
        dtype,
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* sign\n", "\n"),
        ("b * cos_stride[0]", "0 * cos_stride[0]"),
        ("x += b * x_stride[0] + n * x_stride[1]", "x += b * x_stride[0] + n * x_stride[2]"),
        (
            "tl.store(out + to_ME + J * out_stride[3], (b_ME * cos_ME + a_ME * sin_ME)",
            "tl.store(out + to_ME + J * out_stride[3], (b_ME * cos_ME)",
        ),
    ],
)
def test_a_broken_copy_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="errors"):
        check(broken(rope, old, new, tmp_path).rope, F32, 33, 40, True, DEVICE)


def test_a_copy_without_its_mask_is_caught(monkeypatch, tmp_path):
    margins = Margins()
    margins.install(monkeypatch)
    mask = "inside_ME = (t_M < T)[:, None] & (e_E < J)[None, :]"
    copy = broken(rope, mask, "inside_ME = (t_M < T + 1)[:, None] & (e_E < J)[None, :]", tmp_path)
    check(copy.rope, F32, 33, 40, False, DEVICE)
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()


def test_torchs_own_equals_the_definition():
    x, angle = (
        torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True),
        torch.rand(5, 4, dtype=torch.float64),
    )
    tables = angle.cos(), angle.sin()
    # float64; measured 4e-16
    torch.testing.assert_close(
        eager.rope(x, *tables), reference.rope(x, *tables), rtol=0, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda x: eager.rope(x, *tables), (x,))


def test_what_does_not_fit_is_refused():
    x, table = torch.zeros(2, 3, 5, 8), torch.zeros(5, 4)
    for bad, message in (
        ((x, torch.zeros(4, 4), torch.zeros(4, 4)), "tables"),
        ((x, table, torch.zeros(5, 3)), "tables"),
        ((x, torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)), "tables"),
        ((x, table.requires_grad_(), table), "gradient"),
        ((x.double(), table, table), "dtype"),
    ):
        with pytest.raises(UsageError, match=message):
            rope.rope(*bad)
