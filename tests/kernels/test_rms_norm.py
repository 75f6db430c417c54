"""RMSNorm with and without the residual sum, against float64. B batch, T tokens, D features"""

import itertools

import pytest
import torch

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import eager
from stackproof.kernels.triton import rms_norm
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
EPS = 1e-5
# One feature is left out: its normalised value is its sign,
# and what is left of the gradient is rounding.
SMALL = [(F32, 1, 3), (F32, 7, 80), (F16, 65, 96), (F16, 2, 4097), (BF16, 70, 64), (BF16, 3, 1000)]
FULL = list(itertools.product(FLOATS, (1, 7, 65, 1025), (3, 64, 80, 768, 1000, 4096, 4097, 16384)))


def inputs(dtype, rows, D, device):
    x, residual = (
        walled(torch.randn(2, rows, D, device=device).to(dtype).requires_grad_()) for _ in range(2)
    )
    weight = walled(torch.randn(D, device=device).requires_grad_())
    grads = [walled(torch.randn(2, rows, D, device=device).to(dtype)) for _ in range(2)]
    return x, weight, residual, grads


def check(kernel, dtype, rows, D, device):
    x, weight, residual, grads = inputs(dtype, rows, D, device)
    wide_x, wide_weight, wide_residual = double(x, weight, residual)
    y = kernel(x, weight, EPS)
    want = reference.rms_norm(wide_x, wide_weight, EPS)
    got, true = (
        [y, *gradients(y, (x, weight), grads)],
        [want, *gradients(want, (wide_x, wide_weight), grads)],
    )
    both = kernel(x, weight, EPS, residual)
    # what is normalised is the sum as it is stored, in the dtype of the input:
    # the oracle starts from that
    stored = both[1].detach().double() - wide_x.detach()
    wide_residual = stored.requires_grad_()
    want = reference.rms_norm(wide_x, wide_weight, EPS, wide_residual)
    got += [*both, *gradients(both, (x, weight, residual), grads)]
    true += [*want, *gradients(want, (wide_x, wide_weight, wide_residual), grads)]
    for what, a, b in zip("y dx dweight y2 sum dx2 dweight2 dresidual".split(), got, true):
        compare(what, a, b, dtype)
    torch.testing.assert_close(both[1], x + residual, rtol=0, atol=0)


@pytest.mark.parametrize(("device", "dtype", "rows", "D"), cases(SMALL, FULL))
def test_result_and_gradients_equal_float64(guard, device, dtype, rows, D):
    check(rms_norm.rms_norm, dtype, rows, D, device)


def test_the_backward_leaves_what_it_was_given_alone():
    """In a residual graph the gradient of the sum also goes around the norm; a kernel that writes
    its result there corrupts it.

    Source: linkedin/Liger-Kernel#1305.
    """
    x = torch.randn(2, 9, 48, device=DEVICE, requires_grad=True)
    weight = torch.randn(48, device=DEVICE, requires_grad=True)
    grads = [torch.randn(2, 9, 48, device=DEVICE) for _ in range(2)]
    kept = [g.clone() for g in grads]
    torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS, x * 0.5), (x, weight), grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept))

    # two blocks; the sum goes on beside the norm, and the norm's result is added twice
    def stream(norm, x, weight):
        y, total = norm(x, weight, EPS, x * 0.5)
        y2, total2 = norm(y, weight, EPS, total)
        return (y2 + total2 + y).pow(2).sum()

    got = torch.autograd.grad(stream(rms_norm.rms_norm, x, weight), (x, weight))
    wide = double(x, weight)
    for a, b in zip(got, torch.autograd.grad(stream(reference.rms_norm, *wide), wide)):
        compare("gradient in a residual stream", a, b, F32)


def test_a_wide_stream_takes_a_narrow_branch():
    """bfloat16 into a float32 stream: the sum is float32, and each gradient
    has the dtype of its input.
    """
    x = torch.randn(3, 40, device=DEVICE).bfloat16().requires_grad_()
    residual, weight = (
        torch.randn(3, 40, device=DEVICE, requires_grad=True),
        torch.ones(40, device=DEVICE, requires_grad=True),
    )
    y, total = rms_norm.rms_norm(x, weight, EPS, residual)
    dx, dresidual = torch.autograd.grad((y.sum() + total.sum()), (x, residual))
    assert y.dtype == total.dtype == dresidual.dtype == F32 and dx.dtype == BF16
    assert torch.equal(total, x + residual) and torch.equal(dx, dresidual.bfloat16())


@pytest.mark.parametrize(("device", "dtype"), cases([(F32,), (BF16,)], [(d,) for d in FLOATS]))
def test_a_wrong_scale_and_a_turned_channel_are_seen(device, dtype):
    x, weight, _, grads = inputs(dtype, 9, 64, device)
    wide = double(x, weight)
    want = reference.rms_norm(*wide, EPS)
    y = rms_norm.rms_norm(x, weight, EPS)
    for a, b in ((y, want), *zip(gradients(y, (x, weight), grads), gradients(want, wide, grads))):
        assert not is_red("as it is", a, b, dtype)
        assert is_red("1 % more", a * 1.01, b, dtype) and is_red(
            "one channel", flipped(a), b, dtype
        )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "e_E[None, :] * x_stride[1], mask=inside_ME, other=0.0)",
            "e_E[None, :] * x_stride[1], mask=(r_M < R)[:, None], other=0.0)",
        ),
        ("dx_ME += tl.load(at_ME", "dx_ME = tl.load(at_ME"),
        ("tl.sum(x_ME * x_ME, 1) / D", "tl.sum(x_ME * x_ME, 1) / E"),
        ("sum_ME += grad_ME * normal_ME", "sum_ME = grad_ME * normal_ME"),
    ],
)
def test_a_broken_copy_is_caught(monkeypatch, tmp_path, old, new):
    copy = broken(rms_norm, old, new, tmp_path)
    monkeypatch.setattr(copy, "programs", lambda device: 1)
    with pytest.raises(AssertionError, match="errors"):
        check(copy.rms_norm, F32, 129, 40, DEVICE)


def test_a_copy_that_writes_past_its_rows_is_caught(monkeypatch, tmp_path):
    margins = Margins()
    margins.install(monkeypatch)
    copy = broken(
        rms_norm,
        "tl.store(rstd + r_M, rstd_M, mask=r_M < R)",
        "tl.store(rstd + r_M, rstd_M, mask=r_M < R + 1)",
        tmp_path,
    )
    check(copy.rms_norm, F32, 9, 40, DEVICE)
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()


def test_torchs_own_equals_the_definition():
    x, weight, residual = (
        torch.randn(n, dtype=torch.float64, requires_grad=True)
        for n in ((2, 5, 12), (12,), (2, 5, 12))
    )
    for residuals in ((), (residual,)):
        assert torch.autograd.gradcheck(
            lambda *a: eager.rms_norm(a[0], a[1], EPS, *a[2:]), (x, weight, *residuals)
        )
        got, want = (
            eager.rms_norm(x, weight, EPS, *residuals),
            reference.rms_norm(x, weight, EPS, *residuals),
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)  # float64; measured 9e-16


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 3, 8)
    for bad, message in (
        ((x, torch.zeros(7), EPS), "shapes"),
        ((x, torch.zeros(8), EPS, torch.zeros(2, 3, 7)), "shapes"),
        ((x.double(), torch.zeros(8), EPS), "dtype"),
        ((torch.zeros(1, 65537), torch.zeros(65537), EPS), "features"),
    ):
        with pytest.raises(UsageError, match=message):
            rms_norm.rms_norm(*bad)
