"""Sizes of the recipes by arithmetic, and what follows from one dial."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import load_config
from stackproof.recipes import RECIPES, recipe
from stackproof.recipes.depth import EPOCHS, Corpus, corpus_of, depth, embedded
from stackproof.recipes.imported import imported
from stackproof.spec.errors import ConfigError, DataError
from stackproof.spec.formulas import flops_per_token, parameter_count
from stackproof.train.memory import predict_bytes


def by_hand(v, d, layers, q, kv, f, ffn_matrices, *, norms, extras=0, head=1):
    """Parameters written out: embedding and head, attention, feed-forward, norms,
    and what a recipe has besides.
    """
    return (
        head * v * d
        + layers * (2 * d * q + 2 * d * kv + ffn_matrices * d * f)
        + (2 * layers + 1) * norms
        + extras
    )


SIZES = {
    "pocket": by_hand(2048, 128, 4, 128, 64, 352, 3, norms=128, extras=4 * 2 * 32),
    "pocket-code": by_hand(2048, 128, 4, 128, 64, 352, 3, norms=128, extras=4 * 2 * 32),
    "tiny": by_hand(257, 128, 4, 128, 128, 352, 3, norms=128),
    "huge": by_hand(49_152, 256, 12, 256, 256, 688, 3, norms=256),
    "nanolm": by_hand(32_000, 256, 6, 256, 64, 256, 3, norms=256),
    "llama-370m": by_hand(49_152, 1024, 24, 1024, 256, 2816, 3, norms=1024, head=2),
    "gpt2-124m": by_hand(
        50_257,
        768,
        12,
        768,
        768,
        3072,
        2,
        norms=2 * 768,
        extras=1024 * 768 + 12 * (4 * 768 + 3072 + 768),
    ),
    "andrea-120m": by_hand(8449, 768, 12, 768, 768, 3072, 2, norms=768, extras=1024 * 768, head=2),
}
# the note's model has no gains
PUBLISHED = {"nanolm": 10_358_016, "gpt2-124m": 124_439_808, "andrea-120m": 98_698_752 + 25 * 768}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_parameters_its_name_says(name):
    cfg = recipe(name)
    vocab_size = getattr(cfg.data.tokenizer, "vocab_size", 257)
    assert (
        parameter_count(cfg.model.model_dump(), vocab_size)
        == SIZES[name]
        == PUBLISHED.get(name, SIZES[name])
    )
    assert cfg.recipe == name


# (FLOPs per token at the context length, predicted peak bytes, of which activations)
PREDICTED = {
    "pocket": (6782976, 169459482, 86245376),
    "pocket-code": (6782976, 169459482, 86245376),
    "tiny": (5800704, 247638579, 168296448),
    "huge": (141852672, 978616115, 233701376),
    "nanolm": (66846720, 825264333, 322961408),
    "llama-370m": (2227175424, 37155745792, 25803358208),
    "gpt2-124m": (797815296, 9489053594, 5788139520),
    "andrea-120m": (605164032, 5392192614, 2894069760),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_operations_and_the_memory_it_had(name):
    cfg = recipe(name)
    vocab_size, model = getattr(cfg.data.tokenizer, "vocab_size", 257), cfg.model.model_dump()
    parts = predict_bytes(cfg, vocab_size)
    found = (
        flops_per_token(model, vocab_size, cfg.model.max_seq_len),
        parts["peak"],
        parts["activations"],
    )
    assert found == PREDICTED[name]


def test_seeds_of_the_recipes():
    assert recipe("nanolm").train.max_steps * recipe("nanolm").train.tokens_per_step == 655_360_000
    huge = recipe("huge")
    assert (huge.model.n_layers, huge.model.d_model, huge.model.max_seq_len) == (12, 256, 512)
    assert huge.train.tokens_per_step // huge.train.micro_batch_size == 4 * 512
    assert (
        recipe("andrea-120m").optim.weight_decay == 0.01
        and recipe("andrea-120m").schedule.warmup_steps == 2000
    )


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="nanolm"):
        recipe("nano")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.sampled_from([1024, 8192, 50_257]), st.integers(10**5, 10**12))
def test_every_depth_is_a_valid_run_within_its_corpus(n_layers, vocab_size, unique_tokens):
    cfg = depth(n_layers, Corpus(vocab_size, unique_tokens))
    n_params = parameter_count(cfg.model.model_dump(), vocab_size)
    planned = cfg.train.max_steps * cfg.train.tokens_per_step
    assert planned <= max(20 * n_params, 40 * 2048) and (
        planned <= EPOCHS * unique_tokens or cfg.train.max_steps == 40
    )
    assert cfg.model.d_model == 64 * n_layers == cfg.model.n_heads * cfg.model.head_dim


def test_the_dial_makes_models_larger_and_steps_smaller():
    runs = [depth(n, Corpus(32_768, 10**12)) for n in range(1, 25)]
    counts = [parameter_count(r.model.model_dump(), 32_768) for r in runs]
    rates = [(r.optim.lr, r.optim.adamw_lr) for r in runs]
    assert counts == sorted(set(counts)) and rates == sorted(rates, reverse=True)
    assert all(
        r.train.dtype == r.optim.dtype == ("bfloat16" if n >= 8 else "float32")
        for n, r in enumerate(runs, 1)
    )


def test_at_its_width_the_dial_is_the_default_recipe():
    dial, swept = depth(2), recipe("pocket")
    assert (
        dial.optim == swept.optim
        and dial.model.attention == swept.model.attention
        and dial.data.tokenizer == swept.data.tokenizer
    )
    assert (dial.train.tokens_per_step, dial.train.micro_batch_size) == (
        swept.train.tokens_per_step,
        swept.train.micro_batch_size,
    )
    assert dial.schedule.model_copy(update={"warmup_steps": 10}) == swept.schedule
    assert dial.train.max_steps * 2048 == pytest.approx(
        EPOCHS * embedded(2).unique_tokens, rel=1e-3
    )


def test_the_embedded_text_has_tokens_enough_for_four_layers(spec):
    """By the limit of the gate; five layers are refused, and say so."""
    least = spec.gates["data.corpus-budget"].limits["unique_tokens_per_parameter_min"].value
    each = {
        n: embedded(n).unique_tokens
        / parameter_count(depth(n).model.model_dump(), embedded(n).vocab_size)
        for n in range(1, 6)
    }
    assert all(each[n] > least for n in range(1, 5)) and each[5] < least


def test_a_built_folder_tells_vocabulary_and_tokens(tmp_path, dataset):
    with pytest.raises(DataError, match="is not a built data set"):
        corpus_of(tmp_path)
    found = corpus_of(dataset.directory)
    assert found == Corpus(dataset.tokenizer.vocab_size, unique_tokens=dataset.train.n_tokens)


@pytest.mark.parametrize("name", ["tiny", "huge", "nanolm", "gpt2-124m", "andrea-120m"])
def test_a_model_from_elsewhere_is_trained_more_gently_than_one_from_scratch(name):
    """Less than half the rate the same model is begun with, fewer steps, a warm-up of a tenth of
    them. What a user sets goes before it.
    """
    scratch = recipe(name)
    gentle = imported(scratch.model, Path("tokenizer.json"))
    assert gentle.model == scratch.model and gentle.data.tokenizer.path == "tokenizer.json"
    assert (
        gentle.optim.lr < scratch.optim.lr / 2 and gentle.train.max_steps < scratch.train.max_steps
    )
    assert 0 < gentle.schedule.warmup_steps <= gentle.train.max_steps / 10
    changed, overrides = load_config(gentle, sets=("optim.lr=3e-3",))
    assert (
        changed.optim.lr == 3e-3
        and [o.key for o in overrides] == ["optim.lr"]
        and changed.schedule == gentle.schedule
    )
