"""A derivative that is wrong in one place: the comparison of gradients names that place, and right
derivatives differ by rounding.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch
from stackproof.model.build import build_model
from stackproof.museum.plant import load_museum, swap
from stackproof.spec.errors import UsageError
from stackproof.trace import compare, compare_gradients, variant
from stackproof.trace.model_variant import BETWEEN_BLOCKS, ModelVariant
from tests.trace import models

L = 1
CLOBBERED = "layers.1.resid_mid"


class Bent(torch.autograd.Function):
    """The identity, with a derivative that is `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class WeightForgotten(torch.autograd.Function):
    """A product whose derivative by its weight is wrong in one row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by_weight = grad.flatten(0, 1).T @ x.flatten(0, 1)
        by_weight[3] = 0.0
        return grad @ weight, by_weight


def projection(model, name):
    linear = model.layers[L].ffn.get_submodule(name)
    original = linear.forward
    linear.forward = lambda x: original(Bent.apply(x, 1.01))


def norm(model):
    module = model.layers[L].attention_norm
    original = module.forward
    module.forward = lambda x: original(Bent.apply(x, 0.5))


def gated(model):
    ffn = model.layers[L].ffn
    ffn.forward = lambda x, reading=None: ffn.down(
        F.silu(Bent.apply(ffn.gate(x), 0.99)) * ffn.up(x)
    )


def weight(model):
    up = model.layers[L].ffn.up
    up.forward = lambda x: WeightForgotten.apply(x, up.weight)


def residual(model):
    block = model.layers[L]

    def forward(x, reading):
        h = x + block.attention(block.attention_norm(x), reading)
        return Bent.apply(h, 1.001) + block.ffn(block.ffn_norm(h), reading)

    block.forward = forward


def head(model):
    original = model.head.forward
    model.head.forward = lambda x: original(Bent.apply(x, 1.01))


# plant, where the first wrong gradient is, and what is said to read it
PLANTS = {
    "up projection by its input": (
        lambda m: projection(m, "up"),
        "layers.1.ffn_norm",
        "gate projection, up projection",
    ),
    "down projection by its input": (
        lambda m: projection(m, "down"),
        "layers.1.ffn.swiglu",
        "down projection, or sum of experts",
    ),
    "up projection by one row of its weight": (weight, "layers.1.ffn.up.weight", ""),
    "norm before attention": (
        norm,
        "layers.0.resid_out",
        "norm before attention, residual sum after attention",
    ),
    "gate in the gated product": (gated, "layers.1.ffn.gate", "gated product"),
    "residual sum": (
        residual,
        "layers.1.resid_mid",
        "norm before the feed-forward, residual sum after the feed-forward",
    ),
    "output head": (head, "final_norm", "output head"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_the_first_wrong_derivative_is_named_and_no_other_is_blamed(name):
    plant, place, reader = PLANTS[name]
    good = models.ours("untied")
    bad = copy.deepcopy(good)
    plant(bad)
    assert compare(variant(good), variant(bad), models.ids()).first_divergence is None, (
        "the forward is right"
    )
    found = compare_gradients(variant(good), variant(bad), models.ids())
    assert found.first is not None and found.first.point.name == place
    assert {s.point.name for s in found.suspects} == {place}
    assert (found.first.read_by == reader) if reader else found.first in found.parameters


@pytest.mark.parametrize("name", models.OURS)
@pytest.mark.parametrize("way", ["float64", "reference", "bfloat16"])
def test_right_derivatives_differ_by_rounding(name, way):
    """Worst over these 63: 0.64 of the bound at a point (queries of gpt2-exact), 0.61 at a
    parameter (a head norm's weight), 0.30 at the weight of a difference of two softmaxes.
    """
    model = models.ours(name)
    good = variant(model, "float64") if way == "bfloat16" else variant(model)
    found = compare_gradients(good, variant(model, way), models.ids())
    assert (
        found.first is None
        and len(found.points) > 20
        and len(found.parameters) == len(list(model.parameters()))
    )
    assert way != "float64" or max(r.excess for r in (*found.points, *found.parameters)) > 1e-3, (
        "two precisions are not one"
    )


@pytest.mark.parametrize("name", models.THEIRS)
def test_right_derivatives_of_transformers_differ_by_rounding(name):
    model = models.theirs(name)
    found = compare_gradients(variant(model), variant(model, "float64"), models.ids())
    values = [
        p
        for p in compare(variant(model), variant(model, "float64"), models.ids()).points
        if not p.point.derived and p.point.flows
    ]
    assert (
        found.first is None
        and len(found.parameters) == len(list(model.parameters()))
        and len(found.points) >= len(values) > 20
    )


def test_a_derivative_inside_the_attention_kernel_is_named_in_every_layer():
    model, original = models.ours("untied"), dispatch.attention

    def around():
        return swap(
            dispatch,
            "attention",
            lambda q, k, v, **more: original(q, Bent.apply(k, -1.0), v, **more),
        )

    bad = ModelVariant(model, variant(model).where, around=around)
    found = compare_gradients(variant(model), bad, models.ids())
    assert found.first.point.name == "layers.1.k_rotated"
    assert {s.point.name for s in found.suspects} == {"layers.0.k_rotated", "layers.1.k_rotated"}
    assert found.first.read_by.startswith("attention kernel")


@pytest.mark.parametrize("d_model", [64, 256])
@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_half_precision_does_not_hide_a_derivative_that_is_off_by_a_fifth(d_model, factor):
    """Rounding alone stays below 0.06 of the bound at these widths in bfloat16."""
    cfg = ModelConfig(
        d_model=d_model,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=2 * d_model,
        max_seq_len=40,
    )
    good, bad = (
        variant(build_model(cfg, models.VOCAB, seed=0).eval(), "bfloat16") for _ in range(2)
    )
    assert compare_gradients(good, bad, models.ids()).first is None
    ffn = bad.model.layers[L].ffn
    original = ffn.forward
    ffn.forward = lambda x, *reading: original(Bent.apply(x, factor), *reading)
    assert compare_gradients(good, bad, models.ids()).first.point.name == "layers.1.ffn_norm"


def detached(model):
    up = model.layers[L].ffn.up
    up.forward = lambda x: F.linear(x, up.weight.detach())


def frozen(model):
    model.layers[L].ffn.up.weight.requires_grad_(False)


def cut(model):
    out = model.layers[L].attention.out
    original = out.forward
    out.forward = lambda x: original(x).detach()


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (detached, "layers.1.ffn.up.weight"),
        (frozen, "layers.1.ffn.up.weight"),
        (cut, "layers.1.attention_out"),
    ],
)
def test_a_gradient_that_is_lost_is_the_worst_of_errors(plant, place):
    good = models.ours("untied")
    bad = copy.deepcopy(good)
    plant(bad)
    found = compare_gradients(variant(good), variant(bad), models.ids())
    assert (
        found.first.point.name == place
        and math.isinf(found.first.added_err)
        and found.first.note == "a gradient on one side only"
    )
    back = compare_gradients(variant(bad), variant(good), models.ids())
    assert math.isinf(
        {g.point.name: g.added_err for g in (*back.points, *back.parameters)}[place]
    ), "also where the right side lost it"


@pytest.mark.parametrize(
    ("names", "next_one"),
    [(BETWEEN_BLOCKS, "layers.1.resid_out"), (("layers.0.resid_out",), "the loss")],
)
def test_where_few_points_are_looked_at_nothing_between_them_is_blamed_by_name(names, next_one):
    good = models.ours("untied")
    bad = copy.deepcopy(good)
    norm(bad)
    first = compare_gradients(variant(good), variant(bad), models.ids(), names).first
    assert (
        first.point.name == "layers.0.resid_out"
        and first.read_by == f"what lies between it and {next_one}"
    )


def test_choices_of_experts_are_compared_by_expert_and_not_by_rank():
    """A row whose experts come in another order has the same gradient; of these ids one has,
    in bfloat16.
    """
    model = models.theirs("mixtral")
    found = compare_gradients(variant(model), variant(model, "bfloat16"), models.ids(seed=0))
    assert found.first is None and {"layers.0.routing", "layers.1.routing"} <= {
        g.point.name for g in found.points
    }


def test_values_are_put_right_before_norms_that_share_their_input():
    """A sum that is wrong in the forward and in its derivative is named, and no norm behind it."""
    good = models.ours("untied")
    bad = copy.deepcopy(good)
    block = bad.layers[L]

    def forward(x, reading):
        h = x + 1.1 * block.attention(block.attention_norm(x), reading)
        return h + block.ffn(block.ffn_norm(h), reading)

    block.forward = forward
    found = compare_gradients(variant(good), variant(bad), models.ids())
    assert {s.point.name for s in found.suspects} == {"layers.1.attention_out"}


def test_an_error_arrives_behind_the_place_where_it_is_made():
    good = models.ours("untied")
    bad = copy.deepcopy(good)
    projection(bad, "down")
    rows = {
        r.point.name: r for r in compare_gradients(variant(good), variant(bad), models.ids()).points
    }
    assert rows["layers.1.ffn.swiglu"].added_err == pytest.approx(0.01, rel=1e-3)
    assert (
        rows["layers.1.ffn.out"].arrived.rel_err
        == 0
        < 1e-3
        < rows["layers.0.ffn.out"].arrived.rel_err
    )
    assert rows["layers.0.ffn.out"].added_err < 1e-6


def test_the_museums_clobbered_gradient_is_named():
    """Its forward is right, so a comparison of values sees nothing."""
    model = models.ours("plain")
    plant = load_museum()["model.shared-gradient-clobbered"]
    bad = ModelVariant(model, variant(model).where, around=plant.apply)
    assert compare(variant(model), bad, models.ids()).first_divergence is None
    found = compare_gradients(variant(model), bad, models.ids())
    assert found.first is not None and found.first.point.name == CLOBBERED, [
        g.point.name for g in found.suspects
    ]


def test_gradients_that_were_there_stay_and_one_token_has_none():
    model = models.ours()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    compare_gradients(variant(model), variant(model), models.ids())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    with pytest.raises(UsageError, match="at least 2 tokens"):
        compare_gradients(variant(model), variant(model), models.ids(tokens=1))
