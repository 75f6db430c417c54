"""One fused AdamW step against torch.optim.AdamW and float64."""

import math

import pytest
import torch

from stackproof.kernels import adamw, eager, reference
from stackproof.spec.errors import UsageError
from tests.kernels.support import DEVICE, broken, cases, compare, flipped, is_red

SHAPES = [(5000,), (3, 7), (1,), (0,), (4097,)]
NUMBERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
AROUND = 1e15


def tensors(device, positive=False):
    """Contiguous tensors within buffers, and these."""
    buffers = [torch.full((math.prod(s) + 128,), AROUND, device=device) for s in SHAPES]
    inside = [b[64 : 64 + math.prod(s)].view(s) for b, s in zip(buffers, SHAPES)]
    for x in inside:
        x.copy_(
            torch.rand(x.shape, device=device) if positive else torch.randn(x.shape, device=device)
        )
    return inside, buffers


def steps(update, device, n=5, numbers=NUMBERS):
    """`n` steps by `update`, by torch and by the reference in float64: parameters, theirs,
    the wide ones, and the buffers.
    """
    (p, walls_p), (g, walls_g), (m, walls_m), (v, walls_v) = (tensors(device) for _ in range(4))
    for x in (*m, *v):
        x.zero_()
    theirs = [x.clone().requires_grad_() for x in p]
    optimizer = torch.optim.AdamW(theirs, **numbers)
    wide = [[x.double() for x in xs] for xs in (p, g, m, v)]
    for step in range(1, n + 1):
        for x, q, w in zip(g, theirs, wide[1]):
            x.copy_(torch.randn(x.shape, device=device) / step)
            q.grad = x.clone()
            w.copy_(x)
        optimizer.step()
        update(p, g, m, v, step=step, **numbers)
        reference.adamw(*wide, step=step, **numbers)
    return (p, m, v), theirs, (wide[0], wide[2], wide[3]), (*walls_p, *walls_g, *walls_m, *walls_v)


def check(update, device, numbers=NUMBERS):
    ours, theirs, wide, buffers = steps(update, device, numbers=numbers)
    for what, got, want in zip(("p", "m", "v"), ours, wide):
        for a, b in zip(got, want):
            compare(what, a, b, torch.float32)
    for a, b in zip(ours[0], theirs):
        # both round to float32 at every step; measured worst case after five
        # steps 2.4e-7 on values up to 4
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-6)
    assert all(bool((b[:64] == AROUND).all() and (b[-64:] == AROUND).all()) for b in buffers)


GRID = [
    (NUMBERS | {"weight_decay": decay, "eps": eps},) for decay in (0.1, 0.0) for eps in (1e-8, 1e-3)
]


@pytest.mark.parametrize(("device", "numbers"), cases([GRID[0], GRID[-1]], GRID))
def test_five_steps_equal_torch_and_float64(device, numbers):
    check(adamw.adamw, device, numbers)


def test_torchs_own_equals_torch():
    check(eager.adamw, "cpu")


def test_gradients_are_only_read_and_nothing_is_fine():
    (p, g, m, v) = (tensors(DEVICE, positive=True)[0] for _ in range(4))
    before = [x.clone() for x in g]
    adamw.adamw(p, g, m, v, step=3, **NUMBERS)
    assert all(torch.equal(a, b) for a, b in zip(g, before))
    adamw.adamw([], [], [], [], step=1, **NUMBERS)


def test_a_wrong_scale_and_a_turned_channel_are_seen():
    ours, _, wide, _ = steps(adamw.adamw, DEVICE, 1)
    for got, want in zip(ours, wide):
        for a, b in zip(got, want):
            if a.numel():
                assert not is_red("as it is", a, b, torch.float32)
                assert is_red("1 % more", a * 1.01, b, torch.float32) and is_red(
                    "one channel", flipped(a), b, torch.float32
                )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inside_E = at_E < tl.load(count + i)", "inside_E = at_E < tl.load(count + i) + 1"),
        ("lr / (1 - beta1**step)", "lr"),
        ("(g_E * g_E - old_v_E) * new2", "(g_E * g_E - old_v_E) * new1"),
        ("* kept - change_E", "- change_E"),
        (
            "tl.sqrt_rn(new_v_E) / root_correction + eps",
            "tl.sqrt_rn(new_v_E / root_correction) + eps",
        ),
    ],
)
def test_a_broken_copy_is_caught(tmp_path, old, new):
    copy = broken(adamw, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(copy.adamw, DEVICE)


def test_what_does_not_fit_is_refused():
    x = [torch.zeros(3)]
    for bad, numbers, message in (
        ((x, [torch.zeros(4)], x, x), {}, "shapes"),
        ((x, x, x, []), {}, "shapes"),
        (([torch.zeros(3).half()],) * 4, {}, "tensor"),
        (([torch.zeros(4, 4)[:, :2]],) * 4, {}, "tensor"),
        ((x, x, x, x), {"step": 0}, "range"),
        ((x, x, x, x), {"betas": (0.9, 1.0)}, "range"),
    ):
        with pytest.raises(UsageError, match=message):
            adamw.adamw(*bad, **{"step": 1} | NUMBERS | numbers)
