"""Ratios, spreads, turns, and what a record and its table say of them."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tables
from side_by_side import (
    Row,
    against,
    alternate,
    close_record,
    metric_key,
    open_record,
    plain,
    spread,
    why_not,
)

from stackproof.spec.records import read_record


def test_a_ratio_is_taken_within_each_round():
    ours, peer = Row("ours", "x", (10.0, 30.0, 20.0)), Row("peer", "x", (5.0, 10.0, 40.0))
    rows = against("ours", [ours, peer, Row("absent", "x", (), "not installed")])
    assert rows[1].ratio == (2.0, 0.5, 3.0)
    assert rows[0].ratio is None and rows[2].ratio is None
    assert spread([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)


def test_a_goal_is_met_or_missed_at_the_median_or_is_no_goal():
    rated = {"ratio": (1.4, 0.9, 2.0)}
    assert Row("p", "x", (1.0,), goal=1.4, **rated).met is True
    assert Row("p", "x", (1.0,), goal=1.41, **rated).met is False
    assert Row("p", "x", (1.0,), **rated).met is None and Row("p", "x", goal=1.4).met is None


@pytest.mark.parametrize("thrown_away", [0, 1, 2])
def test_contestants_take_turns_and_the_first_rounds_are_thrown_away(thrown_away):
    turns = []

    def once(name):
        return lambda: turns.append(name) or float(len(turns))

    rates = alternate({"a": once("a"), "b": once("b")}, 2, thrown_away=thrown_away)
    assert turns == ["a", "b"] * (2 + thrown_away)
    skipped = 2 * thrown_away
    assert rates == {"a": (1.0 + skipped, 3.0 + skipped), "b": (2.0 + skipped, 4.0 + skipped)}


def test_a_missing_package_is_named_and_none_is_no_reason():
    assert why_not("no_such_package_anywhere") == "not installed"
    assert why_not("") == why_not("json") == ""


@pytest.mark.parametrize(
    "rates, reason",
    [
        ((2.0, 2.0), "below the wanted ratio: The peer"),
        ((1.0, 1.0), "every wanted ratio reached"),
        (None, "measured; no ratio was wanted"),
    ],
)
def test_a_record_holds_the_ratio_with_its_spread_and_the_table_reads_it_back(
    tmp_path, monkeypatch, rates, reason
):
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--rounds", "2"])
    options = Namespace(
        rounds=2, run_dir=tmp_path, json=None, text=Path("a.txt"), contestant=None, only=["ours"]
    )
    record = open_record(options, "the tests")
    peer = Row("The peer", "x", rates or (4.0, 8.0), goal=1.5 if rates else None)
    close_record(
        record,
        tmp_path,
        against("ours", [Row("ours", "x", (2.0, 2.0)), peer]),
        {"further": (3.0, "s")},
    )
    written = read_record(tmp_path / "metadata.json")
    assert written.end_reason == reason and written.metrics["further"].value == 3.0
    assert written.config == {
        "benchmark": "the tests",
        "rounds": 2,
        "text": "a.txt",
        "only": ["ours"],
    }
    (row,) = tables.ratios(written)
    expected = {(2.0, 2.0): (1.0, 1.0, 1.0), (1.0, 1.0): (2.0, 2.0, 2.0), None: (0.375, 0.25, 0.5)}[
        rates
    ]
    assert row == ("the_peer", *expected, 1.5 if rates else None)


def test_names_become_parts_of_metric_names():
    assert metric_key("2 threads, torch.save + fsync") == "2_threads__torch_save___fsync"
    assert plain(Path("a/b")) == "a/b" and plain(3) == 3 and plain(True) is True
