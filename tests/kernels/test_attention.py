"""Flash attention against float64: forward, gradients, memory, and what must turn it red.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import attention as torch_attention
from stackproof.kernels.triton import flash_attention, flash_attention_kernels
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


@dataclass(frozen=True)
class Shape:
    """One attention; `documents` is their mean length, 0 for none."""

    T: int
    S: int
    H: int = 32
    N: int = 1
    K: int = 1
    B: int = 1
    window: int | None = None
    documents: int = 0


# Around every tile size, over all tiles of the table in turn.
SMALL = [
    (F32, Shape(1, 1, H=32, N=2, K=1)),
    (F32, Shape(65, 65, H=64, N=2, K=1)),
    (F32, Shape(40, 77, H=80, B=2, documents=20)),
    (F32, Shape(33, 33, H=256)),
    (F16, Shape(63, 63, H=96, N=4, K=2)),
    (F16, Shape(64, 127, H=128, N=3, K=1, window=50)),
    (F16, Shape(511, 513, H=32, N=2, K=1, B=2, documents=60, window=100)),
    (F16, Shape(1025, 1025)),
    (BF16, Shape(127, 127, H=80, N=2, K=2, B=2)),
    (BF16, Shape(513, 513, H=64, documents=150)),
    (BF16, Shape(1, 300, H=64, N=2, K=1, window=1)),
    (BF16, Shape(64, 65, H=256, N=2, K=2)),
]
LENGTHS = [
    (1, 1),
    (63, 63),
    (64, 64),
    (65, 65),
    (127, 127),
    (511, 511),
    (513, 513),
    (1025, 1025),
    (1, 513),
    (64, 1025),
]
LIMITS_OF_SIGHT = [{}, {"window": 100}, {"documents": 70}, {"window": 50, "documents": 120}]
FULL = [
    (dtype, Shape(T, S, H=H, N=4, K=K, B=2, **sight))
    for dtype, (T, S), H, K, sight in itertools.product(
        FLOATS, LENGTHS, (32, 64, 80, 96, 128, 256), (4, 2), LIMITS_OF_SIGHT
    )
]


def inputs(
    shape: Shape, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """q, k and v as heads of a projection and inside walls, starts of documents,
    and a gradient to send back.
    """
    B, S = shape.B, shape.S
    heads = ((shape.N, shape.T), (shape.K, S), (shape.K, S))
    qkv = [
        torch.randn(B, t, h, shape.H, device=device).to(dtype).requires_grad_() for h, t in heads
    ]
    start_BS = None
    if shape.documents:
        new_BS = torch.rand(B, S, device=device) < 1 / shape.documents
        new_BS[:, 0] = True
        start_BS = torch.where(new_BS, torch.arange(S, device=device), 0).cummax(1).values
    grad_BNTH = walled(torch.randn(B, shape.N, shape.T, shape.H, device=device).to(dtype))
    return [walled(x).transpose(1, 2) for x in qkv], start_BS, grad_BNTH


def expected(
    qkv: list[Tensor], start_BS: Tensor | None, window: int | None, grad_BNTH: Tensor
) -> list[Tensor]:
    """Output and gradients in float64: from the definition in the interpreter's subset, through
    torch for the grid of a GPU.
    """
    wide = double(*qkv)
    attention = torch_attention.attention if qkv[0].is_cuda else reference.attention
    out = attention(*wide, start_BS=start_BS, window=window)
    return [out, *gradients(out, wide, [grad_BNTH])]


def check(kernels, shape: Shape, dtype: torch.dtype, device: str) -> None:
    """Compare output and gradients of an attention function with float64."""
    qkv, start_BS, grad_BNTH = inputs(shape, dtype, device)
    out = kernels(*qkv, start_BS=start_BS, window=shape.window)
    got = [out, *gradients(out, qkv, [grad_BNTH])]
    want = expected(qkv, start_BS, shape.window, grad_BNTH)
    for what, a, b in zip(("output", "dq", "dk", "dv"), got, want):
        compare(what, a, b, dtype)


@pytest.mark.parametrize(("device", "dtype", "shape"), cases(SMALL, FULL))
def test_output_and_gradients_equal_float64(guard, device, dtype, shape):
    if shape.S == 1:  # one key: the weight is 1 and the true gradients of q and k are 0
        qkv, _, grad = inputs(shape, dtype, device)
        out = flash_attention.attention(*qkv)
        assert torch.equal(
            out, qkv[2].expand(-1, out.shape[1] // qkv[2].shape[1] * qkv[2].shape[1], -1, -1)
        )
        dq, dk, _ = gradients(out, qkv, [grad])
        # the difference of two sums of float32 rounding; measured 2.5e-7
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5
        return
    check(flash_attention.attention, shape, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), cases([(F16,)], [(d,) for d in FLOATS]))
def test_a_wrong_scale_and_a_turned_channel_are_seen(device, dtype):
    qkv, _, grad = inputs(Shape(65, 65, H=64, N=2, K=1), dtype, device)
    out, *_ = expected(qkv, None, None, grad)
    got = flash_attention.attention(*qkv, scale=64**-0.5)
    assert not is_red("output", got, out, dtype)
    assert is_red("1 % more", got * 1.01, out, dtype)
    assert is_red("one channel", flipped(got), out, dtype)
    assert is_red(
        "scores 3 % larger", flash_attention.attention(*qkv, scale=1.03 * 64**-0.5), out, dtype
    )


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        ("(s_J[None, :] <= p_M[:, None])", "(s_J[None, :] <= p_M[:, None] + 1)", Shape(65, 65)),
        ("(s_J[:, None] <= p_M[None, :])", "(s_J[:, None] <= p_M[None, :] + 1)", Shape(65, 65)),
        (
            "(first + row_R[:, None] < n_rows) & (e_E[None, :] < H), other",
            "(first + row_R[:, None] < n_rows), other",
            Shape(33, 33, H=40),
        ),
        (
            "tl.maximum(low_M, p_M - window + 1)",
            "tl.maximum(low_M, p_M - window)",
            Shape(65, 65, window=9),
        ),
        ("whole_end = 0 ", "whole_end = S ", Shape(160, 160, documents=20)),
        ("for g in range(0, G)", "for g in range(0, 1)", Shape(33, 33, N=2)),
        (
            "end = tl.minimum(end, newest + window)",
            "end = tl.minimum(end, s0 + window)",
            Shape(160, 160, window=20),
        ),
    ],
)
def test_a_broken_copy_is_caught(monkeypatch, tmp_path, old, new, shape):
    check(flash_attention.attention, shape, F32, DEVICE)
    monkeypatch.setattr(
        flash_attention, "kernels", broken(flash_attention_kernels, old, new, tmp_path)
    )
    with pytest.raises(AssertionError, match="errors"):
        check(flash_attention.attention, shape, F32, DEVICE)


def test_a_copy_that_writes_past_its_rows_is_caught(monkeypatch, tmp_path):
    margins = Margins()
    margins.install(monkeypatch)
    check(flash_attention.attention, Shape(60, 60), F32, DEVICE)
    margins.check()
    mask = "mask=(first + row_R[:, None] < n_rows) & (e_E[None, :] < H))"
    copy = broken(flash_attention_kernels, mask, mask.replace("n_rows", "n_rows + 1"), tmp_path)
    monkeypatch.setattr(flash_attention, "kernels", copy)
    check(flash_attention.attention, Shape(60, 60), F32, DEVICE)
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()


@pytest.mark.parametrize(
    ("device", "sight"), cases([("window",), ("documents",)], [("window",), ("documents",)])
)
def test_tiles_out_of_sight_are_not_read(device, sight):
    """Values and keys that no query may see are NaN; a tile that were read would turn its
    queries into NaN, masked or not.
    """
    T, S = 64, 640
    q, k, v = (
        torch.randn(1, 1, n, 32, device=device, dtype=F16, requires_grad=True) for n in (T, S, S)
    )
    hidden = slice(0, 512)
    with torch.no_grad():
        k[:, :, hidden], v[:, :, hidden] = math.nan, math.nan
    start = torch.full((1, S), 576, device=device).minimum(torch.arange(S, device=device))
    out = flash_attention.attention(
        q, k, v, **({"window": 65} if sight == "window" else {"start_BS": start})
    )
    dq, dk, dv = gradients(out, (q, k, v), [torch.ones_like(out)])
    assert out.isfinite().all() and dq.isfinite().all()
    assert torch.equal(dk[:, :, hidden], torch.zeros_like(dk[:, :, hidden]))
    assert torch.equal(dv[:, :, hidden], torch.zeros_like(dv[:, :, hidden]))


@pytest.mark.parametrize(("device", "dtype"), cases([(F32,)], [(d,) for d in FLOATS]))
def test_twice_the_same_bits(device, dtype):
    def once():
        torch.manual_seed(7)
        qkv, start, grad = inputs(Shape(130, 130, N=4, K=1, documents=30), dtype, device)
        out = flash_attention.attention(*qkv, start_BS=start)
        return [out, *gradients(out, qkv, [grad])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_starts_that_are_not_in_order_keep_their_meaning():
    qkv, _, grad = inputs(Shape(70, 70, H=32), F32, DEVICE)
    position = torch.arange(70, device=grad.device)
    # each third position sees half, the others all
    start = (position // 2 * (position % 3 == 0))[None].contiguous()
    out = flash_attention.attention(*qkv, start_BS=start)
    for a, b in zip([out, *gradients(out, qkv, [grad])], expected(qkv, start, None, grad)):
        compare("unordered starts", a, b, F32)


def test_no_rows_give_no_rows():
    q, k = (
        torch.zeros(2, n, t, 32, device=DEVICE, requires_grad=True) for n, t in ((2, 0), (1, 5))
    )
    out = flash_attention.attention(q, k, k)
    out.sum().backward()
    assert out.shape == q.shape and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window"),
        ({"start_BS": torch.zeros(1, 4)}, "start"),
        ({"q_BNTH": torch.zeros(1, 2, 9, 32)}, "shapes"),
        ({"q_BNTH": torch.zeros(1, 3, 4, 32)}, "shapes"),
        ({"q_BNTH": torch.zeros(1, 2, 4, 32, dtype=torch.float16)}, "dtype"),
    ],
)
def test_what_does_not_fit_is_refused_by_both(change, message):
    fit = {
        "q_BNTH": torch.zeros(1, 2, 4, 32),
        "k_BKSH": torch.zeros(1, 2, 4, 32),
        "v_BKSH": torch.zeros(1, 2, 4, 32),
    }
    for attention in (torch_attention.attention, flash_attention.attention):
        with pytest.raises(UsageError, match=message):
            attention(**fit | change)


def test_other_dtypes_and_wide_heads_are_refused():
    x = torch.zeros(1, 1, 2, 32, dtype=torch.float64)
    with pytest.raises(UsageError, match="dtype"):
        flash_attention.attention(x, x, x)
    wide = torch.zeros(1, 1, 2, 264)
    with pytest.raises(UsageError, match="head_dim"):
        flash_attention.attention(wide, wide, wide)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(5, 9, H=4, N=4, K=2, B=2),
        Shape(9, 9, H=4, documents=3, B=2),
        Shape(6, 9, H=4, window=3, documents=4),
    ],
)
def test_torch_attention_equals_the_definition(shape):
    qkv, start, grad = inputs(shape, torch.float64, "cpu")
    want = expected(qkv, start, shape.window, grad)
    out = torch_attention.attention(*qkv, start_BS=start, window=shape.window)
    for a, b in zip([out, *gradients(out, qkv, [grad])], want):
        # float64, another order of sums: measured worst case 2e-15
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    given = torch_attention.attention(*qkv, start_BS=start, window=shape.window, scale=0.3)
    torch.testing.assert_close(
        given,
        reference.attention(*qkv, start_BS=start, window=shape.window, scale=0.3),
        rtol=0,
        atol=1e-12,
    )
    assert torch.autograd.gradcheck(
        lambda *x: torch_attention.attention(*x, start_BS=start, window=shape.window), double(*qkv)
    )
