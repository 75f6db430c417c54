"""Evaluation: every byte once, the same score however it is cut, nothing left changed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import ModelConfig
from stackproof.contracts.conditions import ContractError
from stackproof.contracts.evaluation import UniformModel
from stackproof.data.tokenizer import Bytes, Chars
from stackproof.evaluate.bits_per_byte import (
    IGNORE_INDEX,
    evaluate_batches,
    evaluate_text,
    evaluate_tokens,
    evaluating,
    windows,
)
from stackproof.model.build import build_model
from stackproof.spec.errors import DataError

TINY = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=24,
    max_seq_len=20,
    dropout=0.1,
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_windows_score_every_token_but_the_first_exactly_once(n, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    rows = windows(range(100, 100 + n), seq_len=seq_len, stride=stride, pad_id=0)
    assert rows.labels[rows.labels != IGNORE_INDEX].tolist() == list(range(101, 100 + n))
    follows = rows.labels == rows.input_ids + 1
    assert bool((follows | (rows.labels == IGNORE_INDEX)).all())


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_batch_size_does_not_change_a_ragged_score(stride):
    model = build_model(TINY, 257, seed=3)
    one, eight = (
        evaluate_text(model, Bytes(), [TEXT, "x"], seq_len=16, stride=stride, batch_size=b)
        for b in (1, 8)
    )
    # float32 products of other shapes; measured 0 to 2e-8
    assert one.loss_nats == pytest.approx(eight.loss_nats, rel=1e-7)
    assert (
        (one.tokens, one.bytes, one.windows)
        == (eight.tokens, eight.bytes, eight.windows)
        == (len(TEXT) + 2, len(TEXT) + 1, one.windows)
    )


def test_context_makes_windows_with_overlap_agree_with_one_long_window():
    model = build_model(TINY, 257, seed=3)
    text = "abcdefghijklmnopqr"
    whole = evaluate_text(model, Bytes(), [text], seq_len=18, stride=18)
    assert whole.windows == 1
    by_hand = torch.tensor([[256, *text.encode()]])
    with evaluating(model):
        log_p = model(by_hand[:, :-1]).double().log_softmax(-1).gather(2, by_hand[:, 1:, None])
    assert whole.total_nats == pytest.approx(-float(log_p.sum()), rel=1e-7)


@pytest.mark.parametrize("vocab_size", [2, 27, 256, 50257])
def test_guessing_costs_log2_v_bits_per_character(vocab_size):
    tokenizer = SimpleNamespace(
        eos_id=0,
        token_bytes=np.ones(vocab_size, np.int32),
        encode=lambda t: SimpleNamespace(ids=[1] * len(t), dropped_chars=0),
    )
    result = evaluate_text(UniformModel(vocab_size), tokenizer, ["a" * 50], seq_len=16)
    assert result.bits_per_char == pytest.approx(math.log2(vocab_size), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from("ΩЖ漢")), max_size=9))
def test_unknown_characters_are_counted_and_change_no_score(insertions):
    alphabet = Chars("".join(sorted(set(TEXT))))
    dirty = TEXT
    for position, char in insertions:
        dirty = dirty[:position] + char + dirty[position:]
    model = build_model(TINY, alphabet.vocab_size, seed=3)
    clean, foreign = (evaluate_text(model, alphabet, [t], seq_len=16) for t in (TEXT, dirty))
    assert foreign.dropped_chars == len(insertions)
    assert foreign.dropped_bytes == sum(len(c.encode()) for _, c in insertions)
    assert (foreign.bits_per_byte, foreign.bits_per_char) == (
        clean.bits_per_byte,
        clean.bits_per_char,
    )


class _Scrambled(torch.nn.Module):
    """A byte model as a character model sees it: the same logits under another numbering."""

    def __init__(self, inner, ids):
        super().__init__()
        self.inner, self.ids = inner, torch.tensor(ids)

    def forward(self, ids_BT):
        return self.inner(self.ids[ids_BT]).index_select(2, self.ids)


def test_one_language_model_as_characters_and_as_bytes_has_one_score():
    class Model(torch.nn.Module):
        def forward(self, ids_BT):
            logits = torch.full((*ids_BT.shape, 257), -1e9)
            seen = torch.tensor([*sorted(set(TEXT.encode())), 256])
            logits[..., seen] = torch.sin(ids_BT[..., None] * 0.7 + seen * 1.3)
            return logits

    symbols = "".join(sorted(set(TEXT)))
    twin = _Scrambled(Model(), [*symbols.encode(), 256])
    as_bytes = evaluate_text(Model(), Bytes(), [TEXT], seq_len=16)
    as_chars = evaluate_text(twin, Chars(symbols), [TEXT], seq_len=16)
    # same numbers, other order of a float32 softmax
    assert as_chars.bits_per_byte == pytest.approx(as_bytes.bits_per_byte, rel=1e-6)


def test_sums_are_divided_once():
    model = build_model(TINY, 30, seed=3)
    ids = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[2, 1:] = IGNORE_INDEX
    batches = [
        SimpleNamespace(input_ids=ids[i : i + 1, :-1], labels=labels[i : i + 1]) for i in range(3)
    ]
    result = evaluate_batches(model, batches, np.arange(30))
    weights = [8, 8, 1]
    assert result.n_tokens == 17
    assert result.loss_nats == pytest.approx(
        sum(w * m for w, m in zip(weights, result.batch_nats)) / 17, rel=1e-12
    )
    assert result.n_bytes == int(labels[labels != IGNORE_INDEX].sum())
    assert result.bits_per_byte == pytest.approx(result.total_nats / math.log(2) / result.n_bytes)
    assert result.stderr_nats == pytest.approx(np.std(result.batch_nats, ddof=1) / 3**0.5)


def test_each_modules_own_mode_is_put_back_even_after_an_error():
    model = build_model(TINY, 30, seed=3)
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_nothing_to_score_is_an_error():
    model = build_model(TINY, 30, seed=3)
    empty = SimpleNamespace(
        input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.full((1, 4), IGNORE_INDEX)
    )
    with pytest.raises(DataError, match="no valid label"):
        evaluate_batches(model, [empty], np.ones(30))
    with pytest.raises(DataError, match="no token to score"):
        evaluate_tokens(model, [1], np.ones(30), seq_len=4, stride=2)
    with pytest.raises(DataError, match=r"no token|no character"):
        evaluate_text(build_model(TINY, 3, seed=1), Chars("ab"), ["ΩΩ"], seq_len=4)
    with pytest.raises(ContractError):
        evaluate_batches(model, [], np.ones(30))
    with pytest.raises(ContractError):
        evaluate_tokens(model, [1, 2], np.ones(30), seq_len=4, stride=5)
