"""Gates of the data: green on the stack, red on what they are for."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from stackproof.config import StaticCurriculum
from stackproof.contracts.data import Consumption, Learned
from stackproof.contracts.events import BatchDrawn, Started
from stackproof.contracts.gate import call_check, limits_of
from stackproof.data import permutation
from stackproof.data.curriculum import run_order
from stackproof.data.order import UniformOrder
from stackproof.data.prepare import prepare
from stackproof.data.reader import Reader
from stackproof.museum.plant import load_museum, touches
from stackproof.spec.errors import GateFailed
from stackproof.subject.assemble import subject_of
from stackproof.train.loop import train
from stackproof.train.start import fresh
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
    assert planted_verdict(spec, small_cfg, load_museum()[plant_id], tmp_path).outcome == "fail"


def orders(cfg, dataset) -> dict:
    """Makers of the orders in which a run may draw: one shuffled stream, a mixture by fixed shares,
    and the museum's bandit.
    """
    static = cfg.model_copy(
        update={"curriculum": StaticCurriculum(warmup_steps=3, warmup_sources=("grammar", "tools"))}
    )
    return {
        "uniform": lambda: UniformOrder(dataset.train.n_windows(288), 5),
        "static": lambda: run_order(static, dataset, seed=5),
        "bandit": lambda: run_order(cfg, dataset, seed=5),
    }


@pytest.mark.parametrize("order", ["uniform", "static", "bandit"])
@pytest.mark.parametrize("plant_id", ["data.window-drawn-twice", "data.position-skips"])
def test_consumption_is_red_under_each_of_its_plants(spec, small_cfg, dataset, plant_id, order):
    """Four rows a step from the stack's own reader: green for two epochs without the plant, red
    within three steps with it.
    """
    n = dataset.train.n_windows(288)

    def verdicts(n_steps):
        reader = Reader(
            dataset.train, seq_len=288, seed=5, rows=4, order=orders(small_cfg, dataset)[order]()
        )
        sources = [
            {"name": s.name, "first": s.first, "n_windows": s.n_windows}
            for s in reader.order.sources
        ]
        plan = {
            "rows_per_step": 4,
            "tokens_per_step": 4 * 288,
            "sources": sources,
            "drawn": [0] * len(sources),
            "cursor": 0,
        }
        check = Consumption(limits_of(spec.gates["data.consumption"]))
        check.observe(Started(step=0, plan=plan))
        for step in range(1, n_steps + 1):
            before, b = reader.cursor, reader.draw()
            drawn = BatchDrawn(
                step,
                before,
                reader.cursor,
                b.sample_ids,
                b.epoch,
                b.input_ids.numel(),
                b.sources,
                b.epochs,
            )
            yield check.observe(drawn).outcome

    assert set(verdicts(2 * n // 4 + 2)) == {"pass"}
    with load_museum()[plant_id].apply():
        assert "fail" in set(verdicts(3))


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


def with_reader(subject, make):
    """A subject whose readers are those that `make` makes of its own."""
    honest = subject.data_loader.reader
    return changed(subject, data_loader={"reader": lambda **options: make(honest(**options))})


def test_coverage_is_red_on_one_lost_window(spec, subject):
    off = with_reader(subject, lambda reader: Proxy(reader, lambda i: 1 if i == 0 else i))
    verdict = call_check(spec.gates["data.coverage"], off)
    assert verdict.outcome == "fail" and verdict.measured["missing"] == 1


def test_coverage_sees_rows_of_other_tokens_and_of_another_epoch(spec, subject):
    def altered(change):
        class Altered(Proxy):
            def draw(self):
                return change(self._reader.draw())

        return with_reader(subject, lambda reader: Altered(reader, None))

    stale = altered(lambda b: dataclasses.replace(b, input_ids=b.input_ids.roll(1, 1)))
    assert call_check(spec.gates["data.coverage"], stale).measured["wrong_rows"] > 0
    misnamed = altered(lambda b: dataclasses.replace(b, epoch=0))
    verdict = call_check(spec.gates["data.coverage"], misnamed)
    assert verdict.outcome == "fail" and verdict.measured["wrong_epoch"] > 0


def test_coverage_ends_on_a_reader_that_stands_still(spec, subject):
    class Stuck(Proxy):
        def draw(self):
            self._reader.cursor = 0
            return self._reader.draw()

    off = with_reader(subject, lambda reader: Stuck(reader, None))
    assert call_check(spec.gates["data.coverage"], off).outcome == "fail"


def test_exhaustion_refuses_a_part_of_a_batch(spec, subject):
    """Two rows are wanted, one is left: neither a short batch nor a padded one is right."""

    class Lenient(Proxy):
        def draw(self):
            if self._reader.cursor == self.n_windows - 1:
                self._reader.rows = 1
            return self._reader.draw()

    off = with_reader(subject, lambda reader: Lenient(reader, None))
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


def plan(*n_windows: int, **changes) -> dict:
    """A plan of sources of so many windows, side by side, from the start."""
    firsts = np.cumsum([0, *n_windows]).tolist()
    sources = [
        {"name": f"s{i}", "first": firsts[i], "n_windows": n, "cap": 1.0, "floor": 0.0}
        for i, n in enumerate(n_windows)
    ]
    return {
        "rows_per_step": 4,
        "tokens_per_step": 40,
        "sources": sources,
        "drawn": [0] * len(sources),
        "cursor": 0,
    } | changes


def drawn(step: int, cursor: int, ids=None, **changes) -> BatchDrawn:
    epoch = changes.get("epoch", 0)
    values = {
        "step": step,
        "cursor_before": cursor,
        "cursor_after": cursor + 4,
        "sample_ids": ids or tuple(range(cursor, cursor + 4)),
        "epoch": epoch,
        "n_tokens": 40,
        "sources": (0,) * 4,
        "epochs": (epoch,) * 4,
    }
    return BatchDrawn(**values | changes)


def watching(spec, declared: dict) -> Consumption:
    check = Consumption(limits_of(spec.gates["data.consumption"]))
    check.observe(Started(step=0, plan=declared))
    return check


@pytest.fixture
def watch(spec):
    return watching(spec, plan(100))


def test_consumption_is_red_on_a_repeat(watch):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 4, ids=(4, 5, 6, 0))).passed


def test_consumption_is_red_where_a_step_learns_from_other_windows(spec):
    def learned(ids):
        check = watching(spec, plan(100))
        assert check.observe(drawn(1, 0)).passed
        return check.observe(Learned(1, ids))

    assert learned((0, 1, 2, 3)) is None and learned((3, 2, 1, 0)) is None, "in whatever order"
    for ids, n in (((4, 5, 6, 7), 4), ((0, 1, 2, 4), 1), ((0, 1, 2, 2), 1), ((), 0)):
        verdict = learned(ids)
        assert verdict.outcome == "fail" and verdict.measured["not_drawn"] == n


def test_a_run_that_learns_from_the_batch_before_is_halted_in_its_second_step(small_cfg, tmp_path):
    with (
        load_museum()["data.batch-held-back"].apply(),
        pytest.raises(GateFailed, match="learned from 4 window") as caught,
    ):
        train(fresh(small_cfg, (), tmp_path / "run", only=("data.consumption",)))
    assert caught.value.gate_id == "data.consumption"
    assert (
        next(g.first_failure_step for g in caught.value.record.gates if g.id == "data.consumption")
        == 2
    )


def test_consumption_is_red_on_a_gap_and_on_a_short_step(watch, spec):
    assert watch.observe(drawn(1, 0)).passed
    assert not watch.observe(drawn(2, 8)).passed
    assert not watching(spec, plan(100)).observe(drawn(1, 0, n_tokens=30)).passed


def test_consumption_is_red_on_a_wrong_epoch(spec):
    assert not watching(spec, plan(100)).observe(drawn(1, 0, epoch=1)).passed, "the rows' own"
    batch_alone = drawn(1, 0, epoch=1, epochs=(0,) * 4)
    assert not watching(spec, plan(100)).observe(batch_alone).passed, (
        "the batch's is not that of its last row"
    )


def test_consumption_is_red_on_a_window_that_does_not_exist_and_on_one_of_another_source(spec):
    assert not watching(spec, plan(100)).observe(drawn(1, 0, ids=(0, 1, 2, 100))).passed
    assert (
        watching(spec, plan(50, 50))
        .observe(drawn(1, 0, ids=(0, 1, 50, 51), sources=(0, 0, 1, 1)))
        .passed
    )
    verdict = watching(spec, plan(50, 50)).observe(
        drawn(1, 0, ids=(0, 1, 50, 51), sources=(0, 0, 0, 1))
    )
    assert not verdict.passed and verdict.measured["outside"] == 1


def test_consumption_may_see_a_window_again_in_the_next_epoch(spec):
    check = watching(spec, plan(6))
    assert check.observe(drawn(1, 0, ids=(0, 1, 2, 3))).passed
    assert check.observe(drawn(2, 4, ids=(4, 5, 0, 1), epoch=1, epochs=(0, 0, 1, 1))).passed
    assert not check.observe(drawn(3, 8, ids=(2, 3, 4, 0), epoch=1)).passed


def test_consumption_counts_the_epochs_of_every_source_by_itself(spec):
    """A source of two windows is in its third epoch when the other is still in its first."""
    for epochs, passes in (((1, 2, 0, 0), True), ((1, 1, 0, 0), False), ((1, 2, 1, 1), False)):
        check = watching(spec, plan(2, 20))
        assert check.observe(
            drawn(1, 0, ids=(0, 1, 0, 2), sources=(0, 0, 0, 1), epochs=(0, 0, 1, 0), epoch=1)
        ).passed
        second = drawn(
            2, 4, ids=(1, 0, 3, 4), sources=(0, 0, 1, 1), epochs=epochs, epoch=max(epochs)
        )
        assert check.observe(second).passed == passes


def test_consumption_remembers_a_bounded_number_of_windows(spec):
    check = watching(spec, plan(10_000))
    for step in range(1, 400):
        assert check.observe(drawn(step, 4 * (step - 1))).passed
    assert len(check.state_dict()["recent"]) == check.limits.recent_windows_min == 512


def test_consumption_counts_over_a_resume(watch, spec):
    watch.observe(drawn(1, 0))
    resumed = Consumption(limits_of(spec.gates["data.consumption"]))
    resumed.load_state_dict(watch.state_dict())
    assert not resumed.observe(Started(step=1, plan=plan(100))).passed, (
        "the run starts over at sample 0"
    )
    resumed.load_state_dict(watch.state_dict())
    assert resumed.observe(Started(step=1, plan=plan(100, cursor=4, drawn=[4]))) is None
    assert resumed.observe(drawn(2, 4)).passed


def test_consumption_counts_the_epochs_over_a_resume_from_the_plan(spec):
    """Six windows, four of them drawn before: the second epoch begins after two more."""
    for declared, passes in (([4], True), ([0], False)):
        check = watching(spec, plan(6, cursor=4, drawn=declared))
        assert (
            check.observe(drawn(2, 4, ids=(4, 5, 0, 1), epoch=1, epochs=(0, 0, 1, 1))).passed
            == passes
        )
