"""The references are the definitions, one query or one row at a time, and their gradients are
those of finite differences: nothing of a kernel is in them.
"""

import math
from functools import partial

import pytest
import torch

from stackproof.contracts import kernel_reference as reference


def one_query_at_a_time(q, k, v, visible, scale):
    """softmax(scale·q·k)·v over the keys for which `visible(b, p, s)` holds, zeros without one."""
    (B, N, T, _), (K, S) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(S) if visible(b, S - T + t, s)]
                weights = [
                    math.exp(scale * float(q[b, n, t] @ k[b, n // (N // K), s])) for s in keys
                ]
                for w, s in zip(weights, keys):
                    out[b, n, t] += w / sum(weights) * v[b, n // (N // K), s]
    return out


@pytest.mark.parametrize("sight", ["causal", "window", "documents", "mask"])
def test_attention_is_the_definition(sight):
    q, k, v = (torch.randn(2, n, t, 4, dtype=torch.float64) for n, t in ((4, 5), (2, 7), (2, 7)))
    start, mask = (
        torch.tensor([[0, 0, 0, 3, 3, 5, 5], [0, 1, 1, 1, 1, 1, 6]]),
        torch.rand(2, 1, 5, 7) < 0.4,
    )
    mask[1, :, 2] = False
    given, visible = {
        "causal": ({}, lambda b, p, s: s <= p),
        "window": ({"window": 2, "scale": 0.3}, lambda b, p, s: p - 2 < s <= p),
        "documents": ({"start_BS": start}, lambda b, p, s: start[b, p] <= s <= p),
        "mask": ({"mask_B1TS": mask}, lambda b, p, s: bool(mask[b, 0, p - 2, s])),
    }[sight]
    expected = one_query_at_a_time(q, k, v, visible, given.get("scale", 0.5))
    torch.testing.assert_close(reference.attention(q, k, v, **given), expected, rtol=0, atol=1e-12)


def test_linear_cross_entropy_is_the_definition():
    x, weight, labels = (
        torch.randn(3, 4).double(),
        torch.randn(5, 4).double(),
        torch.tensor([2, -100, 0]),
    )
    nats = z = 0.0
    for row, label in ((0, 2), (2, 0)):
        logits = [3.0 * math.tanh(float(weight[v] @ x[row]) / 3.0) for v in range(5)]
        norm = math.log(sum(map(math.exp, logits)))
        nats, z = nats + norm - logits[label], z + 0.1 * norm**2
    got = reference.linear_cross_entropy(x, weight, labels, softcap=3.0, z_loss=0.1)
    assert [float(g) for g in got] == pytest.approx([nats, z], rel=1e-12)


def test_linear_and_its_gradients_are_sums_of_products():
    """Without a matrix product, which a kernel has too."""
    x, weight, grad = (torch.randn(n, m, dtype=torch.float64) for n, m in ((7, 5), (3, 5), (7, 3)))
    x.requires_grad_(), weight.requires_grad_()
    y = reference.linear(x, weight)
    y.backward(grad)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
    close(y, (x[:, None] * weight).sum(-1))
    close(x.grad, (grad[:, :, None] * weight).sum(1))
    close(weight.grad, (grad[:, :, None] * x[:, None]).sum(0))


def test_element_wise_references_are_the_definitions():
    x, y = ([float(n) for n in torch.randn(4, dtype=torch.float64)] for _ in range(2))
    silu = [a / (1 + math.exp(-a)) * b for a, b in zip(x, y)]
    rms = [a / math.sqrt(sum(c * c for c in x) / 4 + 1e-5) * b for a, b in zip(x, y)]
    cos, sin = [math.cos(0.3), math.cos(2.0)], [math.sin(0.3), math.sin(2.0)]
    turned = [x[j] * cos[j] - x[j + 2] * sin[j] for j in range(2)]
    turned += [x[j + 2] * cos[j] + x[j] * sin[j] for j in range(2)]
    x, y, cos, sin = (torch.tensor(n, dtype=torch.float64) for n in (x, y, cos, sin))
    for got, expected in (
        (reference.swiglu(x, y), silu),
        (reference.rms_norm(x, y, 1e-5), rms),
        (reference.rope(x, cos, sin), turned),
    ):
        assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_references_are_finite_differences():
    def given(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    heads, labels = [given(1, n, 3, 4) for n in (2, 1, 1)], torch.tensor([1, -100, 4])
    mask = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()[None, None]
    tables = [torch.randn(3, 2, dtype=torch.float64) for _ in range(2)]
    arguments = {
        "attention": (lambda *qkv: reference.attention(*qkv, mask_B1TS=mask), heads),
        "linear": (reference.linear, (given(3, 4), given(5, 4), given(5))),
        "rms_norm": (lambda x, w: reference.rms_norm(x, w, 1e-5), (given(3, 4), given(4))),
        "rope": (lambda x: reference.rope(x, *tables), (given(1, 2, 3, 4),)),
        "swiglu": (reference.swiglu, (given(3, 4), given(3, 4))),
        "linear_cross_entropy": (
            lambda x, w: reference.linear_cross_entropy(x, w, labels, softcap=3.0, z_loss=0.1),
            (given(3, 4), given(5, 4)),
        ),
    }
    assert arguments.keys() == reference.REFERENCES.keys()
    for function, inputs in arguments.values():
        assert torch.autograd.gradcheck(function, tuple(inputs))
