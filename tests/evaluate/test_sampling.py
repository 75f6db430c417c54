"""Sampling: seeds, filters, caches and windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import (
    DifferentialAttention,
    Gelu,
    HardCapacity,
    LayerNorm,
    LearnedPositions,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    SoftmaxAttention,
)
from stackproof.contracts.conditions import ContractError
from stackproof.evaluate.sampling import (
    COPY_PAYS_FROM_TOKENS,
    filtered_probs,
    generate,
    keep_top_k,
    keep_top_p,
    laid_out_for_rows,
    next_logits,
    penalise_repetition,
    pick,
    window_start,
)
from stackproof.model.build import build_model

TINY = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=24,
    max_seq_len=12,
    dropout=0.1,
    init_std=0.3,
)
TIED_LOGITS = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0]), min_size=2, max_size=12).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)
LOGITS = st.lists(st.floats(-8, 8), min_size=2, max_size=12).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)


@pytest.fixture(scope="module")
def model():
    return build_model(TINY, 40, seed=2)


def draw(model, seed=1, **options):
    return generate(
        model,
        [3, 1],
        **({"max_new_tokens": 30, "generator": torch.Generator().manual_seed(seed)} | options),
    )


def test_a_seed_is_a_text_and_the_model_stays_in_training_mode(model):
    state = torch.get_rng_state()
    assert draw(model) == draw(model) != draw(model, seed=2)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert len(draw(model)) == 30


def test_the_cache_changes_no_token_also_beyond_the_context(model):
    assert draw(model) == draw(model, use_cache=False)


def test_a_model_that_has_written_a_text_can_still_be_trained():
    fresh = build_model(TINY, 40, seed=2)
    draw(fresh, max_new_tokens=20)
    fresh(torch.tensor([[3, 1, 4]])).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in fresh.parameters())


def test_temperature_zero_follows_the_argmax(model):
    tokens = [3, 1]
    model.eval()
    while len(tokens) < 12:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    model.train()
    assert draw(model, temperature=0.0, generator=None, max_new_tokens=10) == tokens[2:]


def test_only_the_last_position_gets_logits_and_they_are_the_models(model):
    model.eval()
    with torch.no_grad():
        expected = model(torch.tensor([[3, 1, 4, 1, 5]]))[0, -1]
        copied, cache = next_logits(
            laid_out_for_rows(model, COPY_PAYS_FROM_TOKENS), [3, 1, 4, 1, 5], None, True
        )
        plain, _ = next_logits(model, [3, 1, 4, 1, 5], None, False)
    model.train()
    assert copied.shape == (40,) and cache.length == 5
    # Products with another order of their summands; measured worst 1.4e-06 on logits up to 3.6.
    torch.testing.assert_close(copied, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


def test_matrices_are_copied_by_columns_if_enough_tokens_pay_for_it(model):
    few, many = (
        laid_out_for_rows(model, n) for n in (COPY_PAYS_FROM_TOKENS - 1, COPY_PAYS_FROM_TOKENS)
    )
    assert few is model
    own, copied = dict(model.named_parameters()), dict(many.named_parameters())
    assert own.keys() == copied.keys() and many.head_weight is many.embed.weight
    for name, parameter in own.items():
        assert torch.equal(parameter, copied[name]) and copied[name] is not parameter
        assert parameter.ndim != 2 or copied[name].stride() == (1, parameter.shape[0])
    assert draw(model, max_new_tokens=COPY_PAYS_FROM_TOKENS)[:30] == draw(model)


@pytest.mark.parametrize(
    "variant",
    [
        {"tied_head": False, "norm": LayerNorm(), "ffn": Gelu()},
        {"positions": LearnedPositions()},
        {"attention": DifferentialAttention(qk_norm=True, qkv_bias=True)},
        {"ffn": MixtureOfExperts(n_experts=3), "attention": SoftmaxAttention(window=5)},
        {"depth": MixtureOfDepths(gate=HardCapacity())},
    ],
)
def test_every_kind_of_model_writes_the_same_from_the_copy(variant):
    built = build_model(TINY.model_copy(update=variant), 40, seed=2)
    assert draw(built, max_new_tokens=COPY_PAYS_FROM_TOKENS)[:24] == draw(built, max_new_tokens=24)


def test_end_of_text_ends_and_is_left_out(model):
    free = draw(model)
    assert draw(model, eos_id=free[5])[:5] == free[: free.index(free[5])][:5]
    assert free[5] not in draw(model, eos_id=free[5])


def test_impossible_arguments_are_refused(model):
    for bad in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"generator": None},
        {"repetition_penalty": 0.0},
    ):
        with pytest.raises(ContractError):
            draw(model, **bad)


def test_a_full_context_is_cut_to_its_half():
    assert [window_start(n, 0, 12) for n in (2, 12, 13)] == [0, 0, 7]
    assert window_start(18, 7, 12) == 7 and window_start(20, 7, 12) == 14


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(0, 14), st.floats(0.01, 1.0))
def test_filters_keep_exactly_their_sets(logits, k, p):
    kept = keep_top_k(logits, k).isfinite()
    assert int(kept.sum()) == (k if 0 < k < len(logits) else len(logits))
    assert bool((logits[kept].min() >= logits[~kept].max()) if (~kept).any() else True)
    nucleus, probs = keep_top_p(logits, p).isfinite(), logits.softmax(-1)
    mass = float(probs[nucleus].sum())
    assert mass >= p - 1e-12
    if nucleus.sum() > 1:  # without its least likely member the set would not reach p
        assert mass - float(probs[nucleus].min()) < p + 1e-12


@settings(max_examples=60, deadline=None)
@given(TIED_LOGITS, st.integers(1, 11), st.floats(0.01, 0.99))
def test_of_equal_logits_the_lower_ids_stay(logits, k, p):
    by_rank = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    assert keep_top_k(logits, k).isfinite().nonzero().flatten().tolist() == sorted(by_rank[:k])
    after_k = keep_top_k(logits, k)
    probs, mass, nucleus = after_k.softmax(-1).tolist(), 0.0, []
    for i in by_rank[:k]:
        if mass < p - 1e-12:
            nucleus.append(i)
        mass += probs[i]
    kept = set(keep_top_p(after_k, p).isfinite().nonzero().flatten().tolist())
    # A token that begins within rounding of p may fall on either side.
    assert kept ^ set(nucleus) <= {
        i for n, i in enumerate(by_rank[:k]) if abs(sum(probs[j] for j in by_rank[:n]) - p) <= 1e-12
    }


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_open_filters_are_the_identity(logits):
    assert torch.equal(keep_top_p(keep_top_k(logits, 0), 1.0), logits)
    assert torch.equal(filtered_probs(logits, temperature=1.0), logits.softmax(-1))
    assert torch.equal(penalise_repetition(logits, [0, 1], 1.0), logits)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 0.1, 0.5, 1.0]), min_size=1, max_size=8).filter(any),
    st.floats(0, 1),
)
def test_an_impossible_token_is_never_drawn(weights, u):
    probs = torch.tensor(weights, dtype=torch.float64)
    assert (
        float(
            probs[pick(probs, torch.tensor([0.0, u, 1 - 2**-53, 1.0], dtype=torch.float64))].min()
        )
        > 0
    )


def test_the_penalty_lowers_both_signs_and_repeats(model):
    assert penalise_repetition(torch.tensor([2.0, -2.0, 1.0]), [0, 1, 1], 2.0).tolist() == [
        1.0,
        -4.0,
        1.0,
    ]
    repeats = [
        30
        - len(
            set(
                draw(
                    model,
                    temperature=0.5,
                    repetition_penalty=p,
                    generator=torch.Generator().manual_seed(9),
                )
            )
        )
        for p in (1.0, 3.0)
    ]
    assert repeats[1] < repeats[0]
