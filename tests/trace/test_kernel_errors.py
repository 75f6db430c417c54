"""How an attention kernel errs is said in words where it errs in a usual way,
and nothing is said where it does not.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from stackproof.kernels import attention
from stackproof.museum.plant import swap
from stackproof.trace import compare, kernel_errors, variant
from stackproof.trace.kernel_errors import KNOWN_ERRORS, Kept, attend, known_error
from stackproof.trace.scores import Call
from tests.trace import models
from tests.trace.museum_sides import documents, prompt

SDPA = F.scaled_dot_product_attention


def kernel(q, k, v, mask, *, scale=None, tiled=False):
    """Attention as torch has it, with heads expanded here."""
    many = q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, many, 1, 1) if tiled else x.repeat_interleave(many, 1) for x in (k, v))
    return SDPA(q, k, v, attn_mask=mask, scale=scale)


def shifted(mask, by):
    """Whatever a query sees, and the next `by` keys."""
    for _ in range(by):
        mask = mask | F.pad(mask[..., :-1], (1, 0))
    return mask


ERRORS = {
    "scores are not scaled": lambda q, k, v, mask: kernel(q, k, v, mask, scale=1.0),
    "scores are scaled twice": lambda q, k, v, mask: kernel(q, k, v, mask, scale=1 / q.shape[-1]),
    "scores are multiplied by what they should be divided by": lambda q, k, v, mask: kernel(
        q, k, v, mask, scale=q.shape[-1] ** 0.5
    ),
    "each query sees the key after its own": lambda q, k, v, mask: kernel(
        q, k, v, shifted(mask, 1)
    ),
    "each query sees all keys": lambda q, k, v, mask: kernel(q, k, v, shifted(mask, k.shape[2])),
    "key heads are tiled where each should be repeated for its group": partial(kernel, tiled=True),
}
UNUSUAL = {
    "": lambda q, k, v, mask: kernel(q, k, v, mask, scale=0.9 * q.shape[-1] ** -0.5),
    "not a number": lambda q, k, v, mask: kernel(q, k, v, mask) * torch.nan,
}


def whole(error):
    def planted(q, k, v, *, scale=None, chunks=False):
        T, S = q.shape[2], k.shape[2]
        return error(q, k, v, torch.ones(T, S, dtype=torch.bool).tril(S - T))

    return planted


def planted(model, name, function, **changes):
    return replace(variant(model), around=lambda: swap(attention, name, function), **changes)


def test_there_is_an_error_here_for_each_way():
    assert set(KNOWN_ERRORS) == {
        *ERRORS,
        "queries see all keys before them, whatever the mask says",
    }


@pytest.mark.parametrize("way", ERRORS)
def test_a_usual_error_of_a_kernel_is_said_in_words(way):
    model = models.ours()
    found = compare(variant(model), planted(model, "whole", whole(ERRORS[way])), models.ids())
    assert (
        found.first_divergence.point.name == "layers.0.attention_mixed"
        and found.way == way
        and found.runs == 4
    )


@pytest.mark.parametrize("way", ERRORS)
def test_it_is_said_of_a_kernel_that_goes_on_from_a_cache(way):
    model = models.ours()
    inputs = partial(prompt, model)
    good, bad = (
        replace(variant(model), inputs=inputs),
        planted(model, "continued", whole(ERRORS[way]), inputs=inputs),
    )
    found = compare(good, bad, models.ids(tokens=5))
    assert found.first_divergence.point.name == "layers.0.attention_mixed" and found.way == way


def test_a_kernel_that_forgets_the_mask_it_is_given():
    model = models.ours()
    inputs = partial(documents, model)
    bad = planted(
        model,
        "document_attention",
        lambda q, k, v, mask, scale=None, chunks=False: attention.whole(q, k, v),
        inputs=inputs,
    )
    found = compare(replace(variant(model), inputs=inputs), bad, models.ids())
    assert found.first_divergence.point.name == "layers.0.attention_mixed"
    assert found.way == "queries see all keys before them, whatever the mask says"


@pytest.mark.parametrize("error", UNUSUAL.values(), ids=UNUSUAL)
def test_of_an_unusual_error_nothing_is_said(error):
    model = models.ours()
    found = compare(variant(model), planted(model, "whole", whole(error)), models.ids())
    assert (
        found.first_divergence.point.name == "layers.0.attention_mixed"
        and found.way == ""
        and found.runs == 4
    )


def test_nothing_is_said_where_another_operation_errs_first():
    good, bad = models.ours(), models.ours()
    with torch.no_grad():
        bad.layers[0].attention.v.weight[0] *= 2
    found = compare(
        variant(good), planted(bad, "whole", whole(ERRORS["scores are not scaled"])), models.ids()
    )
    assert found.first_divergence.point.name == "layers.0.v" and found.way == "" and found.runs == 3


def test_rows_too_long_to_hold_their_scores_are_not_tried(monkeypatch):
    model = models.ours()
    bad = planted(model, "whole", whole(ERRORS["scores are not scaled"]))
    monkeypatch.setattr(kernel_errors, "LARGEST", 4 * 17 * 17)
    assert compare(variant(model), bad, models.ids()).way == "scores are not scaled"
    monkeypatch.setattr(kernel_errors, "LARGEST", 4 * 17 * 17 - 1)
    assert compare(variant(model), bad, models.ids()).way == ""


@pytest.mark.parametrize("name", ["llama-3", "qwen2-window"])
def test_it_is_said_of_transformers_too(name, monkeypatch):
    """Their layer 1 alone; what torch's function is given there says nothing of the error."""
    model, calls = models.theirs(name), []

    def wrong(q, k, v, **options):
        calls.append(1)
        layer = (len(calls) - 1) % 2
        return SDPA(q, k, v, **options | ({"scale": 1.0} if layer == 1 else {}))

    bad = replace(variant(model), around=lambda: swap(F, "scaled_dot_product_attention", wrong))
    found = compare(variant(model), bad, models.ids())
    assert found.first_divergence.point.name == "layers.1.attention_mixed"
    assert found.way == "scores are not scaled"
    assert F.scaled_dot_product_attention is SDPA


def test_a_bias_on_the_scores_is_part_of_what_is_right():
    """As of distances: additive, a number for each pair.
    A kernel that is right has no way to err, and one without scale has this one.
    """
    draw = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, 6, 8, generator=draw) for n in (4, 2, 2))
    bias = (
        -torch.rand(1, 4, 6, 6, generator=draw).masked_fill(
            ~torch.ones(6, 6, dtype=torch.bool).tril(), 1e9
        )
        * 2
    )
    for dtype in (torch.float32, torch.float16):
        mask = bias.to(dtype).clamp(min=torch.finfo(dtype).min)
        call = Call(q, k, 8**-0.5, mask, False)
        right = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask.float()
        )
        assert torch.allclose(attend(Kept(call, v, right)).float(), right, atol=1e-5)
        assert known_error(Kept(call, v, attend(Kept(call, v, right)))) == "", "nothing is apart"
        assert (
            known_error(Kept(call, v, attend(Kept(call, v, right), scale=1.0).float()))
            == "scores are not scaled"
        )
