"""Gates of the tokenizer: green on the stack, red on what they are for."""

import pytest

from contracts.gate import call_check
from stack.config import ByteTokenizer, CharTokenizer
from stack.data.tokenizer import Chars, Encoding, train_tokenizer
from stack.museum.plant import PLANTS, load_museum
from tests.contracts.test_data import planted_verdict


@pytest.mark.parametrize("gate_id", ["tokenizer.round-trip", "tokenizer.pinning"])
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


@pytest.mark.parametrize("plant_id", [p.id for p in load_museum().values() if p.gate.startswith("tokenizer.")])
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    assert planted_verdict(spec, small_cfg, PLANTS[plant_id], tmp_path).outcome == "fail"


def test_round_trip_is_red_where_both_paths_take_a_literal_seriously(spec, ingredients):
    """Then batch and single agree, and only the control id itself gives it away."""
    gate = spec.gates["tokenizer.round-trip"]
    with PLANTS["tokenizer.special-from-text"].apply(), PLANTS["tokenizer.special-from-corpus"].apply():
        verdict = call_check(gate, ingredients)
    assert verdict.outcome == "fail" and "literal" in verdict.message


class Trimming(Forgetful):
    """A tokenizer whose batches lose the space at a text's end."""

    def decode(self, ids):
        return self._inner.decode(ids)

    def encode_batch(self, texts):
        return self._inner.encode_batch([t.rstrip() for t in texts])


def test_round_trip_compares_batches_with_single_texts(spec, ingredients):
    verdict = call_check(spec.gates["tokenizer.round-trip"], ingredients | {"tokenizer": Trimming(ingredients["tokenizer"])})
    assert verdict.outcome == "fail" and "batch" in verdict.message


@pytest.mark.parametrize("cfg", [CharTokenizer(), ByteTokenizer()], ids=["char", "byte"])
def test_round_trip_is_green_on_other_tokenizers_and_counts_what_they_drop(spec, ingredients, cfg):
    """A character tokenizer of plain English drops most of the hard texts, says how much, and keeps the rest in order."""
    tokenizer = train_tokenizer(cfg, ["the quick brown fox jumps over the lazy dog. "])
    gate = spec.gates["tokenizer.round-trip"]
    assert call_check(gate, ingredients | {"tokenizer": tokenizer}).outcome == "pass"
    if cfg.kind == "char":
        tokenizer.encode = lambda text: Encoding(Chars.encode(tokenizer, text).ids, 0)
        assert call_check(gate, ingredients | {"tokenizer": tokenizer}).outcome == "fail", "drops without counting"
