"""A bug planted in one place of one model: comparison and bisection name that layer and that
operation, and nothing else.

Each plant changes one operation of layer 1 of 3 (or the end) in a copy;
the other side is the model without it.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from stackproof.kernels import dispatch
from stackproof.trace import bisect, compare, variant
from stackproof.trace.compare import MISSING, MISSING_THERE
from tests.trace import models

L = 1


def swiglu_misaligned(model):
    """The founding note's suspicion: an index off by one in the elementwise product."""
    ffn = model.layers[L].ffn
    ffn.forward = lambda x, reading=None: ffn.down(F.silu(ffn.gate(x)) * ffn.up(x).roll(1, -1))


def attention_scaled(factor):
    def plant(model):
        attention = model.layers[L].attention

        def forward(x, reading):
            q, k, v = attention.qkv(x, reading)
            mixed = dispatch.attention(
                q, k, v, **reading.visible(), scale=factor(attention.head_dim)
            )
            return attention.out(mixed.transpose(1, 2).flatten(2))

        attention.forward = forward

    return plant


def norm_twice(model):
    norm = model.layers[L].ffn_norm
    once = norm.forward
    norm.forward = lambda x: once(once(x))


@torch.no_grad()
def weight_transposed(model):
    weight = model.layers[L].attention.q.weight
    assert weight.shape[0] == weight.shape[1]
    weight.copy_(weight.T.clone())


def wrong_rotation(model):
    attention = model.layers[L].attention
    from stackproof.model.positions import rotary_tables

    original = attention.placed
    tables = rotary_tables(attention.head_dim, model.cfg.max_seq_len, model.cfg.rope_theta * 50)

    def placed(x, norm, reading):
        from dataclasses import replace

        T = x.shape[1]
        return original(x, norm, replace(reading, rotary=tuple(t[:T] for t in tables)))

    attention.placed = placed


def pairs_interleaved(model):
    """Weights made for pairs (j, j + H/2), turned in pairs (2j, 2j + 1)."""
    attention = model.layers[L].attention
    original = attention.placed

    def placed(x, norm, reading):
        order = torch.arange(attention.head_dim).view(2, -1).T.flatten()
        apart = x.unflatten(-1, (-1, attention.head_dim))[..., order.argsort()].flatten(-2)
        return original(apart, norm, reading)[..., order]

    attention.placed = placed


def eps_wrong(model):
    model.layers[L].attention_norm.eps = 1e-3


def heads_tiled(model):
    """Key/value heads laid out 0 1 0 1 instead of 0 0 1 1."""
    attention = model.layers[L].attention

    def forward(x, reading):
        q, k, v = attention.qkv(x, reading)
        repeated = [t.repeat(1, q.shape[1] // k.shape[1], 1, 1) for t in (k, v)]
        mixed = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
        return attention.out(mixed.transpose(1, 2).flatten(2))

    attention.forward = forward


@torch.no_grad()
def row_corrupted(model):
    model.layers[L].ffn.up.weight[3] += 0.5


@torch.no_grad()
def head_row_corrupted(model):
    model.head.weight[5] *= -1


def residual_missing(model):
    block = model.layers[L]
    block.forward = lambda x, reading: (
        (h := x + block.attention(block.attention_norm(x), reading)) * 0
        + block.ffn(block.ffn_norm(h), reading)
    )


def bias_missing(model):
    """A projection that forgets the bias it has."""
    v = model.layers[L].attention.v
    v.forward = lambda x: F.linear(x, v.weight)


# plant, variant of the model, point that must be named.
# A wrong scale is seen in the scores, which are worked out of what is passed.
PLANTS = {
    "misaligned gated product": (swiglu_misaligned, {}, "ffn.swiglu"),
    "missing 1/√d": (attention_scaled(lambda h: 1.0), {}, "scores"),
    "doubled 1/√d": (attention_scaled(lambda h: 1.0 / h), {}, "scores"),
    "double norm": (norm_twice, {}, "ffn_norm"),
    "transposed square weight": (weight_transposed, {}, "q"),
    "wrong RoPE base": (wrong_rotation, {}, "q_rotated"),
    "other RoPE pairing": (pairs_interleaved, {}, "q_rotated"),
    "eps": (eps_wrong, {}, "attention_norm"),
    "corrupted weight row": (row_corrupted, {}, "ffn.up"),
    "residual sum left out": (residual_missing, {}, "resid_out"),
    "bias missing": (bias_missing, {"qkv_bias": True}, "v"),
}


def built(changes):
    from stackproof.config import ModelConfig, SoftmaxAttention
    from stackproof.model.build import build_model
    from tests.export.models import stirred

    attention = SoftmaxAttention(qkv_bias=changes.get("qkv_bias", False))
    cfg = ModelConfig(**(models.BASE | {"n_layers": 3, "attention": attention, "tied_head": False}))
    return stirred(build_model(cfg, models.VOCAB, seed=5))


def planted(name):
    plant, changes, slot = PLANTS[name]
    good = built(changes)
    bad = copy.deepcopy(good)
    plant(bad)
    return good, bad, f"layers.{L}.{slot}"


@pytest.mark.parametrize("name", PLANTS)
def test_comparison_names_the_planted_operation_as_rank_1(name):
    good, bad, point = planted(name)
    found = compare(variant(good), variant(bad), models.ids())
    assert found.first_divergence is not None and found.first_divergence.point.name == point
    assert (
        found.suspects[0].point.operation == found.first_divergence.point.operation
        or found.suspects[0].point.name == point
    )
    others = {s.point.name for s in found.suspects} - {point}
    # queries and keys are rotated by one operation, and a scale is seen in all that scores make
    assert others <= {
        f"layers.{L}.{s}"
        for s in {"q_rotated": {"k_rotated"}, "scores": {"entropy", "attention_mixed"}}.get(
            PLANTS[name][2], ()
        )
    }
    assert all(
        c.arrived.rel_err == 0
        for c in found.points
        if c.point.order < found.first_divergence.point.order
    )
    clean = compare(variant(good), variant(copy.deepcopy(good)), models.ids())
    assert clean.first_divergence is None and clean.logits.rel_err == 0


@pytest.mark.parametrize("name", PLANTS)
def test_bisection_names_the_planted_operation_within_log_n_runs(name):
    good, bad, point = planted(name)
    found = bisect(variant(good), variant(bad), models.ids())
    # scores are seen and cannot be put right; the first point after them that can is what they make
    wanted = {
        f"layers.{L}.scores": [f"layers.{L}.attention_mixed"],
        f"layers.{L}.q_rotated": [f"layers.{L}.{x}_rotated" for x in "qk"],
    }
    assert [p.name for p in found.guilty] == wanted.get(point, [point])
    n = len([p for p in compare(variant(good), variant(bad), models.ids()).points if p.point.flows])
    assert found.runs <= 3 + math.ceil(math.log2(n)) * len(found.guilty) + (
        20 if len(found.guilty) > 1 else 0
    )
    assert {link.verdict for link in found.chain} == {"kept", "eliminated"}


def test_head_expansion_order_is_named():
    """Attention written by hand: the points inside it do not run,
    and the next one that does is named.
    """
    good = built({})
    bad = copy.deepcopy(good)
    heads_tiled(bad)
    found = compare(variant(good), variant(bad), models.ids())
    assert {
        c.note
        for c in found.points
        if c.point.layer == L and c.point.slot in ("scores", "attention_mixed")
    } == {MISSING}
    assert found.first_divergence.point.name == f"layers.{L}.attention_out"


def test_head_expansion_order_inside_the_kernel_is_named(monkeypatch):
    from stackproof.kernels import attention

    good, ids = built({}), models.ids()
    original, calls = attention.whole, []

    def tiled_in_layer_1(q, k, v, *, scale=None, chunks=False):
        calls.append(1)
        if (len(calls) - 1) % 3 == L and wrong:
            k, v = (t.repeat(1, q.shape[1] // k.shape[1], 1, 1) for t in (k, v))
        return original(q, k, v, scale=scale)

    from contextlib import contextmanager
    from dataclasses import replace

    wrong = False
    monkeypatch.setattr(attention, "whole", tiled_in_layer_1)

    @contextmanager
    def around():
        nonlocal wrong
        wrong = True
        try:
            yield
        finally:
            wrong = False

    bad = replace(variant(good), around=around)
    found = compare(variant(good), bad, ids)
    assert (
        found.first_divergence.point.name == f"layers.{L}.attention_mixed"
        and len(found.suspects) == 1
    )
    assert "head expansion" in found.first_divergence.point.operation
    assert [p.name for p in bisect(variant(good), bad, ids).guilty] == [
        f"layers.{L}.attention_mixed"
    ]


def test_two_sites_are_both_named_and_make_the_minimal_set():
    good = built({})
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[0].ffn.down.weight[3] += 0.5
        bad.layers[2].attention.v.weight[1] *= -1
    found = bisect(variant(good), variant(bad), models.ids())
    assert [p.name for p in found.guilty] == ["layers.0.ffn.out", "layers.2.v"]
    assert found.minimal_set == ("layers.0.ffn", "layers.2.attention")
    assert [
        s.point.name
        for s in sorted(
            compare(variant(good), variant(bad), models.ids()).suspects, key=lambda s: s.point.order
        )
    ] == [
        "layers.0.ffn.out",
        "layers.2.v",
    ]
    assert "forward" not in vars(bad.layers[0].ffn), "exchanged modules are put back"


def norm_passed_by(model):
    block = model.layers[L]
    block.forward = lambda x, reading: (
        (h := x + block.attention(block.attention_norm(x), reading)) + block.ffn(h, reading)
    )


def layer_passed_by(model):
    model.layers[L].forward = lambda x, *rest: x


@pytest.mark.parametrize(
    ("plant", "place"), [(norm_passed_by, "ffn_norm"), (layer_passed_by, "attention_norm")]
)
def test_a_module_that_is_passed_by_is_named_and_not_the_one_after_it(plant, place):
    good = built({})
    bad = copy.deepcopy(good)
    plant(bad)
    first = compare(variant(good), variant(bad), models.ids()).first_divergence
    assert first.point.name == f"layers.{L}.{place}" and first.note == MISSING
    assert compare(variant(bad), variant(good), models.ids()).first_divergence.note == MISSING_THERE


def test_another_way_to_the_same_numbers_is_no_fault():
    good = built({})
    other = copy.deepcopy(good)
    ffn = other.layers[L].ffn
    ffn.forward = lambda x, *reading: ffn.down(
        F.silu(F.linear(x, ffn.gate.weight)) * F.linear(x, ffn.up.weight)
    )
    found = compare(variant(good), variant(other), models.ids())
    assert found.first_divergence is None and [
        c.note for c in found.points if c.point.name == f"layers.{L}.ffn.gate"
    ] == [MISSING]


def test_the_head_alone():
    good = built({})
    bad = copy.deepcopy(good)
    head_row_corrupted(bad)
    assert (
        compare(variant(good), variant(bad), models.ids()).first_divergence.point.name == "logits"
    )
    assert [p.name for p in bisect(variant(good), variant(bad), models.ids()).guilty] == ["logits"]


def test_what_lies_beyond_the_points_looked_at_is_blamed_on_none_of_them():
    good = built({})
    bad = copy.deepcopy(good)
    head_row_corrupted(bad)
    for names in (["layers.*.ffn.out"], ["*.scores"]):
        found = bisect(variant(good), variant(bad), models.ids(), names=names)
        assert found.guilty == () and found.chain[-1].verdict == "eliminated", names
    swapped = bisect(
        variant(good), variant(bad), models.ids(), names=["layers.*.ffn.out", "logits"]
    )
    assert [p.name for p in swapped.guilty] == ["logits"]


def test_two_equal_sides_have_nothing_to_find():
    good = built({})
    found = bisect(variant(good), variant(copy.deepcopy(good)), models.ids())
    assert found.guilty == () and found.runs == 2 and found.chain[-1].verdict == "eliminated"


def test_a_criterion_of_the_users_own_decides():
    good, bad, point = planted("corrupted weight row")
    ids = models.ids()
    with torch.no_grad():
        right = good(ids)[0, -1].argmax()
        token = int(right)
        bad.layers[L].ffn.up.weight[3] += 30
        assert int(bad(ids)[0, -1].argmax()) != token
    found = bisect(
        variant(good), variant(bad), ids, check=lambda logits: int(logits[0, -1].argmax()) == token
    )
    assert [p.name for p in found.guilty] == [point] and found.tolerance is None


# ---- across libraries: the same folder, and a bug in the other library's copy


def their_rope_base(model):
    """All layers turn by another base: the first rotation is the first to err."""
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq**1.1


@torch.no_grad()
def their_transposed(model):
    weight = model.model.layers[L].self_attn.q_proj.weight
    weight.copy_(weight.T.clone())


def their_eps(model):
    model.model.layers[L].input_layernorm.variance_epsilon = 1e-3


@torch.no_grad()
def their_row(model):
    model.model.layers[L].mlp.down_proj.weight[3] += 0.5


def their_scale(model):
    model.model.layers[L].self_attn.scaling = 1.0


def their_heads(model):
    """Keys and values repeated for each query head, in the wrong order."""
    attention = model.model.layers[L].self_attn
    heads, width = model.config.num_key_value_heads, attention.head_dim
    for projection in (attention.k_proj, attention.v_proj):
        original = projection.forward
        projection.forward = lambda x, f=original: (
            f(x).unflatten(-1, (heads, width)).flip(-2).flatten(-2)
        )


THEIR_PLANTS = {
    "wrong RoPE base": (their_rope_base, ["layers.0.q_rotated", "layers.0.k_rotated"]),
    "transposed square weight": (their_transposed, [f"layers.{L}.q"]),
    "eps": (their_eps, [f"layers.{L}.attention_norm"]),
    "corrupted weight row": (their_row, [f"layers.{L}.ffn.out"]),
    "missing 1/√d": (their_scale, [f"layers.{L}.scores"]),
    "head order": (their_heads, [f"layers.{L}.k", f"layers.{L}.v"]),
}


@pytest.mark.parametrize("name", THEIR_PLANTS)
def test_a_bug_in_another_library_is_named_against_ours(name, tmp_path):
    """The clean pair of the two libraries is a test of its own, in test_compare.py."""
    from stackproof.export import reading

    plant, named = THEIR_PLANTS[name]
    theirs = models.theirs("smollm2")
    theirs.save_pretrained(tmp_path)
    ours = reading.load_weights(reading.open_folder(tmp_path))
    plant(theirs)
    found = compare(variant(ours), variant(theirs), models.ids())
    assert found.first_divergence.point.name == named[0] and found.suspects[0].point.name in named
    guilty = [p.name for p in bisect(variant(ours), variant(theirs), models.ids()).guilty]
    if name == "missing 1/√d":
        assert guilty == [f"layers.{L}.attention_mixed"]
    elif name == "wrong RoPE base":  # every layer is wrong: the first and the last rotation
        assert guilty == ["layers.0.q_rotated", "layers.1.k_rotated"]
    else:
        assert guilty == named


def unnormalised(model):
    """Probabilities of the chosen experts as they are."""
    gate = model.model.layers[L].mlp.gate
    original = gate.forward

    def forward(x):
        logits, _, chosen = original(x)
        return logits, logits.float().softmax(-1).gather(1, chosen), chosen

    gate.forward = forward


@torch.no_grad()
def one_expert_corrupted(model):
    model.model.layers[L].mlp.experts.down_proj[2] *= 1.01


@torch.no_grad()
def their_router(model):
    gate = model.model.layers[L].mlp.gate
    gate.weight[0] *= 1.01


@pytest.mark.parametrize(
    ("plant", "compared", "bisected"),
    [
        (unnormalised, "routing", "routing"),
        (one_expert_corrupted, "ffn.out", "ffn.out"),
        # what the module returns beside its weights is read by nobody
        (their_router, "router", "routing"),
    ],
)
def test_a_bug_in_the_experts_of_another_library_is_named_against_ours(
    plant, compared, bisected, tmp_path
):
    from stackproof.export import reading

    theirs = models.theirs("mixtral")
    theirs.save_pretrained(tmp_path)
    ours = reading.load_weights(reading.open_folder(tmp_path))
    assert compare(variant(ours), variant(theirs), models.ids()).first_divergence is None
    plant(theirs)
    assert (
        compare(variant(ours), variant(theirs), models.ids()).first_divergence.point.name
        == f"layers.{L}.{compared}"
    )
    assert [p.name for p in bisect(variant(ours), variant(theirs), models.ids()).guilty] == [
        f"layers.{L}.{bisected}"
    ]
