"""Ablation and patching do to the model what they say: compared with models from which
the part was really taken.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackproof.evaluate.sampling import generate
from stackproof.spec.errors import UsageError
from stackproof.trace.maps import map_of
from stackproof.trace.patching import (
    Target,
    ablate,
    averaged,
    edited,
    means_of,
    patch,
    patched,
    targets,
    values_of,
    zeroed,
)
from stackproof.trace.points import sites
from stackproof.trace.trace import run
from tests.trace import models

KINDS = [
    ("ours", "plain"),
    ("ours", "experts"),
    ("ours", "differential"),
    ("theirs", "qwen3"),
    ("theirs", "gpt2"),
    ("theirs", "mixtral"),
]


class Nothing(nn.Module):
    """A branch that adds nothing, in the place of one that was removed."""

    def __init__(self, former):
        super().__init__()
        self.tuple = type(former).__name__.endswith("Attention") and type(
            former
        ).__module__.startswith("transformers")

    def forward(self, x=None, *rest, hidden_states=None, **options):
        zeros = torch.zeros_like(hidden_states if x is None else x)
        return (zeros, None) if self.tuple else zeros


def without(model, path):
    """A copy of the model with a branch really removed."""
    model = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Nothing(model.get_submodule(path)))
    return model


def only(model, text, n_tokens=17):
    (target,) = targets(model, [text], n_tokens)
    return target


@pytest.mark.parametrize(("side", "name"), KINDS)
@pytest.mark.parametrize("slot", ["attention_out", "ffn.out"])
def test_a_zeroed_branch_is_a_removed_branch_to_the_bit(side, name, slot):
    model, ids = getattr(models, side)(name).eval(), models.ids()
    path = next(
        s.place.path for s in sites(model, map_of(model)) if s.point.name == f"layers.1.{slot}"
    )
    target = only(model, f"layers.1.{slot}")
    with torch.no_grad():
        with edited(model, target, zeroed(target, 17)):
            zeroed_logits = run(model, ids)
        assert torch.equal(zeroed_logits, run(without(model, path), ids))
        assert not torch.equal(zeroed_logits, run(model, ids))


def test_a_whole_block_is_both_branches_and_the_loss_is_that_of_the_model_without_it():
    model, ids = models.ours("plain").eval(), models.ids()
    (effect,) = ablate(model, ids, targets(model, ["layers.0"], 17))
    assert effect.target.points == ("layers.0.attention_out", "layers.0.ffn.out")
    shorter = copy.deepcopy(model)
    shorter.layers = shorter.layers[1:]
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
            for m in (model, shorter)
        ]
    assert (
        effect.loss_nats == losses[1]
        and effect.delta_nats == losses[1] - losses[0]
        and abs(effect.delta_nats) > 1e-3
    )


def test_a_report_has_a_line_for_each_branch_of_each_block():
    model, ids = models.ours("plain").eval(), models.ids()
    found = ablate(
        model, ids, targets(model, ["layers.*.attention_out", "layers.*.ffn.out", "layers.*"], 17)
    )
    assert [e.target.text for e in found] == [
        *(f"layers.{i}.{s}" for s in ("attention_out", "ffn.out") for i in (0, 1)),
        "layers.0",
        "layers.1",
    ]
    assert len({e.loss_nats for e in found}) == 6 and all(e.kl_nats > 0 for e in found)


def test_the_mean_is_that_of_the_source_text_and_is_put_at_every_token():
    model, ids, other = models.ours("plain").eval(), models.ids(), models.ids(seed=9, tokens=11)
    target = only(model, "layers.1.ffn.out")
    held, _ = values_of(model, other, [target])
    with torch.no_grad():
        x = model.embed(other)
        context = model.forward_context(other)
        x = model.layers[0](x, context)
        block = model.layers[1]
        x = x + block.attention(block.attention_norm(x), context)
        own = block.ffn(block.ffn_norm(x)).double().mean((0, 1)).float()
    assert torch.equal(means_of(held)["layers.1.ffn.out"], own)
    seen = []
    with torch.no_grad(), edited(model, target, averaged(target, 17, means_of(held))):
        hook = model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
        hidden = []
        inner = model.layers[1].ffn_norm.register_forward_pre_hook(
            lambda m, a: hidden.append(a[0].clone())
        )
        run(model, ids)
        hook.remove(), inner.remove()
    assert torch.equal(seen[0], hidden[0] + own)
    by_mean = ablate(model, ids, [target], by="mean", source_ids_BT=other)[0]
    by_own = ablate(model, ids, [target], by="mean")[0]
    assert (
        len({by_mean.loss_nats, by_own.loss_nats, ablate(model, ids, [target])[0].loss_nats}) == 3
    )


@pytest.mark.parametrize(("side", "name"), KINDS)
def test_patching_in_the_texts_own_values_changes_nothing_at_any_point(side, name):
    model, ids = getattr(models, side)(name).eval(), models.ids()
    names = [s.point.name for s in sites(model, map_of(model)) if s.point.flows]
    assert len(names) > 12
    for effect in patch(model, ids, ids, [Target(n, (n,)) for n in names]):
        assert (
            effect.kl_nats == 0.0 and effect.delta_nats == 0.0 and effect.restored_frac is None
        ), effect.target.text


def test_patching_the_whole_stream_brings_the_other_text_back_and_more_layers_bring_more():
    """At the last position of the last layer nothing but the stream decides: all of it is restored,
    to the bit.
    """
    model = models.ours("plain").eval()
    ids, source = models.ids(rows=1), models.ids(rows=1, seed=4)
    effect = patch(model, ids, source, targets(model, ["layers.1.resid_out@-1"], 17))[0]
    with torch.no_grad():
        expected = run(model, source)[:, -1]
        target, (held, _) = (
            only(model, "layers.1.resid_out@-1"),
            values_of(model, source, targets(model, ["layers.1.resid_out"], 17)),
        )
        with edited(model, target, patched(target, 17, held, 17)):
            got = run(model, ids)
        assert torch.equal(got[:, -1], expected) and torch.equal(
            got[:, :-1], run(model, ids)[:, :-1]
        )
    assert effect.restored_frac == 1.0 and effect.top_after == (
        int(expected.argmax()),
        pytest.approx(float(expected.softmax(-1).max())),
    )
    part = patch(model, ids, source, targets(model, ["layers.1.ffn.out@-1"], 17))[0]
    assert part.restored_frac < 1.0 and part.restored_frac != 0.0


def test_texts_of_two_lengths_are_aligned_at_their_ends():
    model = models.ours("plain").eval()
    ids, source = models.ids(rows=1, tokens=9), models.ids(rows=1, tokens=14, seed=4)
    with torch.no_grad():
        expected = run(model, source)[:, -1]
    effect = patch(model, ids, source, targets(model, ["layers.1.resid_out@-1"], 9))[0]
    assert effect.restored_frac == 1.0 and effect.top_after[0] == int(expected.argmax())
    with pytest.raises(UsageError, match="two texts have different lengths"):
        patch(model, ids, source, targets(model, ["layers.1.resid_out"], 9))


def test_a_map_over_positions_has_one_cell_for_each_and_only_earlier_ones_matter_to_a_position():
    model, ids = models.ours("plain").eval(), models.ids(rows=1, tokens=6)
    found = ablate(model, ids, targets(model, ["layers.*.resid_out@*"], 6))
    assert [e.target.text for e in found] == [
        f"layers.{i}.resid_out@{p}" for i in (0, 1) for p in range(6)
    ]
    last = [e for e in found if e.target.points == ("layers.1.resid_out",)]
    assert [e.top_after != e.top_before for e in last] == [False] * 5 + [True], (
        "in the last layer no position reads another"
    )
    assert all(e.kl_nats > 0 for e in found)


def test_an_edit_at_a_position_leaves_the_others_alone():
    model, ids, seen = models.ours("plain").eval(), models.ids(), {}
    target = only(model, "layers.0.ffn.swiglu@2:5")
    with torch.no_grad(), edited(model, target, zeroed(target, 17)):
        hook = model.layers[0].ffn.down.register_forward_pre_hook(
            lambda m, a: seen.update(x=a[0].clone())
        )
        run(model, ids)
        hook.remove()
    x = seen["x"]
    zero = (x == 0).all(-1).all(0)
    assert zero.tolist() == [2 <= i < 5 for i in range(17)]


@pytest.mark.parametrize("new_tokens", [12, 80])
def test_a_sample_of_an_ablated_model_is_that_of_the_model_without_the_part(new_tokens):
    """With the cache, and with the copy that long samples are read from (80 tokens,
    beyond the context of 40).
    """
    model = models.ours("plain").eval()
    target = only(model, "layers.1.attention_out")
    prompt = models.ids(rows=1, tokens=5)[0].tolist()
    draw = lambda m: generate(  # noqa: E731
        m, prompt, max_new_tokens=new_tokens, generator=torch.Generator().manual_seed(1)
    )
    with edited(model, target, zeroed(target, None)):
        got = draw(model)
    removed = copy.deepcopy(model)
    nn.init.zeros_(removed.layers[1].attention.out.weight)
    assert got == draw(removed) and got != draw(model) and len(got) == new_tokens


def test_what_cannot_be_meant_is_refused():
    model = models.ours("experts").eval()
    for text, message in (
        ("layers.0.atention_out", "no point"),
        ("layers.7", "no point"),
        ("layers.0.ffn.out@x", "an invalid position"),
        ("layers.0.ffn.out@17", "no such position"),
        ("layers.0.ffn.out@5:3", "no such position"),
        ("layers.0.ffn.out@", "an invalid position"),
    ):
        with pytest.raises(UsageError, match=message):
            targets(model, [text], 17)
    expert = next(
        s.point.name for s in sites(model, map_of(model)) if s.point.slot.startswith("experts.")
    )
    with pytest.raises(UsageError, match="no value for each position"):
        ablate(model, models.ids(), targets(model, [f"{expert}@3"], 17))
    with pytest.raises(UsageError, match="computed beside"):
        ablate(model, models.ids(), targets(model, ["layers.0.scores"], 17))
    with pytest.raises(UsageError, match="no value for each position"):
        target = only(model, "layers.0.ffn.out@3")
        with edited(model, target, zeroed(target, None)):
            run(model, models.ids())


def test_positions_from_the_end_reach_the_end():
    assert Target("x", ("x",), (-3, 0)).within(10) == slice(7, 10) and Target(
        "x", ("x",), (-1, 0)
    ).within(10) == slice(9, 10)
    assert Target("x", ("x",), (-3, -1)).within(10) == slice(7, 9) and Target("x", ("x",)).within(
        10
    ) == slice(None)
