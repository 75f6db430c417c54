"""Integrity rules about records and their series: both sides of each."""

import random
from types import SimpleNamespace

import pytest

from tools.integrity.all_rules import check
from tools.integrity.glance import trained_by
from tools.tampers import small_repo
from tools.tampers.breaks import (
    audited,
    drawn,
    folder,
    found,
    rechain,
    second_train,
)
from tools.tampers.small_repo import git


def test_a_run_from_before_a_key_was_renamed_has_the_same_configuration():
    before, now, other = (
        SimpleNamespace(config={"seed": 1, "stop": stop})
        for stop in ({"min_epochs": 3}, {"min_evaluations": 3}, {"min_evaluations": 4})
    )
    assert trained_by(before) == trained_by(now) != trained_by(other)


def test_a_run_that_only_recorded_more_rightly_ends_alike(repo):
    second_train(repo, trace={"every": 50})
    assert "DUP-METRICS" not in found(repo)
    second_train(
        repo,
        19,
        trace={"every": 50},
        train=small_repo.CONFIG["train"] | {"log_every": 7, "max_steps": 99},
    )
    assert "DUP-METRICS" in found(repo)


@pytest.mark.parametrize(("train_s", "plausible"), [(45.0, True), (75.0, False)])
def test_a_child_has_trained_as_long_as_its_parents_and_itself(repo, train_s, plausible):
    """30 s of its own and 30 s of its parent's."""
    metrics = small_repo.train_metrics() | {
        "train_s": small_repo.metric(train_s),
        "tokens_per_s": small_repo.metric(64 / train_s),
    }
    small_repo.record(
        repo,
        "train",
        9,
        git(repo, "rev-parse", "HEAD"),
        metrics=metrics,
        series_lines={"metrics.jsonl": small_repo.log_lines()},
        parents=[folder(repo, "train").name],
    )
    assert ("WALL" not in found(repo)) is plausible


def test_a_run_on_a_data_set_that_is_recorded_is_fine(repo):
    manifest = small_repo.artefact("manifest.json", "e" * 64)
    small_repo.record(repo, "data", 0, git(repo, "rev-parse", "HEAD"), outputs=[manifest])
    rechain(
        repo,
        "train",
        lambda d: (
            d["config"].update(data={"corpus": {"kind": "built"}}) or d["inputs"].append(manifest)
        ),
    )
    assert "DATA-RECORD" not in found(repo)
    rechain(repo, "train", lambda d: d["inputs"][-1].update(sha256="f" * 64))
    assert "DATA-RECORD" in found(repo)


@pytest.mark.parametrize(
    ("breadth", "passes", "named"), [(1, 2, None), (2, 2, "breadth"), (1, 3, "passes")]
)
def test_breadth_is_that_of_the_answers(repo, breadth, passes, named):
    audited(repo, breadth, passes)
    said = [f.message for f in check(repo) if f.code == "AUDIT-RECOMPUTE"]
    assert len(said) == bool(named) and all(named in message for message in said)


@pytest.mark.parametrize("changed", ["", "caught_frac", "caught_frac_low", "n_survivor"])
def test_rates_of_mutants_are_those_of_the_rows(repo, changed):
    drawn(repo, changed)
    said = [f.message for f in check(repo) if f.code == "MUTATION-RECOMPUTE"]
    assert len(said) == bool(changed) and all(changed in message for message in said)


def test_a_rate_without_mutants_is_found(repo):
    drawn(repo)
    rechain(repo, "mutation", lambda document: document.update(series=[]))
    said = [f.message for f in check(repo) if f.code == "MUTATION-RECOMPUTE"]
    assert any("n_survivor = (1" in message for message in said)


@pytest.mark.parametrize("seed", range(12))
def test_any_changed_byte_of_the_evidence_is_found(repo, seed):
    """One random byte of the ledger, a record or a series: always a finding, never a crash."""
    draw = random.Random(seed)
    files = sorted(p for p in (repo / "evidence").rglob("*.json*") if p.is_file())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    codes = found(repo)
    assert codes and "INTERNAL" not in codes, codes
