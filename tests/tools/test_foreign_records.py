"""What integrity asks of the record of a run that is not ours, each with what turns it red."""

import pytest

from tools.tampers import small_repo
from tools.tampers.breaks import found, nothing, put, rechain
from tools.tampers.small_repo import git

UNASKED = {
    "id": "loss.other",
    "fingerprint": "a" * 64,
    "verdict": "not_run",
    "checks": 0,
    "message": "no tokenizer was told",
}
WHY = "loss.other: no tokenizer was told"


@pytest.fixture
def foreign(repo):
    lines = [{"step": s, "loss_nats": 3.5 - s, "grad_norm": 1.0, "lr": 1e-3} for s in (1, 2, 3)]
    metrics = {"steps": small_repo.metric(3), "train_loss_nats": small_repo.metric(0.5)}
    commit, config = (
        git(repo, "rev-parse", "HEAD"),
        {"first_step": 0, "trainer": {"name": "Trainer"}},
    )
    told = {
        "config": config,
        "metrics": metrics,
        "gates": [UNASKED],
        "not_covered": [WHY],
        "series_lines": {"metrics.jsonl": lines},
    }
    small_repo.record(repo, "foreign", 9, commit, **told)
    return repo


def test_an_open_gap_is_no_finding(foreign):
    assert not found(foreign) & {
        "STATUS",
        "STEPS-CONTIGUOUS",
        "METRIC-RECOMPUTE",
        "FINITE",
        "RECORD-GATES",
        "ARTEFACT-HASH",
    }


RED = {
    "a gate that was not asked and is not named": (
        "STATUS",
        put("not_covered", value=["the data"]),
        None,
    ),
    "another reason than the one named": (
        "STATUS",
        lambda d: d["gates"][0].update(message="nobody knows"),
        None,
    ),
    "a red gate": ("STATUS", lambda d: d["gates"][0].update(verdict="fail", checks=1), None),
    "an exit code of another status": ("STATUS", put("exit_code", value=4), None),
    "a step left out": ("STEPS-CONTIGUOUS", nothing, lambda lines: lines.pop(1)),
    "a beginning left out": ("STEPS-CONTIGUOUS", nothing, lambda lines: lines.pop(0)),
    "an end left out": ("STEPS-CONTIGUOUS", nothing, lambda lines: lines.pop()),
    "a better loss than the log's": (
        "METRIC-RECOMPUTE",
        put("metrics", "train_loss_nats", "value", value=0.4),
        None,
    ),
    "a loss that is not finite": (
        "FINITE",
        nothing,
        lambda lines: lines[1].update(loss_nats="NaN"),
    ),
}


@pytest.mark.parametrize("name", RED)
def test_each_way_of_flattering_is_a_finding(foreign, name):
    code, change, series = RED[name]
    rechain(foreign, "foreign", change, series=series)
    assert code in found(foreign)
