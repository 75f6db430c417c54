"""Gates of the tokenizer: green on the stack, red on what they are for."""

import argparse
import inspect
import json
from pydoc_data import topics

import pytest

from stackproof.config import ByteTokenizer, CharTokenizer
from stackproof.contracts.gate import call_check
from stackproof.contracts.tokenizer import bpe_merges
from stackproof.data.tokenizer import Bpe, Chars, Encoding, make_tokenizer, train_bpe
from stackproof.museum.plant import load_museum
from tests.contracts.test_data import planted_verdict


@pytest.mark.parametrize(
    "gate_id", ["tokenizer.round-trip", "tokenizer.pinning", "tokenizer.merges"]
)
def test_each_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message


class Forgetful:
    """A tokenizer whose decode loses one double space."""

    def __init__(self, inner):
        self._inner = inner

    def decode(self, ids):
        return self._inner.decode(ids).replace("  ", " ", 1)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_round_trip_is_red_on_one_lost_space(spec, ingredients):
    off = ingredients | {"tokenizer": Forgetful(ingredients["tokenizer"])}
    assert call_check(spec.gates["tokenizer.round-trip"], off).outcome == "fail"


class WithPin:
    def __init__(self, stream):
        self._stream, self.tokenizer_sha256 = stream, ["0" * 64]

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_pinning_is_red_on_one_shard(spec, ingredients):
    splits = ingredients["splits"] | {"validation": WithPin(ingredients["splits"]["validation"])}
    verdict = call_check(spec.gates["tokenizer.pinning"], ingredients | {"splits": splits})
    assert verdict.outcome == "fail" and verdict.measured["wrong"] == 1


@pytest.mark.parametrize(
    "plant_id",
    [
        p.id
        for p in load_museum().values()
        if p.gate in ("tokenizer.round-trip", "tokenizer.pinning", "tokenizer.merges")
    ],
)
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    assert planted_verdict(spec, small_cfg, load_museum()[plant_id], tmp_path).outcome == "fail"


def test_round_trip_is_red_where_both_paths_take_a_literal_seriously(spec, ingredients):
    """Then batch and single agree, and only the control id itself gives it away."""
    gate = spec.gates["tokenizer.round-trip"]
    with (
        load_museum()["tokenizer.special-from-text"].apply(),
        load_museum()["tokenizer.special-from-corpus"].apply(),
    ):
        verdict = call_check(gate, ingredients)
    assert verdict.outcome == "fail" and "literal" in verdict.message


def test_round_trip_is_red_on_a_tokenizer_that_lowers_case(spec, ingredients):
    """A foreign tokenizer may have a normaliser, and then its text does not survive."""
    saved = json.loads(ingredients["tokenizer"].inner.to_str())
    for normaliser, outcome in ((None, "pass"), ({"type": "Lowercase"}, "fail")):
        tokenizer = Bpe(
            type(ingredients["tokenizer"].inner).from_str(
                json.dumps(saved | {"normalizer": normaliser})
            )
        )
        assert (
            call_check(
                spec.gates["tokenizer.round-trip"], ingredients | {"tokenizer": tokenizer}
            ).outcome
            == outcome
        )


def test_round_trip_covers_every_declared_control_token(spec, ingredients):
    """The museum's tokenizer declares <|user|> besides the end of text;
    a literal of it in a text is text.
    """
    tokenizer = ingredients["tokenizer"]
    assert len(tokenizer.control_ids) == 2 and {
        tokenizer.literal(i) for i in tokenizer.control_ids
    } == {"<|endoftext|>", "<|user|>"}

    class Obedient(Forgetful):
        def decode(self, ids):
            return self._inner.decode(ids)

        def encode(self, text):
            user = next(i for i in self.control_ids if self.literal(i) == "<|user|>")
            return Encoding([user]) if text == "<|user|>" else self._inner.encode(text)

        def encode_batch(self, texts):
            return [self.encode(t) for t in texts]

    verdict = call_check(
        spec.gates["tokenizer.round-trip"], ingredients | {"tokenizer": Obedient(tokenizer)}
    )
    assert verdict.outcome == "fail" and "literal" in verdict.message


class Trimming(Forgetful):
    """A tokenizer whose batches lose the space at a text's end."""

    def decode(self, ids):
        return self._inner.decode(ids)

    def encode_batch(self, texts):
        return self._inner.encode_batch([t.rstrip() for t in texts])


def test_round_trip_compares_batches_with_single_texts(spec, ingredients):
    verdict = call_check(
        spec.gates["tokenizer.round-trip"],
        ingredients | {"tokenizer": Trimming(ingredients["tokenizer"])},
    )
    assert verdict.outcome == "fail" and "batch" in verdict.message


@pytest.mark.parametrize("cfg", [CharTokenizer(), ByteTokenizer()], ids=["char", "byte"])
def test_round_trip_is_green_on_other_tokenizers_and_counts_what_they_drop(spec, ingredients, cfg):
    """A character tokenizer of plain English drops most of the hard texts, says how much,
    and keeps the rest in order.
    """
    tokenizer = make_tokenizer(cfg, ["the quick brown fox jumps over the lazy dog. "])
    gate = spec.gates["tokenizer.round-trip"]
    assert call_check(gate, ingredients | {"tokenizer": tokenizer}).outcome == "pass"
    if cfg.kind == "char":
        tokenizer.encode = lambda text: Encoding(Chars.encode(tokenizer, text).ids, 0)
        assert call_check(gate, ingredients | {"tokenizer": tokenizer}).outcome == "fail", (
            "drops without counting"
        )


# --- merges ---------------------------------------------------------------------------------------


def test_merges_is_red_on_two_merges_swapped(spec, ingredients):
    """Anywhere among the first 48, and not beyond."""
    honest, gate = ingredients["trained_merges"], spec.gates["tokenizer.merges"]

    def swapped(at):
        def trained(texts, n):
            merges = honest(texts, n + 2)
            merges[at], merges[at + 1] = merges[at + 1], merges[at]
            return merges

        return call_check(gate, ingredients | {"trained_merges": trained})

    assert gate.limits["merges_min"].value == 48
    for at in (0, 20, 46):
        verdict = swapped(at)
        assert verdict.outcome == "fail" and f"merge {at} is" in verdict.message
    assert swapped(48).passed


def test_merges_is_red_on_one_merge_too_few(spec, ingredients):
    honest = ingredients["trained_merges"]
    verdict = call_check(
        spec.gates["tokenizer.merges"],
        ingredients | {"trained_merges": lambda texts, n: honest(texts, n)[:-1]},
    )
    assert verdict.outcome == "fail" and "47 of 48" in verdict.message


@pytest.mark.parametrize(
    ("texts", "merges"),
    [
        # pairs may overlap when they are counted, and are merged from the left
        (["aaaa"], [(b"a", b"a"), (b"aa", b"aa")]),
        # a blank's stand-in comes after letters
        (["ab ab cd"], [(b"a", b"b"), (b"c", b"d"), (b" ", b"ab"), (b" ", b"cd")]),
        (["don't don't"], [(b"'", b"t"), (b"d", b"o"), (b"do", b"n"), (b" ", b"don")]),
    ],
)
def test_oracle_and_trainer_count_as_by_hand(texts, merges):
    assert bpe_merges(texts, len(merges)) == merges == train_bpe(257 + len(merges), texts).merges()


def test_a_thousand_merges_of_50_kb_are_those_of_the_readable_trainer():
    """English and code of the standard library: every merge, in the same order, ties included."""
    text = (
        "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:25_000]
        + inspect.getsource(argparse)[:25_000]
    )
    texts = text.split("\n\n")
    assert (
        len(text.encode()) >= 50_000 and bpe_merges(texts, 1000) == train_bpe(1257, texts).merges()
    )
