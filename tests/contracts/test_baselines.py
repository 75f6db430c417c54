"""The gate of baselines is red on each wrong model, and green on the stack's."""

from types import SimpleNamespace

import numpy as np
import pytest

from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject
from stackproof.evaluate.baselines import BASELINES, Bigram, tokens_of, unigram_probs
from stackproof.spec.formulas import bits_per_byte

UNIGRAM, BIGRAM = BASELINES


def verdict(spec, **changes):
    """The verdict where some baselines are replaced; None leaves one out."""
    functions = {name: f for name, f in (BASELINES | changes).items() if f is not None}
    evaluation = SimpleNamespace(
        baselines=lambda *parts: {name: f(*parts) for name, f in functions.items()}
    )
    return call_check(spec.gates["evaluation.baselines"], Subject(evaluation=evaluation))


def score(probs, labels, tokenizer):
    n_bytes = int(np.asarray(tokenizer.token_bytes)[labels].sum())
    return bits_per_byte(float(-np.log(probs).sum()), n_bytes)


def unsmoothed(train, validation, tokenizer):
    labels = tokens_of(validation)[1:]
    counts = np.bincount(tokens_of(train), minlength=tokenizer.vocab_size)
    return score(np.maximum(counts, 1e-9)[labels] / counts.sum(), labels, tokenizer)


def of_all_tokens(train, validation, tokenizer):
    labels = tokens_of(validation)
    probs = unigram_probs(tokens_of(train), tokenizer.vocab_size)
    return score(probs[labels], labels, tokenizer)


def backwards(train, validation, tokenizer):
    ids, model = tokens_of(validation), Bigram(tokens_of(train), tokenizer.vocab_size)
    return score(model.probs(ids[1:], ids[:-1]), ids[1:], tokenizer)


def of_the_training_split(train, validation, tokenizer):
    return BASELINES[BIGRAM](train, train, tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {UNIGRAM: unsmoothed},
        {UNIGRAM: of_all_tokens},
        {UNIGRAM: BASELINES[BIGRAM]},
        {UNIGRAM: lambda *parts: BASELINES[UNIGRAM](*parts) * (1 + 1e-8)},
        {UNIGRAM: lambda *parts: -BASELINES[UNIGRAM](*parts)},
        {UNIGRAM: lambda *parts: float("nan")},
        {BIGRAM: backwards},
        {BIGRAM: of_the_training_split},
        {BIGRAM: None},
    ],
    ids="unsmoothed all-tokens swapped slightly-off negated nan backwards training missing".split(),
)
def test_each_wrong_baseline_is_red(spec, changes):
    green = verdict(spec)
    assert green.passed and green.measured["baseline_rel_error"] < 1e-12
    assert green.measured["compared"] == 2
    red = verdict(spec, **changes)
    assert red.outcome == "fail" and next(iter(changes)) in red.message
