"""Statistics against float64, each with its support; unequal supports do not compare."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.spec.errors import UsageError
from stackproof.trace import stats, trace
from stackproof.trace.points import Point
from stackproof.trace.stats import Gatherer
from tests.trace import models

POINT = Point("layers.0.x", 0, "x", 0)


def stat_of(x, tokens="all", point=POINT):
    gatherer = Gatherer(tokens)
    gatherer.see(point, x)
    return gatherer.finish()[point.name]


def wanted(x):
    """The same figures in float64, by formulas of torch."""
    x = x.double()
    mean, std = float(x.mean()), float(x.std(unbiased=False))
    return {
        "n": x.numel(),
        "mean": mean,
        "std": std,
        "rms": float(x.square().mean().sqrt()),
        "absmax": float(x.abs().max()),
        "min": float(x.min()),
        "max": float(x.max()),
        "kurtosis": float(((x - mean) / std).pow(4).mean()) if std else math.nan,
        "frac_zero": float((x == 0).double().mean()),
    }


# float32 sums of rows and blocks against float64 came within 4e-7 of it, moments of order 4 within
# 6e-6 (over the cases below).
LOOSE = {"kurtosis": 3e-5}


def agrees(stat, x, loosened=1.0):
    for name, value in wanted(x).items():
        tolerance = LOOSE.get(name, 2e-6) * loosened
        scale = max(abs(value), stat.std if name == "mean" else 0.0)
        assert getattr(stat, name) == pytest.approx(
            value, rel=tolerance, abs=tolerance * scale, nan_ok=True
        ), name


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(
        [(1, 1, 2), (2, 3, 5), (1, 7, 64), (3, 50, 33), (2, 9, 4, 8), (1, 1200, 3), (2, 5)]
    ),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1000.0, 1e5]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    heavy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_figures_are_those_of_float64(shape, offset, scale, heavy, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64) * scale
    x = (x.sinh() if heavy and scale == 1.0 else x) + offset * scale
    x = x.float()
    agrees(stat_of(x), x)


@pytest.mark.parametrize("offset", [3.0, 100.0, 1e4, 1e6])
def test_a_mean_that_hides_the_spread_does_not_cancel_it(offset):
    """mean² is up to 10¹² variances; the naive difference of float32 moments
    is then no number at all.
    """
    x = (
        torch.randn(4, 100, 50, generator=torch.Generator().manual_seed(0)).double() + offset
    ).float()
    agrees(stat_of(x), x)
    naive = float((x.square().mean() - x.mean().square()).clamp(min=0).sqrt())
    if offset >= 1e4:
        assert abs(naive / float(x.double().std()) - 1) > 0.1


def test_the_shifted_pass_is_what_holds_the_spread(monkeypatch):
    """With the second pass off, the same input is wrong: the test above can fail."""
    monkeypatch.setattr(stats, "_better", lambda x, *sums: None)
    x = torch.randn(4, 100, 50, generator=torch.Generator().manual_seed(0)) + 1e6
    assert abs(stat_of(x).std / float(x.double().std()) - 1) > 0.01


def test_a_constant_has_no_spread_and_no_kurtosis():
    stat = stat_of(torch.full((2, 3, 4), 0.1))
    assert stat.std == 0 and math.isnan(stat.kurtosis) and stat.mean == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32_or_wider(dtype):
    x = (torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(1)) * 8 + 2).to(dtype)
    stat = stat_of(x)
    agrees(stat, x)
    assert stat.support.dtype == str(dtype).removeprefix("torch.")


def test_squares_that_overflow_float32_are_taken_in_float64():
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(2)) * 1e25
    agrees(stat_of(x), x)


def test_large_tensors_are_taken_block_by_block(monkeypatch):
    x = torch.randn(3, 41, 37, generator=torch.Generator().manual_seed(3)) + 9
    whole = stat_of(x)
    monkeypatch.setattr(stats, "BLOCK", 100)
    agrees(stat_of(x), x)
    assert stat_of(x).argmax == whole.argmax


@pytest.mark.parametrize(("bad", "n"), [(math.nan, 1), (math.inf, 3), (-math.inf, 2)])
def test_values_that_are_not_finite_are_counted_exactly(bad, n):
    x = torch.randn(2, 5, 6)
    x.view(-1)[7 : 7 + n] = bad
    stat = stat_of(x)
    assert stat.frac_nonfinite == n / 60 and not math.isfinite(stat.rms)
    assert stat_of(torch.randn(2, 5, 6)).frac_nonfinite == 0


def test_the_peak_and_the_top_token_are_found():
    x = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(4))
    x[1, 2, 7] = -500.0
    x[0, 3] += 20
    stat = stat_of(x)
    assert stat.argmax == (8, 7) and stat.absmax == 500 and stat.top_token == 8
    energy = x.double().square().sum(-1).flatten()
    assert stat.top_token_energy_frac == pytest.approx(float(energy[8] / energy.sum()), rel=1e-6)
    assert stat.peak_energy_frac == pytest.approx(500**2 / float(energy.sum()), rel=1e-6)


def test_quantiles_are_of_a_stated_sample():
    """A sample of 4096 values of a normal distribution: the median came within 0.05 and the 0.999
    quantile within 0.8 in 200 draws.
    """
    x = torch.randn(2, 600, 256, generator=torch.Generator().manual_seed(5))
    stat = stat_of(x)
    assert 2048 < stat.n_sampled <= 4096 and stat.n == x.numel()
    assert abs(stat.quantiles["0.5"]) < 0.1 and 2.2 < stat.quantiles["0.999"] < 4.2
    small = torch.randn(1, 10, 7)
    exact = stat_of(small)
    assert exact.n_sampled == 70 and exact.quantiles["0.5"] == pytest.approx(
        float(small.quantile(0.5)), abs=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_heads_laid_out_before_tokens_are_read_in_place(rows):
    x_BNTH = torch.randn(rows, 4, 9, 6, generator=torch.Generator().manual_seed(6)) + 1
    agrees(stat_of(x_BNTH.transpose(1, 2)), x_BNTH)


def test_no_value_at_all_is_said():
    stat = stat_of(torch.empty(1, 0, 4))
    assert stat.n == 0 and math.isnan(stat.mean) and stat.argmax is None


def test_the_last_token_alone():
    x = torch.randn(2, 9, 4)
    assert stat_of(x, "last").mean == pytest.approx(float(x[:, -1].double().mean()), abs=1e-7)
    assert stat_of(x, "last").support.tokens == "last" and stat_of(x, "last").n == 8


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("shape", lambda x: stat_of(x[:, :3])),
        ("dtype", lambda x: stat_of(x.double())),
        (
            "tokens",
            lambda x: stat_of(
                torch.cat((x, x), 1)[:, -x.shape[1] :].repeat_interleave(1, 1), "last"
            ),
        ),
        ("slot", lambda x: stat_of(x, point=Point("layers.0.y", 0, "y", 0))),
        ("derived", lambda x: stat_of(x, point=Point("layers.0.x", 0, "x", 0, derived=True))),
    ],
)
def test_unequal_supports_do_not_compare(field, other):
    """The founding note's "18×" was a ratio of two different supports."""
    x = torch.randn(2, 4, 6)
    if field == "tokens":
        x = x[:, -1:]
    assert stat_of(x).support.differs(other(x).support) == field
    layer_1 = stat_of(x * 3, point=Point("layers.1.x", 1, "x", 5))
    assert layer_1.support.differs(stat_of(x).support) is None


@pytest.mark.parametrize("name", models.OURS)
def test_counts_are_the_dimensions_times_the_tokens(name):
    model, ids = models.ours(name), models.ids(rows=2, tokens=17)
    cfg, tokens = model.cfg, 2 * 17
    traced = trace(model, ids)
    width = {
        "q": cfg.n_heads * cfg.head_dim,
        "k": cfg.n_kv_heads * cfg.head_dim,
        "ffn.gate": cfg.d_ff,
        "ffn.swiglu": cfg.d_ff,
    }
    width |= {
        "ffn.up": cfg.d_ff,
        "ffn.silu": cfg.d_ff,
        "ffn.act": cfg.d_ff,
        "logits": model.vocab_size,
    }
    for t in traced.points:
        assert t.stat.n == math.prod(t.stat.support.shape) == t.stat.support.n
        # reads some of the tokens only
        hard = cfg.depth.kind == "mixture-of-depths" and t.point.layer == 1
        if t.point.slot.startswith("experts") or hard:
            continue
        if t.point.slot in width or t.point.slot in (
            "resid_mid",
            "resid_out",
            "ffn.out",
            "attention_out",
            "final_norm",
            "embedding",
        ):
            assert t.stat.n == width.get(t.point.slot, cfg.d_model) * tokens, t.point.name
    if cfg.ffn.kind == "moe":
        routed = sum(
            t.stat.support.shape[1]
            for t in traced.points
            if t.point.slot.endswith(".out") and t.point.slot.startswith("experts")
        )
        assert routed == tokens * cfg.ffn.top_k * cfg.n_layers


def test_trace_of_the_last_token_leaves_out_rows_of_experts_and_says_so():
    traced = trace(models.ours("experts"), models.ids(), tokens="last")
    assert "layers.0.router" in traced.unseen and "layers.0.experts.0.out" in traced.unseen
    assert traced["layers.0.ffn.out"].stat.n == 2 * models.ours("experts").cfg.d_model


@pytest.mark.parametrize(
    ("side", "name"),
    [("ours", "plain"), ("ours", "experts"), ("theirs", "qwen2-window"), ("theirs", "gpt2")],
)
def test_gradients_are_those_of_autograd_and_parameters_keep_theirs(side, name):
    """Against the gradient of a number added at the point: the derivative along a direction,
    by autograd on that number.
    """
    model, ids = (models.ours(name) if side == "ours" else models.theirs(name)), models.ids()
    traced = trace(model, ids, backward=True)
    assert all(p.grad is None for p in model.parameters())
    missing = [t.point.name for t in traced.points if t.grad is None and t.point.flows]
    assert not [m for m in missing if "experts" not in m]
    from stackproof.trace.hooks import hook_points
    from stackproof.trace.trace import run

    for point in (
        "layers.0.attention_out",
        "layers.1.v",
        "layers.1.resid_mid",
        "layers.1.attention_mixed",
        "layers.0.k",
    ):
        gain = torch.ones((), requires_grad=True)
        kept = {}
        with hook_points(
            model,
            [point],
            lambda p, x, g=gain, k=kept: k.setdefault("x", x.detach().clone()) * 0 + x * g,
        ):
            logits = run(model, ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (along,) = torch.autograd.grad(loss, gain)
        gradients = {}
        with hook_points(
            model,
            [point],
            lambda p, x: None,
            on_grad=lambda p, g, k=gradients: k.__setitem__("g", g.clone()),
        ):
            again = run(model, ids)
            torch.nn.functional.cross_entropy(
                again[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            ).backward()
        model.zero_grad()
        assert float((gradients["g"] * kept["x"]).sum()) == pytest.approx(
            float(along), rel=1e-3, abs=1e-6
        )
        assert traced[point].grad.rms == pytest.approx(
            float(gradients["g"].double().square().mean().sqrt()), rel=1e-5
        )
    assert traced.loss_nats == pytest.approx(float(loss.detach()), rel=1e-6)


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(UsageError, match="cannot be traced"):
        trace(models.ours(), torch.arange(4))
    with pytest.raises(UsageError, match="cannot be traced"):
        trace(models.ours(), models.ids(tokens=1), backward=True)
    with pytest.raises(UsageError, match="requires a gradient"):
        trace(models.ours().requires_grad_(False), models.ids(), backward=True)
    with pytest.raises(UsageError, match="was not traced"):
        trace(models.ours(), models.ids(), ["logits"])["layers.0.q"]


def test_values_beyond_the_fourth_root_of_float64_have_no_kurtosis_and_end_no_trace():
    x = (
        torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        * 1e150
        + 1e150
    )
    stat = stat_of(x)
    assert (
        stat.mean == pytest.approx(float(x.mean()))
        and not math.isfinite(stat.kurtosis)
        and stat.absmax == float(x.abs().max())
    )


@pytest.mark.parametrize("offset", [0.0, 70.0])
@pytest.mark.parametrize("spoilt", [None, math.nan, math.inf, 0.0])
def test_figures_that_are_fetched_at_the_end_are_those_that_are_asked_at_once(
    monkeypatch, offset, spoilt
):
    """What other devices than a CPU do, done on one, of many tensors in one transfer.
    The worst relative difference is 4.5e-7.
    """
    draw = torch.Generator().manual_seed(11)
    shapes = {
        "wide": (2, 5, 300),
        "heads": (1, 9, 4, 8),
        "one": (1, 1, 2),
        "flat": (2, 7),
        "none": (1, 0, 4),
        "ids": (3, 2, 5),
    }
    tensors = {n: torch.randn(s, generator=draw) * 3 + offset for n, s in shapes.items()}
    tensors["half"], tensors["double"] = tensors["wide"].bfloat16(), tensors["wide"].double()
    if spoilt is not None:
        tensors["wide"].view(-1)[[3, 77]] = spoilt
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(stats, "_at_once", lambda x, answer=at_once: answer)
        gatherer = Gatherer()
        for i, (name, x) in enumerate(tensors.items()):
            gatherer.see(Point(name, None, name, i), x)
        assert all(isinstance(one, stats.Stat) for one in gatherer.seen.values()) is at_once
        found.append(gatherer.finish())
    for name in tensors:
        now, later = (f[name].as_dict() for f in found)
        assert found[0][name].support == found[1][name].support and list(found[1]) == list(tensors)
        for figure in now:
            equal = (
                later[figure] is None
                if now[figure] is None
                else pytest.approx(now[figure], rel=3e-6, abs=1e-6, nan_ok=True)
            )
            assert equal is True or later[figure] == equal, (name, figure)
