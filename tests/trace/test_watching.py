"""Watching changes nothing and leaves nothing, and its figures are those of the values."""

import math

import pytest
import torch

from stackproof.trace.nonfinite import is_finite, summary, watching
from tests.trace.test_nonfinite import VARIANTS, loss_of, model_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_same_to_the_bit_and_no_hook_stays(variant):
    plain, watched = model_of(**VARIANTS[variant]), model_of(**VARIANTS[variant])
    expected = loss_of(plain)
    expected.backward()
    with watching(watched) as seen:
        got = loss_of(watched)
        got.backward()
    assert seen.report(got).first is None
    assert torch.equal(expected, got)
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), watched.parameters())
    )
    before = seen.watch.operations
    loss_of(watched).backward()
    assert seen.watch.operations == before
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def test_no_hook_stays_after_an_error():
    with pytest.raises(RuntimeError), watching():
        raise RuntimeError
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


# ---- the figures


def test_values_are_those_of_the_finite_part():
    x = torch.tensor([[1.0, 2.0, float("nan")], [float("inf"), -4.0, float("-inf")]])
    v = summary(x, "x")
    assert (v.n, v.n_nan, v.n_posinf, v.n_neginf, v.first_bad) == (6, 1, 1, 1, (0, 2))
    assert (
        (v.min, v.max) == (-4.0, 2.0)
        and v.mean == pytest.approx(-1 / 3)
        and v.std == pytest.approx(math.sqrt(62 / 9))
    )
    assert summary(torch.full((2,), float("nan")), "x").mean is None


def test_finiteness_is_exact_where_the_sum_overflows():
    assert is_finite(torch.full((4,), 3e38)) and not is_finite(
        torch.tensor([3e38, 3e38, float("inf")])
    )
    assert is_finite(torch.full((9,), 65504.0, dtype=torch.float16)) and is_finite(
        torch.full((9,), 3e38, dtype=torch.bfloat16)
    )
    assert (
        not is_finite(torch.tensor([float("inf"), float("-inf")]))
        and is_finite(torch.tensor([]))
        and is_finite(torch.arange(3))
    )
    assert not is_finite(torch.tensor([complex(0, math.inf)])) and not is_finite(
        torch.tensor([math.nan]).to(torch.float8_e4m3fn)
    )
    assert is_finite(torch.full((4,), 1e308, dtype=torch.float64))
