"""Attention in chunks of queries against the definition: forward, gradients, what it must not read,
and when it is taken.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import attention as torch_attention
from stackproof.kernels import chunked_attention, dispatch
from tests.kernels.support import broken, double, flipped, gradients, is_red
from tests.kernels.test_attention import Shape, check, expected, inputs

F32 = torch.float32
in_chunks = partial(torch_attention.attention, chunks=True)

# Around the size of a chunk, heads shared and not, every limit of sight;
# each long and wide enough to be taken.
SHAPES = [
    Shape(128, 128, H=8, N=4, K=1),
    Shape(129, 129, H=8, N=2, K=2, B=4),
    Shape(191, 191, H=8, N=4, K=2, B=2),
    Shape(192, 192, H=12, N=2, K=1, B=2, window=50),
    Shape(193, 193, H=8, N=1, K=1, B=4, window=1),
    Shape(257, 257, H=8, N=4, K=1, documents=60),
    Shape(200, 200, H=8, N=6, K=3, B=3, documents=70, window=40),
    Shape(130, 201, H=8, N=2, K=2, B=4, window=90),
]


@pytest.fixture
def taken(monkeypatch):
    """Counts calls of the chunked way: a test of it must not pass through torch's."""
    calls, original = [], chunked_attention.attention
    monkeypatch.setattr(
        chunked_attention, "attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    return calls


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_float64(shape, taken):
    """Measured worst case 3.5e-07."""
    check(in_chunks, shape, F32, "cpu")
    assert taken


@pytest.mark.parametrize(
    "shape",
    [Shape(130, 130, H=4, N=2, K=1, B=2), Shape(131, 131, H=4, B=4, documents=40, window=30)],
)
def test_in_float64_it_is_the_definition(shape, taken):
    qkv, start, grad = inputs(shape, torch.float64, "cpu")
    out = in_chunks(*qkv, start_BS=start, window=shape.window, scale=0.3)
    wide = double(*qkv)
    want = reference.attention(*wide, start_BS=start, window=shape.window, scale=0.3)
    for a, b in zip([out, *gradients(out, qkv, [grad])], [want, *gradients(want, wide, [grad])]):
        # float64, another order of sums: measured worst case 4e-15
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert taken


def test_a_wrong_scale_and_a_turned_channel_are_seen(taken):
    qkv, _, grad = inputs(Shape(130, 130, H=16, N=4, K=1), F32, "cpu")
    out, *_ = expected(qkv, None, None, grad)
    got = in_chunks(*qkv)
    assert not is_red("output", got, out, F32) and taken
    assert is_red("1 % more", got * 1.01, out, F32)
    assert is_red("one channel", flipped(got), out, F32)
    assert is_red("scores 1 % larger", in_chunks(*qkv, scale=1.01 * 16**-0.5), out, F32)


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        (".triu_(1)", ".triu_(2)", Shape(130, 130, N=4, K=1)),
        ("slice(0, S - T + stop)", "slice(0, max(1, S - T + stop - 1))", Shape(130, 130, N=4, K=1)),
        ("int(seen_S[-1]) + 1", "int(seen_S[-1])", Shape(192, 192, N=4, K=1, window=70)),
        ("slice(int(seen_S[0])", "slice(int(seen_S[0]) + 1", Shape(192, 192, N=4, K=1, window=70)),
        (
            "(0, 0, keys.start, S - keys.stop)",
            "(0, 0, S - keys.stop, keys.start)",
            Shape(192, 192, N=4, K=1, window=70),
        ),
        ("sum_BSH[:, keys].add_(part_BJH)", "pass", Shape(130, 130, N=4, K=1)),
        (
            "_product(slope_BRS.mT, q_BRH, scale)",
            "_product(slope_BRS.mT, q_BRH, 1.0)",
            Shape(130, 130, N=4, K=1),
        ),
        (
            "torch.bmm(weights_BRS.mT, grad_BRH)",
            "torch.bmm(weights_BRS.mT, q_BRH)",
            Shape(130, 130, N=4, K=1),
        ),
    ],
)
def test_a_broken_copy_is_caught(monkeypatch, tmp_path, old, new, shape):
    check(in_chunks, shape, F32, "cpu")
    monkeypatch.setattr(
        torch_attention, "chunked_attention", broken(chunked_attention, old, new, tmp_path)
    )
    with pytest.raises((AssertionError, RuntimeError), match=r"errors|size|shape"):
        check(in_chunks, shape, F32, "cpu")


def test_keys_out_of_sight_are_not_read(taken):
    """Keys and values that no query of a chunk may see are NaN:
    multiplied by a weight of zero they would still be NaN.
    """
    q, k, v = (torch.randn(4, 1, 256, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[:, :, :64], v[:, :, :64] = math.nan, math.nan
    start = torch.full((4, 256), 64).minimum(torch.arange(256))
    out = in_chunks(q, k, v, start_BS=start)
    dq, dk, dv = gradients(out[:, :, 64:], (q, k, v), [torch.ones_like(out[:, :, 64:])])
    assert taken and out[:, :, 64:].isfinite().all() and dq[:, :, 64:].isfinite().all()
    assert dk[:, :, 64:].isfinite().all() and dv[:, :, 64:].isfinite().all()
    assert out[:, :, :64].isnan().all()  # those that do see them


def test_twice_the_same_bits():
    def once():
        torch.manual_seed(7)
        qkv, start, grad = inputs(Shape(300, 300, N=4, K=1, documents=90), F32, "cpu")
        out = in_chunks(*qkv, start_BS=start)
        return [out, *gradients(out, qkv, [grad])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("size", [2**10, 2**17])
def test_a_smaller_buffer_of_scores_changes_nothing_but_the_chunks(monkeypatch, size):
    sizes, chunks = [], chunked_attention._chunks
    monkeypatch.setattr(
        chunked_attention,
        "_chunks",
        lambda *a: (sizes.append(c[0].stop - c[0].start) or c for c in chunks(*a)),
    )
    check(in_chunks, Shape(160, 160, N=4, K=1, window=100), F32, "cpu")
    assert max(sizes) == 64
    sizes.clear()
    monkeypatch.setattr(chunked_attention, "SCORES_BYTES", size)
    check(in_chunks, Shape(160, 160, N=4, K=1, window=100), F32, "cpu")
    assert max(sizes) == (16 if size == 2**10 else 32)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"T": 127}, False),
        ({"B": 1}, False),
        ({"B": 1, "N": 4}, True),
        ({"dtype": torch.float64}, True),
        ({"dtype": torch.bfloat16}, False),
        ({"device": "meta"}, False),
        ({"autocast": True}, False),
    ],
)
def test_when_it_is_taken(change, fits):
    c = {"B": 4, "N": 1, "T": 128, "dtype": F32, "device": "cpu", "autocast": False} | change
    q, k = (
        torch.zeros(c["B"], n, c["T"], 8, dtype=c["dtype"], device=c["device"]) for n in (c["N"], 1)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=c["autocast"]):
        assert chunked_attention.suits(q, k) is fits


@pytest.mark.parametrize("rows", [1, 4])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(taken, rows):
    """As torch's does; fillers of a mixture of depths see nothing."""
    q, k, v = (torch.randn(4, 1, 128, 8, requires_grad=True) for _ in range(3))
    mask, grad = torch.ones(rows, 1, 128, 128, dtype=torch.bool).tril(), torch.randn(4, 1, 128, 8)
    mask[-1, :, 5:9] = False
    got, want = (torch_attention.document_attention(q, k, v, mask, chunks=c) for c in (True, False))
    assert len(taken) == 1 and torch.equal(got[-1, :, 5:9], torch.zeros(1, 4, 8))
    for a, b in zip(
        (got, *gradients(got, (q, k, v), [grad])), (want, *gradients(want, (q, k, v), [grad]))
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)  # float32 twice; measured 1e-6


def test_what_it_returns_can_be_changed_in_place_like_torchs():
    q, k, v = (torch.randn(4, n, 128, 8, requires_grad=True) for n in (4, 2, 2))
    plain, changed = in_chunks(q, k, v), in_chunks(q, k, v)
    changed[0].zero_()
    changed.mul_(3)
    assert torch.equal(changed[1:], 3 * plain[1:]) and not changed[0].any()
    assert not gradients(changed, (q,), [torch.ones_like(changed)])[0][0].any()


def test_compiled_it_is_the_same():
    q, k, v = (torch.randn(4, n, 128, 8, requires_grad=True) for n in (4, 2, 2))
    grad = torch.randn(4, 4, 128, 8)
    graph = torch.compile(lambda *x: 2 * in_chunks(*x), fullgraph=True)
    got, want = graph(q, k, v), 2 * in_chunks(q, k, v)
    assert torch.equal(got, want)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(got, (q, k, v), [grad]), gradients(want, (q, k, v), [grad]))
    )


def test_gradients_of_gradients_are_refused_not_wrong():
    x = torch.randn(4, 1, 128, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(in_chunks(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


def test_the_dispatcher_takes_it_for_masks_too(taken):
    q, k, v = (torch.randn(4, 1, 128, 8) for _ in range(3))
    mask = dispatch.window_mask(0, 128, 30, "cpu")
    with dispatch.using(attention="torch"):
        plain = dispatch.attention(q, k, v, mask_B1TS=mask)
        assert not taken and dispatch.takes_masks("cpu")
    with dispatch.using(attention="chunks"):
        got = dispatch.attention(q, k, v, mask_B1TS=mask)
        assert len(taken) == 1 and dispatch.takes_masks("cpu")
    torch.testing.assert_close(got, plain, rtol=0, atol=2e-6)  # float32 twice; measured 6e-7
    assert torch.equal(plain, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
