"""Published tamperings of evidence: found as they are described, with every hash fitted and
committed, and merged from a branch that began before the ledger.
"""

import json
from itertools import accumulate

import pytest

from stackproof.spec.canonical import canonical_json
from tools.tampers import small_repo
from tools.tampers.breaks import folder, found, metric, nothing, put, rechain
from tools.tampers.small_repo import commit_all, git


def smoothed(lines):
    """Each loss is the mean of its neighbours, and the running mean fits."""
    losses = [line["loss_nats"] for line in lines]
    around = [losses[max(0, i - 1) : i + 2] for i in range(len(losses))]
    means = [sum(near) / len(near) for near in around]
    running = accumulate(means, lambda mean, x: 0.98 * mean + 0.02 * x)
    for line, loss, mean in zip(lines, means, running):
        line.update(loss_nats=loss, ema_loss_nats=mean)


def better(lines):
    """Every loss is lower by a tenth, and the running mean fits."""
    for line in lines:
        for name in ("loss_nats", "ema_loss_nats", "val_loss_nats"):
            if name in line:
                line[name] -= 0.1


def red_for_another_reason(document):
    document["kills"][0].update(touches=0)


# What is changed in a record and in its log, and the rule that finds it when all hashes fit.
TAMPERINGS = {
    "a metric is edited": ("train", metric("val_loss_nats", 1.8), None, "METRIC-RECOMPUTE"),
    "the best loss is edited": (
        "train",
        metric("best_val_loss_nats", 1.8),
        None,
        "METRIC-RECOMPUTE",
    ),
    "the end of the log is cut off": ("train", nothing, lambda x: x.pop(), "STEPS-CONTIGUOUS"),
    "lines are cut from the middle": ("train", nothing, lambda x: x.pop(1), "STEPS-CONTIGUOUS"),
    "the curve is smoothed": ("train", nothing, smoothed, "METRIC-RECOMPUTE"),
    "the whole curve is lowered": ("train", nothing, better, "METRIC-RECOMPUTE"),
    "a loss is not a number": ("train", metric("val_loss_nats", "NaN"), None, "FINITE"),
    "the run ends before it starts": (
        "train",
        put("finished_at", value="2026-01-10T12:00:00Z"),
        None,
        "WALL",
    ),
    "the run is older than its code": (
        "train",
        lambda d: d.update(started_at="2025-01-01T00:00:00Z", finished_at="2025-01-01T00:00:30Z"),
        None,
        "TIME",
    ),
    "tokens do not close": ("train", metric("tokens_seen", 128), None, "TOKENS"),
    "bits of other bytes": ("evaluate", metric("bytes", 120), None, "DERIVED"),
    "a failure is a success": ("train", put("exit_code", value=4), None, "STATUS"),
    "a gate is left out": ("train", put("gates", value=[]), None, "RECORD-GATES"),
    "a limit is looser in the record": (
        "train",
        lambda d: d["gates"][0]["limits"].update(error_max=1.0),
        None,
        "SPEC-OF-RELEASE",
    ),
    "the evaluation is of another model": (
        "evaluate",
        put("inputs", value=[]),
        None,
        "REG-WEIGHTS",
    ),
    "a crash counts as a kill": (
        "falsification",
        lambda d: d["kills"][0].update(outcome="crashed"),
        None,
        "GATE-KILLED",
    ),
    "the plant was not applied": ("falsification", red_for_another_reason, None, "KILL-TOUCHED"),
    "another configuration": ("train", put("config", "seed", value=7), None, "CONFIG-HASH"),
    "another commit": ("train", put("code", "commit", value="d" * 40), None, "COMMIT"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_with_fitted_hashes_is_found(repo, name):
    kind, change, series, code = TAMPERINGS[name]
    rechain(repo, kind, change, series=series)
    assert code in found(repo)


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_as_it_is_described_is_found(repo, name):
    kind, change, series, _ = TAMPERINGS[name]
    path = folder(repo, kind)
    if series:
        log = path / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        series(lines)
        log.write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    else:
        document = json.loads((path / "metadata.json").read_bytes())
        change(document)
        (path / "metadata.json").write_bytes(canonical_json(document))
    assert found(repo) & {"RECORD-HASH", "ARTEFACT-HASH"}


def test_what_closes_in_itself_is_found_by_the_history_or_by_nothing(repo):
    """All losses of an evaluation and what follows from them are lower."""

    def change(document):
        for figure in ("total_nats", "loss_nats", "bits_per_byte", "bits_per_char"):
            document["metrics"][figure]["value"] *= 0.5

    rechain(repo, "evaluate", change)
    commit_all(repo)
    assert found(repo) == {"LEDGER-APPEND-ONLY"}
    git(repo, "checkout", "-q", "--orphan", "rewritten")
    commit_all(repo)
    rest = found(repo) - {"COMMIT", "TIME", "REG-REF", "SPEC-AT-COMMIT", "LOCK-AT-COMMIT"}
    assert rest == set(), "only a pin or a repetition of the run can show it"
    small_repo.forget()
