"""Gates of the data: green on the stack, red on what they are for."""

import dataclasses

import numpy as np
import pytest

from stackproof.contracts.gate import call_check
from stackproof.data import permutation
from stackproof.data.ingredients import data_ingredients
from stackproof.data.prepare import prepare
from stackproof.museum.plant import load_museum, touches

PREFLIGHT = [
    "data.order",
    "data.coverage",
    "data.exhaustion",
    "data.integrity",
    "data.leakage",
    "data.corpus-budget",
]


@pytest.mark.parametrize("gate_id", PREFLIGHT)
def test_each_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message


def planted_verdict(spec, cfg, plant, cache):
    """What a preflight gate says when data are prepared and handed over
    while its plant is in place.
    """
    before = touches()
    with plant.apply():
        dataset = prepare(cfg.data, cache_dir=cache)
        ingredients = data_ingredients(
            cfg, dataset, n_params=20_000, planned_tokens=50_000, order_seed=5
        )
        verdict = call_check(spec.gates[plant.gate], ingredients)
    assert touches() > before, "the planted line never ran"
    return verdict


@pytest.mark.parametrize("plant_id", [p.id for p in load_museum().values() if p.gate in PREFLIGHT])
def test_each_gate_is_red_under_each_of_its_plants(spec, small_cfg, tmp_path, plant_id):
    assert planted_verdict(spec, small_cfg, load_museum()[plant_id], tmp_path).outcome == "fail"


class Proxy:
    """A reader whose rows are renumbered by a function."""

    def __init__(self, reader, renumber):
        self._reader, self._renumber = reader, renumber
        self.n_windows = reader.n_windows

    def draw(self):
        batch = self._reader.draw()
        return dataclasses.replace(
            batch, sample_ids=tuple(self._renumber(i) for i in batch.sample_ids)
        )

    def __getattr__(self, name):
        return getattr(self._reader, name)


def test_order_is_red_on_half_a_shuffle(spec, ingredients, monkeypatch):
    honest = permutation.permute

    def blockwise(positions, n, key):
        """Shuffles within blocks of 32 only, as a small shuffle buffer does."""
        block = positions // 32
        inner = honest(positions % 32, 32, key)
        return np.minimum(block * 32 + inner, n - 1)

    monkeypatch.setattr(permutation, "permute", blockwise)
    verdict = call_check(spec.gates["data.order"], ingredients)
    assert verdict.outcome == "fail" and verdict.measured["trend"] > 0.9


def test_coverage_is_red_on_one_lost_window(spec, ingredients):
    honest = ingredients["make_reader"]
    off = ingredients | {
        "make_reader": lambda **options: Proxy(honest(**options), lambda i: 1 if i == 0 else i)
    }
    verdict = call_check(spec.gates["data.coverage"], off)
    assert verdict.outcome == "fail" and verdict.measured["missing"] == 1


def test_coverage_sees_rows_of_other_tokens_and_of_another_epoch(spec, ingredients):
    honest = ingredients["make_reader"]

    def altered(change):
        class Altered(Proxy):
            def draw(self):
                return change(self._reader.draw())

        return ingredients | {"make_reader": lambda **options: Altered(honest(**options), None)}

    stale = altered(lambda b: dataclasses.replace(b, input_ids=b.input_ids.roll(1, 1)))
    assert call_check(spec.gates["data.coverage"], stale).measured["wrong_rows"] > 0
    misnamed = altered(lambda b: dataclasses.replace(b, epoch=0))
    verdict = call_check(spec.gates["data.coverage"], misnamed)
    assert verdict.outcome == "fail" and verdict.measured["wrong_epoch"] > 0


def test_coverage_ends_on_a_reader_that_stands_still(spec, ingredients):
    honest = ingredients["make_reader"]

    class Stuck(Proxy):
        def draw(self):
            self._reader.cursor = 0
            return self._reader.draw()

    off = ingredients | {"make_reader": lambda **options: Stuck(honest(**options), None)}
    assert call_check(spec.gates["data.coverage"], off).outcome == "fail"


def test_exhaustion_refuses_a_part_of_a_batch(spec, ingredients):
    """Two rows are wanted, one is left: neither a short batch nor a padded one is right."""
    honest = ingredients["make_reader"]

    class Lenient(Proxy):
        def draw(self):
            if self._reader.cursor == self.n_windows - 1:
                self._reader.rows = 1
            return self._reader.draw()

    off = ingredients | {"make_reader": lambda **options: Lenient(honest(**options), None)}
    verdict = call_check(spec.gates["data.exhaustion"], off)
    assert verdict.outcome == "fail" and "one is left" in verdict.message


@pytest.mark.parametrize("n", [11, 40])
def test_order_of_a_corpus_too_small_for_statistics_is_still_judged_on_repeats(
    spec, ingredients, n
):
    """From twelve windows on, two wholly equal epochs are no chance."""
    honest = ingredients["make_reader"]
    few = ingredients | {"make_reader": lambda **options: honest(**options | {"n_windows": n})}
    gate = spec.gates["data.order"]
    assert call_check(gate, few).outcome == "pass"
    with load_museum()["data.epoch-order-constant"].apply():
        assert call_check(gate, few).outcome == ("fail" if n >= 12 else "pass")


def test_integrity_is_red_on_one_start_astray(spec, ingredients):
    starts = ingredients["splits"]["train"].document_starts.copy()
    starts[7] += 1
    off = ingredients["splits"] | {
        "train": With(ingredients["splits"]["train"], document_starts=starts)
    }
    verdict = call_check(spec.gates["data.integrity"], ingredients | {"splits": off})
    assert verdict.outcome == "fail" and verdict.measured["astray"] == 1


def test_integrity_reads_in_pieces_what_it_reads_at_once(spec, ingredients, monkeypatch):
    monkeypatch.setattr("stackproof.contracts.data.PIECE_TOKENS", 1009)
    assert call_check(spec.gates["data.integrity"], ingredients).outcome == "pass"


def test_integrity_is_red_on_one_missing_byte(spec, ingredients):
    manifest = {
        **ingredients["manifest"],
        "splits": {k: dict(v) for k, v in ingredients["manifest"]["splits"].items()},
    }
    manifest["splits"]["train"]["bytes"] += 1
    assert (
        call_check(spec.gates["data.integrity"], ingredients | {"manifest": manifest}).outcome
        == "fail"
    )


class With:
    """A split of which some attributes are replaced."""

    def __init__(self, stream, **replaced):
        self._stream = stream
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_leakage_sees_one_shared_document(spec, ingredients):
    train, held_out = ingredients["splits"]["train"], ingredients["splits"]["validation"]
    tainted = With(
        train, document_hashes=np.append(train.document_hashes, held_out.document_hashes[3])
    )
    verdict = call_check(
        spec.gates["data.leakage"],
        ingredients | {"splits": {"train": tainted, "validation": held_out}},
    )
    assert verdict.outcome == "fail" and verdict.measured["shared_documents"] == 1


def test_leakage_sees_passages_inside_documents_that_differ(spec, ingredients):
    """A third of the held-out text, pasted into the training text under no shared document hash,
    is measured as a third.
    """
    train, held_out = ingredients["splits"]["train"], ingredients["splits"]["validation"]
    passage = held_out.token_range(0, held_out.n_tokens // 3)
    tokens = np.concatenate([train.token_range(0, train.n_tokens), passage])
    tainted = With(train, n_tokens=len(tokens), token_range=lambda start, stop: tokens[start:stop])
    verdict = call_check(
        spec.gates["data.leakage"],
        ingredients | {"splits": {"train": tainted, "validation": held_out}},
    )
    assert verdict.outcome == "fail" and verdict.measured["shared_documents"] == 0
    assert verdict.measured["run_overlap"] == pytest.approx(1 / 3, abs=0.01)


def test_leakage_does_not_judge_a_split_shorter_than_a_run(spec, ingredients):
    held_out = ingredients["splits"]["validation"]
    splits = ingredients["splits"] | {"validation": With(held_out, n_tokens=9)}
    assert (
        call_check(spec.gates["data.leakage"], ingredients | {"splits": splits}).outcome
        == "not_run"
    )


def test_budget_refuses_the_founding_failure(spec, ingredients):
    """18 M tokens for 370 M parameters: 0.05 each."""
    n_tokens = ingredients["splits"]["train"].n_tokens
    verdict = call_check(
        spec.gates["data.corpus-budget"], ingredients | {"n_params": int(n_tokens / 0.0486)}
    )
    assert verdict.outcome == "fail" and verdict.measured[
        "unique_tokens_per_parameter"
    ] == pytest.approx(0.0486, rel=1e-3)
    too_often = call_check(
        spec.gates["data.corpus-budget"], ingredients | {"planned_tokens": 17 * n_tokens}
    )
    assert too_often.outcome == "fail" and too_often.measured["epochs"] == 17
