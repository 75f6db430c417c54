"""Gates of the corpus: green on the stack, red on what they are for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stackproof.config import (
    BestFit,
    ByteTokenizer,
    Concatenated,
    DataConfig,
    ExactDedup,
    Files,
    HashSplit,
    Pangram,
    TailSplit,
)
from stackproof.contracts.corpus import GOOD, PLANTED, SENTENCES
from stackproof.contracts.corpus import packing as check
from stackproof.contracts.gate import call_check, limits_of
from stackproof.data import filters
from stackproof.data.prepare import prepare
from stackproof.data.subject import GramScanner, data_set_subject
from stackproof.museum.collection import QUESTIONS
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.subject.assemble import subject_of
from tests.contracts.test_data import With, with_splits
from tests.subjects import changed

GATES = ["corpus.filters", "corpus.no-repeats", "corpus.decontamination", "corpus.packing"]
UNFIT = "region " * 60


@pytest.mark.parametrize("gate_id", GATES)
def test_each_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("plant_id", [p.id for p in load_museum().values() if p.gate in GATES])
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        dataset = prepare(small_cfg.data, cache_dir=tmp_path)
        subject = subject_of(small_cfg, dataset, torch.device("cpu"))
        verdict = call_check(spec.gates[plant.gate], subject)
    assert verdict.outcome == "fail" and verdict.message and touches() > before
    assert plant.id in spec.gates[plant.gate].plants


def test_the_museum_can_show_what_the_gates_look_for(small_cfg, subject):
    """Documents for every reason, a chat with a system prompt, near repeats, an evaluation set,
    and packed rows.
    """
    manifest = subject.corpus.manifest
    dropped = {reason for s in manifest["sources"] for reason in s["receipt"]["dropped"]}
    assert {
        "exact-repeat",
        "near-repeat",
        "in-evaluation-set",
        "system-prompt",
        "low-diversity",
        "repetition",
    } <= dropped
    assert manifest["decontamination"] and isinstance(small_cfg.data.packing, BestFit)


def judge(gate_id, spec, subject, **corpus):
    """The verdict on a corpus in which some members are others."""
    return call_check(spec.gates[gate_id], changed(subject, corpus=corpus))


# --- filters --------------------------------------------------------------------------------------


def fifty(folder, unfit):
    """A data set of fifty documents, `unfit` of which the filters would have rejected."""
    texts = [
        f"Entry {n} of the harbour book. {SENTENCES[n % 17]} {SENTENCES[(n * 5 + 1) % 17]}"
        for n in range(50 - unfit)
    ]
    (folder / "book.jsonl").write_text(
        "".join(
            json.dumps({"text": t}) + "\n"
            for t in [*texts, *[UNFIT + str(i) for i in range(unfit)]]
        )
    )
    cfg = DataConfig(
        corpus=Files(paths=(str(folder / "book.jsonl"),)),
        tokenizer=ByteTokenizer(),
        split=HashSplit(validation_frac=0.05),
    )
    original = filters.reason_to_drop
    with swap(
        filters,
        "reason_to_drop",
        lambda text, *rest: None if UNFIT in text else original(text, *rest),
    ):
        return prepare(cfg, cache_dir=folder / "cache")


def test_filters_are_red_on_one_bad_document_in_fifty(spec, subject, tmp_path):
    for unfit in (0, 1):
        (tmp_path / str(unfit)).mkdir()
        dataset = fifty(tmp_path / str(unfit), unfit)
        assert dataset.manifest["corpus"]["documents"] == 50
        in_training = sum(UNFIT in text for _, text in dataset.sample_documents(1.0, 1))
        verdict = call_check(spec.gates["corpus.filters"], data_set_subject(dataset, 8))
        assert in_training == unfit and verdict.outcome == ("fail" if unfit else "pass"), (
            verdict.message
        )
        # Of fifty documents about one in twenty is held out, so the share lies around one in 48.
        assert verdict.measured["rejected_frac"] == pytest.approx(
            unfit / verdict.measured["refiltered_documents"]
        )


def with_receipt(manifest, number, **receipt):
    """A manifest in which the receipt of one source is another."""
    sources = [dict(s) for s in manifest["sources"]]
    sources[number] |= {"receipt": {**sources[number]["receipt"], **receipt}}
    return manifest | {"sources": sources}


@pytest.mark.parametrize("unit", ["documents", "bytes"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_filters_are_red_on_a_receipt_that_is_off_by_one(spec, subject, unit, side):
    manifest, key = subject.corpus.manifest, f"{unit}_{side}"
    off = with_receipt(manifest, 1, **{key: manifest["sources"][1]["receipt"][key] + 1})
    verdict = judge("corpus.filters", spec, subject, manifest=off)
    assert verdict.outcome == "fail" and verdict.measured["source"] == "objects"


@pytest.mark.parametrize(
    "passed_over", [{"number": 2, "example": ""}, {"number": 0, "example": "a"}]
)
def test_filters_are_red_on_a_number_of_files_that_its_example_contradicts(
    spec, subject, passed_over
):
    manifest = subject.corpus.manifest
    sources = [dict(s) for s in manifest["sources"]]
    sources[1]["files_passed_over"] = passed_over
    verdict = judge("corpus.filters", spec, subject, manifest=manifest | {"sources": sources})
    assert verdict.outcome == "fail" and verdict.measured["source"] == "objects"


@pytest.mark.parametrize("stated", [None, [], ["canary text"], ["questions.jsonl", "b.jsonl"]])
def test_the_evaluation_sets_are_those_that_are_declared(spec, subject, stated):
    manifest = subject.corpus.manifest
    held = manifest["decontamination"]
    sets = [held["sets"][0] | {"path": path} for path in stated or ()]
    other = None if stated is None else held | {"sets": sets}
    off = judge(
        "corpus.decontamination", spec, subject, manifest=manifest | {"decontamination": other}
    )
    assert off.outcome == "fail" and "are stated as" in off.message
    assert judge("corpus.decontamination", spec, subject, manifest=dict(manifest)).passed


@pytest.mark.parametrize("split", ["train", "validation"])
def test_filters_are_red_on_tokens_of_a_source_that_are_not_those_of_its_shards(
    spec, subject, split
):
    manifest = subject.corpus.manifest
    sources = [dict(s) for s in manifest["sources"]]
    sources[1]["tokens"] = sources[1]["tokens"] | {split: sources[1]["tokens"][split] - 1}
    verdict = judge("corpus.filters", spec, subject, manifest=manifest | {"sources": sources})
    assert verdict.outcome == "fail" and verdict.measured["source"] == "objects"
    assert judge("corpus.filters", spec, subject, manifest=dict(manifest)).passed


def test_filters_are_red_on_one_byte_that_is_in_no_shard(spec, subject):
    manifest = subject.corpus.manifest
    for split in ("train", "validation"):
        entry = manifest["splits"][split]
        short = manifest | {
            "splits": manifest["splits"] | {split: entry | {"bytes": entry["bytes"] - 1}}
        }
        verdict = judge("corpus.filters", spec, subject, manifest=short)
        assert verdict.outcome == "fail" and "bytes passed the filters" in verdict.message
        declared = manifest | {
            "splits": manifest["splits"]
            | {split: entry | {"bytes": entry["bytes"] - 3, "dropped_chars": 1}}
        }
        assert judge("corpus.filters", spec, subject, manifest=declared).passed


@pytest.mark.parametrize("keeps", [1, 2, 3])
def test_filters_are_red_on_a_converter_that_lets_a_prompt_stand_as_the_users(spec, subject, keeps):
    """By the number of turns: a lone prompt, a prompt that the rules take for a chat, two user
    turns, an assistant first.
    """
    honest = subject.corpus.chat_text
    lax = lambda turns: (  # noqa: E731
        honest(turns) or (" ".join(t["content"] for t in turns) if len(turns) == keeps else None)
    )
    verdict = judge("corpus.filters", spec, subject, chat_text=lax)
    assert verdict.outcome == ("pass" if keeps == 2 else "fail")


def test_filters_are_red_where_fewer_documents_are_shipped_than_passed(spec, subject):
    """The receipt adds up, and yet a document is missing from the shards."""
    manifest = subject.corpus.manifest
    receipt = manifest["sources"][0]["receipt"]
    off = with_receipt(
        manifest,
        0,
        documents_in=receipt["documents_in"] + 1,
        documents_out=receipt["documents_out"] + 1,
    )
    verdict = judge("corpus.filters", spec, subject, manifest=off)
    assert verdict.outcome == "fail" and "are in the shards" in verdict.message


def test_filters_are_red_on_a_source_that_is_declared_synthetic(spec, subject):
    manifest = subject.corpus.manifest
    sources = [dict(s) for s in manifest["sources"]]
    sources[2]["languages"] = [Pangram.languages[0]]
    verdict = judge("corpus.filters", spec, subject, manifest=manifest | {"sources": sources})
    assert verdict.outcome == "fail" and "synthetic" in verdict.message


def test_filters_are_red_on_a_source_of_which_nothing_is_judged(spec, subject):
    honest = subject.corpus.sample_documents
    silent = lambda frac, least: (d for d in honest(frac, least) if d[0] != "tools")  # noqa: E731
    verdict = judge("corpus.filters", spec, subject, sample_documents=silent)
    assert verdict.outcome == "fail" and "tools" in verdict.message


@pytest.mark.parametrize("rule", sorted({reason for reason, _, _ in PLANTED if reason}))
def test_filters_are_red_where_one_rule_is_blind(spec, subject, rule):
    assert rule in filters.RULES
    blind = {
        name: unfit if name != rule else lambda text, languages, limit: False
        for name, unfit in filters.RULES.items()
    }
    with swap(filters, "RULES", blind):
        verdict = call_check(spec.gates["corpus.filters"], subject)
    assert verdict.outcome == "fail" and rule in verdict.message


@pytest.mark.parametrize("rule", sorted({reason for reason, _, _ in PLANTED if reason}))
def test_filters_are_red_on_a_corpus_built_without_a_rule(spec, subject, rule):
    manifest = subject.corpus.manifest
    built = manifest["filters"] | {"rules": [r for r in manifest["filters"]["rules"] if r != rule]}
    verdict = judge("corpus.filters", spec, subject, manifest=manifest | {"filters": built})
    assert verdict.outcome == "fail" and rule in verdict.message


def test_a_filter_that_rejects_all_is_red_too(spec, subject):
    rejection = lambda text, languages: "too-short"  # noqa: E731
    verdict = judge("corpus.filters", spec, subject, rejection=rejection)
    assert verdict.outcome == "fail" and verdict.measured["wrong_plants"] > 6


# --- repeats --------------------------------------------------------------------------------------


def test_no_repeats_is_red_on_one_repeat(spec, subject):
    """Within a split, and over both."""
    gate, splits = spec.gates["corpus.no-repeats"], subject.corpus.splits
    train, held_out = splits["train"].document_hashes, splits["validation"].document_hashes
    for again in (train[3], held_out[3]):
        off = With(splits["train"], document_hashes=np.append(train, again))
        verdict = call_check(gate, with_splits(subject, train=off))
        assert verdict.outcome == "fail" and verdict.measured["repeated"] == 1
    assert call_check(gate, subject).measured["repeated"] == 0


def test_halves_of_a_tail_split_that_are_alike_are_no_repeats(spec, small_cfg, tmp_path):
    """Documents that differ in their end alone, one too short to have a tail among them; and one
    document that is there twice.
    """
    forms = [f"{GOOD} Form number {n}" for n in range(9)]
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": t}) + "\n"
            for t in [*forms, "A note of thirty-two characters.", *SENTENCES]
        )
    )
    split = TailSplit(validation_frac=0.01)
    cfg = small_cfg.data.model_copy(
        update={
            "corpus": Files(paths=(str(tmp_path / "a.jsonl"),)),
            "split": split,
            "dedup": ExactDedup(),
            "packing": Concatenated(),
        }
    )
    dataset = prepare(cfg, cache_dir=tmp_path / "c")
    subject = data_set_subject(dataset, 8)
    assert len(dataset.train.document_hashes) > len(dataset.validation.document_hashes)
    gate, hashes = spec.gates["corpus.no-repeats"], dataset.train.document_hashes
    assert call_check(gate, subject).passed
    again = With(dataset.train, document_hashes=np.append(hashes, hashes[0]))
    assert call_check(gate, with_splits(subject, train=again)).measured["repeated"] == 1


def test_no_repeats_is_red_where_unlike_documents_are_struck(spec, subject):
    off = lambda texts: [False] + [True] * (len(texts) - 1)  # noqa: E731
    assert judge("corpus.no-repeats", spec, subject, near_repeats=off).outcome == "fail"


# --- evaluation sets ------------------------------------------------------------------------------


def test_decontamination_is_red_on_one_evaluation_text(spec, subject):
    """Thirteen words of a question inside one document are enough, twelve are not."""
    words, honest = QUESTIONS[0].split(), subject.corpus.sample_documents
    for length, outcome in ((13, "fail"), (12, "pass")):
        text = f"{GOOD} {' '.join(words[:length]).upper()}! {GOOD}"

        def tainted(frac, least, text=text):
            return [*honest(frac, least), ("tools", text)]

        verdict = judge("corpus.decontamination", spec, subject, sample_documents=tainted)
        assert verdict.outcome == outcome and verdict.measured["contaminated"] == (length == 13)


def test_decontamination_is_red_on_stored_runs_of_something_else(spec, subject):
    honest = subject.corpus.contamination_scanner
    grams = np.asarray(honest(None).grams)
    others = honest(SENTENCES[8:]), GramScanner(np.append(grams, grams[-1] + np.uint64(1)))
    for other in others:
        scanner = lambda texts, other=other: other if texts is None else honest(texts)  # noqa: E731
        verdict = judge("corpus.decontamination", spec, subject, contamination_scanner=scanner)
        assert verdict.outcome == "fail"


def test_decontamination_is_red_on_a_set_that_is_mostly_too_short_to_be_found(spec, subject):
    declared = subject.corpus.manifest["decontamination"]
    for n, outcome in ((200, "fail"), (100, "pass")):
        sets = [declared["sets"][0] | {"records": n, "records_kept_out": 50}]
        manifest = subject.corpus.manifest | {"decontamination": declared | {"sets": sets}}
        verdict = judge("corpus.decontamination", spec, subject, manifest=manifest)
        assert verdict.outcome == outcome


def test_decontamination_is_red_on_a_scanner_that_sees_it_everywhere(spec, subject):
    everywhere = SimpleNamespace(n_grams=1, finds=lambda text: True)
    scanner = {"contamination_scanner": lambda texts: everywhere}
    verdict = judge("corpus.decontamination", spec, subject, **scanner)
    assert verdict.outcome == "fail" and verdict.measured["canary_found"] is False


# --- packing --------------------------------------------------------------------------------------


def packing(spec, subject, stream):
    """The verdict on another training split."""
    return call_check(spec.gates["corpus.packing"], with_splits(subject, train=stream))


def judged(spec, subject, stream, change):
    """The verdict on a stream whose row 3 is changed; its place among the rows of a call varies."""

    def rows(numbers, seq_len):
        made = stream.rows(numbers, seq_len)
        for at in np.flatnonzero(np.asarray(numbers) == 3):
            made = change(made, int(at))
        return made

    return packing(spec, subject, With(stream, rows=rows))


def replaced(rows, key, at, value):
    array = getattr(rows, key).copy()
    array[at] = value
    return replace(rows, **{key: array})


@pytest.fixture(params=[BestFit(), Concatenated()], ids=lambda how: how.kind)
def row_stream(request, small_cfg):
    return prepare(small_cfg.data.model_copy(update={"packing": request.param})).train


def test_packing_is_red_on_one_lost_token(spec, subject, row_stream):
    whole = judged(spec, subject, row_stream, lambda rows, at: rows)
    lost = judged(
        spec, subject, row_stream, lambda rows, at: replaced(rows, "labels", (at, 0), -100)
    )
    assert whole.outcome == "pass" and whole.measured["unaccounted"] == 0
    assert lost.outcome == "fail" and lost.measured["unaccounted"] == 1


def test_packing_is_red_on_rows_that_come_twice_where_others_never_do(spec, subject, row_stream):
    """Every second row is read twice: numbers of labels are as declared."""
    twice = With(row_stream, rows=lambda numbers, seq_len: row_stream.rows(numbers & ~1, seq_len))
    if row_stream.n_windows(288) % 2:
        twice.n_windows = lambda seq_len: row_stream.n_windows(seq_len) - 1
        twice.dropped_tokens = lambda seq_len: row_stream.dropped_tokens(seq_len) + 288
    verdict = packing(spec, subject, twice)
    assert verdict.outcome == "fail" and verdict.measured["unaccounted"]


def test_packing_is_red_on_one_label_that_is_not_the_next_token(spec, subject, row_stream):
    verdict = judged(
        spec,
        subject,
        row_stream,
        lambda rows, at: replaced(rows, "labels", (at, 2), rows.labels[at, 2] ^ 1),
    )
    assert (
        verdict.outcome == "fail"
        and "1 place(s) have another label than the next token" in verdict.message
    )


def test_packing_is_red_on_rows_that_are_declared_as_dropped(spec, subject, row_stream):
    """The declared remainder is what fills no row, and not one row more."""
    whole, honest = row_stream.n_windows(288), row_stream.dropped_tokens(288)
    for n_cut, outcome in ((8, "fail"), (1, "fail"), (0, "pass")):
        cut = np.arange(whole - n_cut, whole)
        lost = honest + int((row_stream.rows(cut, 288).labels != -100).sum())
        shorter = With(
            row_stream,
            n_windows=lambda seq_len, n=whole - n_cut: n,
            dropped_tokens=lambda seq_len, lost=lost: lost,
        )
        verdict = packing(spec, subject, shorter)
        assert verdict.measured["unaccounted"] == 0 and verdict.outcome == outcome
        assert ("fill no row" in verdict.message) == bool(n_cut)


@pytest.mark.parametrize("more", [-1, 1])
def test_packing_is_red_on_another_padding_than_the_rows_have(spec, subject, row_stream, more):
    padding = row_stream.padding(288)
    other = With(row_stream, padding=lambda seq_len: padding + more)
    verdict = packing(spec, subject, other)
    assert verdict.outcome == "fail"
    assert f"{padding + more} positions are declared as padding" in verdict.message


@pytest.mark.parametrize("more", [-288, -1, 1, 288])
def test_packing_is_red_on_another_padding_where_a_part_of_the_rows_is_read(
    spec, subject, row_stream, more
):
    gate, seq_len = spec.gates["corpus.packing"], subject.data_loader.seq_len
    limits = limits_of(gate)
    limits.labels_judged_max = 3 * seq_len
    padding = row_stream.padding(seq_len)

    def verdict(**members):
        return check(limits, with_splits(subject, train=With(row_stream, **members)))

    whole = verdict()
    assert whole.passed and whole.measured["rows"] == 3 < row_stream.n_windows(seq_len)
    red = verdict(padding=lambda seq_len: padding + more)
    assert red.outcome == "fail" and f"{padding + more} positions are declared" in red.message
    empty = (row_stream.rows(np.arange(3), seq_len).labels == -100).mean()
    assert whole.measured["padding_frac"] == red.measured["padding_frac"] == empty


def test_packing_is_red_on_padding_of_rows_that_hold_no_document_apart(spec, subject, small_cfg):
    """Padding and dropped tokens that agree with each other, in rows without a place for them."""
    stream = prepare(small_cfg.data.model_copy(update={"packing": Concatenated()})).train
    limits = limits_of(spec.gates["corpus.packing"])
    limits.labels_judged_max = 3 * subject.data_loader.seq_len
    members = {
        "padding": lambda seq_len: 5,
        "dropped_tokens": lambda seq_len: stream.dropped_tokens(seq_len) + 5,
    }
    red = check(limits, with_splits(subject, train=With(stream, **members)))
    assert red.outcome == "fail" and "5 positions are declared as padding" in red.message


def test_packing_is_red_on_two_documents_under_one_id(spec, subject, dataset):
    stream, eos = dataset.train, dataset.tokenizer.eos_id
    labels = stream.rows(np.arange(stream.n_windows(288)), 288).labels
    n = int(np.flatnonzero(((labels[:, :-1] == eos) & (labels[:, 1:] != -100)).any(1))[0])

    def rows(numbers, seq_len):
        made = stream.rows(numbers, seq_len)
        at = np.flatnonzero(np.asarray(numbers) == n)
        return replaced(made, "document_ids", at, 0) if len(at) else made

    verdict = packing(spec, subject, With(stream, rows=rows))
    assert (
        verdict.outcome == "fail"
        and verdict.measured["crossed_borders"] >= 1
        and verdict.measured["unaccounted"] == 0
    )


def test_packing_is_red_on_rows_that_end_with_another_rows_label(spec, subject, small_cfg):
    """All labels are there, one each: the last ones of two rows have changed places."""
    stream = prepare(small_cfg.data.model_copy(update={"packing": Concatenated()})).train
    last = stream.rows(np.array([3, 5]), 288).labels[:, -1]
    assert last[0] != last[1]

    def rows(numbers, seq_len):
        made = stream.rows(numbers, seq_len)
        for n, label in ((3, last[1]), (5, last[0])):
            for at in np.flatnonzero(np.asarray(numbers) == n):
                made = replaced(made, "labels", (int(at), -1), label)
        return made

    assert packing(spec, subject, stream).outcome == "pass"
    verdict = packing(spec, subject, With(stream, rows=rows))
    assert (
        verdict.outcome == "fail"
        and "2 place(s) have another label than the next token" in verdict.message
        and verdict.measured["unaccounted"] == 0
    )
