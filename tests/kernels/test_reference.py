"""That the references are the definitions: one query, one row at a time."""

import math

import pytest
import torch

from stackproof.contracts import kernel_reference as reference


def one_query_at_a_time(q, k, v, sees, scale):
    """softmax(scale·q·k)·v over the keys for which `sees(b, p, s)` holds;
    zeros where there are none.
    """
    (B, N, T, _), (K, S) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(S) if sees(b, S - T + t, s)]
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
    given, sees = {
        "causal": ({}, lambda b, p, s: s <= p),
        "window": ({"window": 2, "scale": 0.3}, lambda b, p, s: p - 2 < s <= p),
        "documents": ({"start_BS": start}, lambda b, p, s: start[b, p] <= s <= p),
        "mask": ({"mask_B1TS": mask}, lambda b, p, s: bool(mask[b, 0, p - 2, s])),
    }[sight]
    expected = one_query_at_a_time(q, k, v, sees, given.get("scale", 0.5))
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
