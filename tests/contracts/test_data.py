"""Gates of the data: green on the stack, red on what they are for."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from stackproof.config import Concatenated
from stackproof.contracts.gate import call_check
from stackproof.data import permutation
from stackproof.data.prepare import prepare
from stackproof.museum.plant import load_museum, touches
from stackproof.subject.assemble import subject_of
from tests.subjects import changed

PREFLIGHT = [
    "data.order",
    "data.coverage",
    "data.exhaustion",
    "data.integrity",
    "data.leakage",
    "data.corpus-budget",
]


@pytest.mark.parametrize("gate_id", PREFLIGHT)
def test_each_gate_is_green_on_the_stack(spec, subject, gate_id):
    verdict = call_check(spec.gates[gate_id], subject)
    assert verdict.outcome == "pass", verdict.message


def planted_verdict(spec, cfg, plant, cache):
    """The verdict of a preflight gate on data that are prepared and judged with its plant in
    place.
    """
    before = touches()
    with plant.apply():
        subject = subject_of(cfg, prepare(cfg.data, cache_dir=cache), torch.device("cpu"))
        verdict = call_check(spec.gates[plant.gate], subject)
    assert touches() > before, "the planted line never ran"
    return verdict


@pytest.mark.parametrize("plant_id", [p.id for p in load_museum().values() if p.gate in PREFLIGHT])
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    plant, cfg = load_museum()[plant_id], small_cfg
    if plant.museum.get("data.packing.kind") == "concatenated":
        cfg = cfg.model_copy(
            update={"data": cfg.data.model_copy(update={"packing": Concatenated()})}
        )
    assert planted_verdict(spec, cfg, plant, tmp_path).outcome == "fail"


class Proxy:
    """A loader whose rows are renumbered by a function."""

    def __init__(self, loader, renumber):
        self._reader, self._renumber = loader, renumber
        self.n_windows = loader.n_windows

    def next_batch(self):
        batch = self._reader.next_batch()
        return dataclasses.replace(
            batch, sample_ids=tuple(self._renumber(i) for i in batch.sample_ids)
        )

    def __getattr__(self, name):
        return getattr(self._reader, name)


def test_order_is_red_on_half_a_shuffle(spec, subject, monkeypatch):
    honest = permutation.permute

    def blockwise(positions, n, key):
        """Shuffles within blocks of 32 only, as a small shuffle buffer does."""
        block = positions // 32
        inner = honest(positions % 32, 32, key)
        return np.minimum(block * 32 + inner, n - 1)

    monkeypatch.setattr(permutation, "permute", blockwise)
    verdict = call_check(spec.gates["data.order"], subject)
    assert verdict.outcome == "fail" and verdict.measured["trend"] > 0.9


def with_loader(subject, make):
    """A subject whose readers are those that `make` makes of its own."""
    honest = subject.data_loader.fresh
    return changed(subject, data_loader={"fresh": lambda **options: make(honest(**options))})


def test_coverage_is_red_on_one_lost_window(spec, subject):
    off = with_loader(subject, lambda loader: Proxy(loader, lambda i: 1 if i == 0 else i))
    verdict = call_check(spec.gates["data.coverage"], off)
    assert verdict.outcome == "fail" and verdict.measured["missing"] == 1


def test_coverage_sees_rows_of_other_tokens_and_of_another_epoch(spec, subject):
    def altered(change):
        class Altered(Proxy):
            def next_batch(self):
                return change(self._reader.next_batch())

        return with_loader(subject, lambda loader: Altered(loader, None))

    stale = altered(lambda b: dataclasses.replace(b, input_ids=b.input_ids.roll(1, 1)))
    assert call_check(spec.gates["data.coverage"], stale).measured["wrong_rows"] > 0
    misnamed = altered(lambda b: dataclasses.replace(b, epoch=0))
    verdict = call_check(spec.gates["data.coverage"], misnamed)
    assert verdict.outcome == "fail" and verdict.measured["wrong_epoch"] > 0


def test_coverage_ends_on_a_reader_that_stands_still(spec, subject):
    class Stuck(Proxy):
        def next_batch(self):
            self._reader.cursor = 0
            return self._reader.next_batch()

    off = with_loader(subject, lambda loader: Stuck(loader, None))
    assert call_check(spec.gates["data.coverage"], off).outcome == "fail"


def test_exhaustion_refuses_a_part_of_a_batch(spec, subject):
    """Two rows are wanted, one is left: neither a short batch nor a padded one is right."""

    class Lenient(Proxy):
        def next_batch(self):
            if self._reader.cursor == self.n_windows - 1:
                self._reader.rows = 1
            return self._reader.next_batch()

    off = with_loader(subject, lambda loader: Lenient(loader, None))
    verdict = call_check(spec.gates["data.exhaustion"], off)
    assert verdict.outcome == "fail" and "one is left" in verdict.message


@pytest.mark.parametrize("n", [11, 40])
def test_order_of_a_corpus_too_small_for_statistics_is_still_judged_on_repeats(spec, subject, n):
    """From twelve windows on, two wholly equal epochs are no chance."""
    few = changed(subject, data_loader={"n_rows": n})
    gate = spec.gates["data.order"]
    assert call_check(gate, few).outcome == "pass"
    with load_museum()["data.epoch-order-constant"].apply():
        assert call_check(gate, few).outcome == ("fail" if n >= 12 else "pass")


def with_splits(subject, **splits):
    """A subject in whose corpus some splits are others."""
    return changed(subject, corpus={"splits": subject.corpus.splits | splits})


def test_integrity_is_red_on_one_start_astray(spec, subject):
    train = subject.corpus.splits["train"]
    starts = train.document_starts.copy()
    starts[7] += 1
    off = with_splits(subject, train=With(train, document_starts=starts))
    verdict = call_check(spec.gates["data.integrity"], off)
    assert verdict.outcome == "fail" and verdict.measured["astray"] == 1


def test_integrity_reads_in_pieces_what_it_reads_at_once(spec, subject, monkeypatch):
    monkeypatch.setattr("stackproof.contracts.data.PIECE_TOKENS", 1009)
    assert call_check(spec.gates["data.integrity"], subject).outcome == "pass"


def test_integrity_is_red_on_one_missing_byte(spec, subject):
    manifest = copy.deepcopy(subject.corpus.manifest)
    manifest["splits"]["train"]["bytes"] += 1
    off = changed(subject, corpus={"manifest": manifest})
    assert call_check(spec.gates["data.integrity"], off).outcome == "fail"


class With:
    """A split of which some attributes are replaced."""

    def __init__(self, stream, **replaced):
        self._stream = stream
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_leakage_sees_one_shared_document(spec, subject):
    train, held_out = subject.corpus.splits["train"], subject.corpus.splits["validation"]
    tainted = With(
        train, document_hashes=np.append(train.document_hashes, held_out.document_hashes[3])
    )
    verdict = call_check(spec.gates["data.leakage"], with_splits(subject, train=tainted))
    assert verdict.outcome == "fail" and verdict.measured["shared_documents"] == 1


def test_leakage_sees_passages_inside_documents_that_differ(spec, subject):
    """A third of the held-out text, pasted into the training text under no shared document hash,
    is measured as a third.
    """
    train, held_out = subject.corpus.splits["train"], subject.corpus.splits["validation"]
    passage = held_out.token_range(0, held_out.n_tokens // 3)
    tokens = np.concatenate([train.token_range(0, train.n_tokens), passage])
    tainted = With(train, n_tokens=len(tokens), token_range=lambda start, stop: tokens[start:stop])
    verdict = call_check(spec.gates["data.leakage"], with_splits(subject, train=tainted))
    assert verdict.outcome == "fail" and verdict.measured["shared_documents"] == 0
    assert verdict.measured["run_overlap"] == pytest.approx(1 / 3, abs=0.01)


def test_leakage_does_not_judge_a_split_shorter_than_a_run(spec, subject):
    short = With(subject.corpus.splits["validation"], n_tokens=9)
    verdict = call_check(spec.gates["data.leakage"], with_splits(subject, validation=short))
    assert verdict.outcome == "not_run"


def test_budget_counts_the_tokens_of_all_shards(spec, subject):
    gate, train = spec.gates["data.corpus-budget"], subject.corpus.splits["train"]
    sampled = with_splits(subject, train=With(train, n_tokens=1))
    assert call_check(gate, sampled).passed
    assert call_check(gate, sampled) == call_check(gate, subject)


OVER_ALL_SHARDS = (
    "corpus.filters corpus.no-repeats corpus.decontamination corpus.packing data.integrity "
    "data.leakage tokenizer.identity"
).split()


@pytest.mark.parametrize("gate_id", OVER_ALL_SHARDS)
def test_shards_that_were_not_read_are_no_pass(spec, subject, gate_id):
    """One more shard in the manifest than in the streams, without a token."""
    manifest = copy.deepcopy(dict(subject.corpus.manifest))
    shards = manifest["splits"]["train"]["shards"]
    shards.append(shards[0] | {"tokens": 0, "documents": 0})
    whole, sampled = (
        call_check(spec.gates[gate_id], s)
        for s in (subject, changed(subject, corpus={"manifest": manifest}))
    )
    assert whole.outcome == "pass" and sampled.outcome == "not_run"
    n = sum(len(s.paths) for s in subject.corpus.splits.values())
    assert dict(sampled.measured) == whole.measured | {"read_shards": n, "shards": n + 1}
    assert f"green on {n} of {n + 1} shards" in sampled.message


def test_budget_refuses_the_founding_failure(spec, subject):
    """18 M tokens for 370 M parameters: 0.05 each."""
    gate, n_tokens = spec.gates["data.corpus-budget"], subject.corpus.splits["train"].n_tokens
    large = changed(subject, declared={"n_parameters": int(n_tokens / 0.0486)})
    verdict = call_check(gate, large)
    assert verdict.outcome == "fail" and verdict.measured[
        "unique_tokens_per_parameter"
    ] == pytest.approx(0.0486, rel=1e-3)
    long = changed(subject, declared={"max_steps": 17, "tokens_per_step": n_tokens})
    too_often = call_check(gate, long)
    assert too_often.outcome == "fail" and too_often.measured["epochs"] == 17
