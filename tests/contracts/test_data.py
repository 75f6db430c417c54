"""Gates of the data: green on the stack, red on what they are for."""

import numpy as np
import pytest

from contracts.data import Consumption
from contracts.events import BatchDrawn, Started
from contracts.gate import call_check, limits_of

PREFLIGHT = ["data.order", "data.coverage", "data.exhaustion", "data.integrity", "data.leakage", "data.corpus-budget"]


@pytest.mark.parametrize("gate_id", PREFLIGHT)
def test_each_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message


class Proxy:
    """A reader whose rows are renumbered by a function."""

    def __init__(self, reader, renumber):
        self._reader, self._renumber = reader, renumber
        self.n_windows = reader.n_windows

    def draw(self):
        batch = self._reader.draw()
        changed = tuple(self._renumber(i) for i in batch.sample_ids)
        return type(batch)(batch.input_ids, batch.labels, changed, batch.epoch, batch.cursor_before, batch.cursor_after)

    def __getattr__(self, name):
        return getattr(self._reader, name)


def test_order_is_red_on_half_a_shuffle(spec, ingredients, monkeypatch):
    from stack.data import reader

    honest = reader.permute

    def blockwise(positions, n, key):
        """Shuffles within blocks of 32 only, as a small shuffle buffer does."""
        block = positions // 32
        inner = honest(positions % 32, 32, key)
        return np.minimum(block * 32 + inner, n - 1)

    monkeypatch.setattr(reader, "permute", blockwise)
    verdict = call_check(spec.gates["data.order"], ingredients)
    assert verdict.outcome == "fail" and verdict.measured["trend"] > 0.9


def test_coverage_is_red_on_one_lost_window(spec, ingredients):
    honest = ingredients["make_reader"]
    off = ingredients | {"make_reader": lambda **options: Proxy(honest(**options), lambda i: 1 if i == 0 else i)}
    verdict = call_check(spec.gates["data.coverage"], off)
    assert verdict.outcome == "fail" and verdict.measured["missing"] == 1


def test_integrity_is_red_on_one_missing_byte(spec, ingredients):
    manifest = {**ingredients["manifest"], "splits": {k: dict(v) for k, v in ingredients["manifest"]["splits"].items()}}
    manifest["splits"]["train"]["bytes"] += 1
    assert call_check(spec.gates["data.integrity"], ingredients | {"manifest": manifest}).outcome == "fail"


class WithHashes:
    """A split whose document hashes are replaced."""

    def __init__(self, stream, hashes):
        self._stream, self.document_hashes = stream, hashes

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_leakage_sees_one_shared_document(spec, ingredients):
    train, held_out = ingredients["splits"]["train"], ingredients["splits"]["validation"]
    tainted = WithHashes(train, np.append(train.document_hashes, held_out.document_hashes[3]))
    verdict = call_check(spec.gates["data.leakage"], ingredients | {"splits": {"train": tainted, "validation": held_out}})
    assert verdict.outcome == "fail" and verdict.measured["shared_documents"] == 1


def test_budget_refuses_the_founding_failure(spec, ingredients):
    """18 M tokens for 370 M parameters: 0.05 each."""
    n_tokens = ingredients["splits"]["train"].n_tokens
    verdict = call_check(spec.gates["data.corpus-budget"], ingredients | {"n_params": int(n_tokens / 0.0486)})
    assert verdict.outcome == "fail" and verdict.measured["unique_tokens_per_parameter"] == pytest.approx(0.0486, rel=1e-3)
    too_often = call_check(spec.gates["data.corpus-budget"], ingredients | {"planned_tokens": 17 * n_tokens})
    assert too_often.outcome == "fail" and too_often.measured["epochs"] == 17


PLAN = {"rows_per_step": 4, "tokens_per_step": 40, "n_windows": 100, "cursor": 0}


def drawn(step: int, cursor: int, ids=None, **changes) -> BatchDrawn:
    values = {
        "step": step,
        "cursor_before": cursor,
        "cursor_after": cursor + 4,
        "sample_ids": ids or tuple(range(cursor, cursor + 4)),
        "epoch": 0,
        "n_tokens": 40,
    }
    return BatchDrawn(**values | changes)


@pytest.fixture
def watch(spec):
    check = Consumption(limits_of(spec.gates["data.consumption"]))
    check.observe(Started(step=0, plan=PLAN))
    return check


def test_consumption_is_red_on_a_repeat(watch):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 4, ids=(4, 5, 6, 0))).passed


def test_consumption_is_red_on_a_gap_and_on_a_short_step(watch, spec):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 8)).passed
    again = Consumption(limits_of(spec.gates["data.consumption"]))
    again.observe(Started(step=0, plan=PLAN))
    assert not again.observe(drawn(1, 0, n_tokens=30)).passed


def test_consumption_counts_over_a_resume(watch, spec):
    watch.observe(drawn(1, 0))
    resumed = Consumption(limits_of(spec.gates["data.consumption"]))
    resumed.load_state_dict(watch.state_dict())
    assert not resumed.observe(Started(step=1, plan=PLAN)).passed, "the run starts over at sample 0"
    resumed.load_state_dict(watch.state_dict())
    assert resumed.observe(Started(step=1, plan=PLAN | {"cursor": 4})) is None
    assert resumed.observe(drawn(2, 4)).passed
