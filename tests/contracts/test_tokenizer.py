"""Gates of the tokenizer: green on the stack, red on what they are for."""

import argparse
import inspect
import json
from pydoc_data import topics
from types import SimpleNamespace

import pytest

from stackproof.config import ByteTokenizer, CharTokenizer
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject
from stackproof.contracts.tokenizer import bpe_merges
from stackproof.data.tokenizer import Bpe, Chars, Encoding, make_tokenizer, train_bpe
from stackproof.museum import script
from stackproof.museum.plant import load_museum
from tests.contracts.test_data import With, planted_verdict
from tests.subjects import altered, changed

GATES = ("tokenizer.round-trip", "tokenizer.identity", "tokenizer.merges")


@pytest.mark.parametrize("gate_id", GATES)
def test_each_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


class Forgetful:
    """A tokenizer whose decode loses one double space."""

    def __init__(self, inner):
        self._inner = inner

    def decode(self, ids):
        return self._inner.decode(ids).replace("  ", " ", 1)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def round_trip(spec, subject, tokenizer):
    """The verdict on another tokenizer."""
    other = changed(subject, tokenizer={"tokenizer": tokenizer})
    return call_check(spec.gates["tokenizer.round-trip"], other)


def test_round_trip_is_red_on_one_lost_space(spec, subject):
    assert round_trip(spec, subject, Forgetful(subject.tokenizer.tokenizer)).outcome == "fail"


def identity(spec, subject, **parts):
    return call_check(spec.gates["tokenizer.identity"], changed(subject, **parts))


def test_identity_is_red_on_one_shard(spec, subject):
    splits = subject.corpus.splits
    splits |= {"validation": With(splits["validation"], tokenizer_sha256=["0" * 64])}
    verdict = identity(spec, subject, corpus={"splits": splits})
    assert verdict.outcome == "fail" and verdict.measured["wrong"] == 1


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("vocab_size", 383)])
def test_identity_is_red_on_a_manifest_of_another_tokenizer(spec, subject, key, value):
    manifest = subject.corpus.manifest
    other = manifest | {"tokenizer": manifest["tokenizer"] | {key: value}}
    verdict = identity(spec, subject, corpus={"manifest": other})
    assert verdict.outcome == "fail" and "manifest" in verdict.message


def test_identity_is_red_on_too_few_pins(spec, subject):
    one = {"train": With(subject.corpus.splits["train"], tokenizer_sha256=[])}
    verdict = identity(spec, subject, corpus={"splits": one})
    assert verdict.outcome == "fail" and verdict.measured["pins"] == 0


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"n_ids": 385}, "1 of the tokenizer's 385 ids have no row"),
        ({"special_ids": {"eos_token_id": (3, 4)}}, "eos_token_id is 3 in the tokenizer, 4 in"),
        ({"special_ids": {"eos_token_id": (3, [4, 5])}}, "special ids differ"),
        ({"special_ids": {"bos_token_id": (384, None)}}, "outside the embedding: bos_token_id 384"),
    ],
)
def test_identity_is_red_on_a_tokenizer_that_is_not_the_models(spec, subject, tokenizer, message):
    """Judged without shards, as of other trainers."""
    alone = Subject(tokenizer=altered(subject.tokenizer, **tokenizer), model=subject.model)
    verdict = call_check(spec.gates["tokenizer.identity"], alone)
    assert verdict.outcome == "fail" and message in verdict.message
    assert verdict.measured["judged"] == "model"


@pytest.mark.parametrize(
    ("n_ids", "n_rows", "outcome"),
    [(384, 384 + 1024, "pass"), (384, 384 + 1025, "fail"), (98_000, 100_000, "pass")],
)
def test_identity_allows_some_rows_without_an_id(spec, subject, n_ids, n_rows, outcome):
    """1,024 of them, or 2 percent where those are more."""
    wider = altered(subject.model, embedding=SimpleNamespace(weight=range(n_rows)))
    parts = {"tokenizer": altered(subject.tokenizer, n_ids=n_ids), "model": wider}
    assert call_check(spec.gates["tokenizer.identity"], Subject(**parts)).outcome == outcome


def test_identity_names_what_it_compared(spec, subject):
    """A part that is not offered leaves the other; without both there is no verdict."""
    gate, tokenizer = spec.gates["tokenizer.identity"], subject.tokenizer
    both, shards, model, neither = (
        call_check(gate, Subject(tokenizer=tokenizer, **parts))
        for parts in (
            {"corpus": subject.corpus, "model": subject.model},
            {"corpus": subject.corpus},
            {"model": subject.model},
            {},
        )
    )
    assert [v.measured["judged"] for v in (both, shards, model)] == [
        "shards and model",
        "shards",
        "model",
    ]
    assert neither.outcome == "not_run"
    assert "Corpus.splits" in neither.message and "Model.embedding" in neither.message


def test_identity_is_red_on_the_tokenizer_of_another_trainer(spec):
    """The script of the museum with its plant; green without."""
    assert script.verdict_of("tokenizer.identity")[0].measured["judged"] == "model"
    with load_museum()["tokenizer.foreign-too-large"].apply():
        verdict, step = script.verdict_of("tokenizer.identity")
    assert verdict.outcome == "fail" and step == 0 and "have no row" in verdict.message


@pytest.mark.parametrize(
    "plant_id",
    [p.id for p in load_museum().values() if p.gate in GATES and "script" not in p.edits[0].target],
)
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    assert planted_verdict(spec, small_cfg, load_museum()[plant_id], tmp_path).outcome == "fail"


def test_round_trip_is_red_where_both_paths_take_a_literal_seriously(spec, subject):
    """Then batch and single agree, and only the control id itself gives it away."""
    gate = spec.gates["tokenizer.round-trip"]
    with (
        load_museum()["tokenizer.special-from-text"].apply(),
        load_museum()["tokenizer.special-from-corpus"].apply(),
    ):
        verdict = call_check(gate, subject)
    assert verdict.outcome == "fail" and "literal" in verdict.message


def test_round_trip_is_red_on_a_tokenizer_that_lowers_case(spec, subject):
    """A foreign tokenizer may have a normaliser, and then its text does not survive."""
    inner = subject.tokenizer.tokenizer.inner
    saved = json.loads(inner.to_str())
    for normaliser, outcome in ((None, "pass"), ({"type": "Lowercase"}, "fail")):
        tokenizer = Bpe(type(inner).from_str(json.dumps(saved | {"normalizer": normaliser})))
        assert round_trip(spec, subject, tokenizer).outcome == outcome


def test_round_trip_covers_every_declared_control_token(spec, subject):
    """The museum's tokenizer declares <|user|> besides the end of text;
    a literal of it in a text is text.
    """
    tokenizer = subject.tokenizer.tokenizer
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

    verdict = round_trip(spec, subject, Obedient(tokenizer))
    assert verdict.outcome == "fail" and "literal" in verdict.message


class Trimming(Forgetful):
    """A tokenizer whose batches lose the space at a text's end."""

    def decode(self, ids):
        return self._inner.decode(ids)

    def encode_batch(self, texts):
        return self._inner.encode_batch([t.rstrip() for t in texts])


def test_round_trip_compares_batches_with_single_texts(spec, subject):
    verdict = round_trip(spec, subject, Trimming(subject.tokenizer.tokenizer))
    assert verdict.outcome == "fail" and "batch" in verdict.message


@pytest.mark.parametrize("cfg", [CharTokenizer(), ByteTokenizer()], ids=["char", "byte"])
def test_round_trip_is_green_on_other_tokenizers_and_counts_what_they_drop(spec, subject, cfg):
    """A character tokenizer of plain English drops most of the hard texts, reports how much, and
    keeps the rest in order.
    """
    tokenizer = make_tokenizer(cfg, ["the quick brown fox jumps over the lazy dog. "])
    assert round_trip(spec, subject, tokenizer).outcome == "pass"
    if cfg.kind == "char":
        tokenizer.encode = lambda text: Encoding(Chars.encode(tokenizer, text).ids, 0)
        assert round_trip(spec, subject, tokenizer).outcome == "fail", "drops without counting"


# --- merges ---------------------------------------------------------------------------------------


def test_merges_is_red_on_two_merges_swapped(spec, subject):
    """Anywhere among the first 48, and not beyond."""
    honest, gate = subject.tokenizer.trained_merges, spec.gates["tokenizer.merges"]

    def swapped(at):
        def trained(texts, n):
            merges = honest(texts, n + 2)
            merges[at], merges[at + 1] = merges[at + 1], merges[at]
            return merges

        return call_check(gate, changed(subject, tokenizer={"trained_merges": trained}))

    assert gate.limits["merges_min"].value == 48
    for at in (0, 20, 46):
        verdict = swapped(at)
        assert verdict.outcome == "fail" and f"merge {at} is" in verdict.message
    assert swapped(48).passed


def test_merges_is_red_on_one_merge_too_few(spec, subject):
    honest = subject.tokenizer.trained_merges
    short = {"trained_merges": lambda texts, n: honest(texts, n)[:-1]}
    verdict = call_check(spec.gates["tokenizer.merges"], changed(subject, tokenizer=short))
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
