"""Claims about series: the founding table that was called monotonically decreasing is red, and a
claim that holds is green.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.integrity.claim_rules import claim_series, refuted, table_column

# the founding note tinygpt validation
ROWS = [(100, 6.850), (200, 6.831), (300, 6.243), (400, 6.460), (500, 6.464)]
FOUNDING = ["| step | train |", "|---|---|", *(f"| {s} | {loss:.3f} |" for s, loss in ROWS), ""]


def repo(text, claim="", series=()):
    record = SimpleNamespace(claim=claim)
    return SimpleNamespace(
        markdown=["docs/a.md"],
        text=lambda path: text,
        records={"train-1": record},
        glances={"train-1": record},
        series=lambda record, name: list(series) if record else [],
        record_file=lambda record: f"evidence/{record}/metadata.json",
    )


def findings(*arguments, **options):
    return [at.message for at in claim_series(repo(*arguments, **options))]


def test_the_founding_table_is_not_monotone():
    said = "\n".join([*FOUNDING, "The loss: `monotone(train)`."])
    assert findings(said) == ["monotone(train) does not hold: 6.243 is followed by 6.46"]
    assert findings(said.replace("monotone", "falls")) == []
    assert findings("\n".join([*FOUNDING, "`below(train, 6.9)` and `below(train, 6.8)`"])) == [
        "below(train) does not hold: 6.85 is not below 6.8"
    ]


def test_the_words_alone_are_a_finding():
    assert findings(
        "\n".join([*FOUNDING, "loss curve is monotonically decreasing through warmup"])
    ) == ["uses 'monotonically' without a claim to evaluate"]
    assert findings("nothing is said") == []
    assert findings("", claim="The loss is monotonic.") == [
        "the claim uses 'monotonic' and names no series"
    ]


def test_the_wrapped_run_of_the_founding_note_is_monotone_in_training_and_not_on_held_out_text():
    path = Path(__file__).parents[1] / "contracts" / "founding_runs.json"
    epochs = json.loads(path.read_text())["runs"]["wrapped-5k"]
    assert refuted("monotone", [e["train_loss"] for e in epochs]) == ""
    assert refuted("monotone", [e["val_loss"] for e in epochs]) == "9.79263 is followed by 9.86805"


def test_a_record_is_held_to_its_own_series():
    series = [{"loss_nats": 3.0}, {"loss_nats": 2.0}, {"other": 1}, {"loss_nats": 2.5}]
    claim = "It learns: falls(loss_nats), monotone(loss_nats)."
    assert findings("", claim=claim, series=series) == [
        "monotone(loss_nats) does not hold: 2 is followed by 2.5"
    ]
    assert findings("see `falls(loss_nats of train-1)`", series=series) == []
    assert findings("see `falls(loss_nats of train-2)`", series=series) == [
        "falls(loss_nats) does not hold: 0 value(s) support no claim"
    ]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, 1.5]])
def test_what_cannot_be_read_supports_no_claim(values):
    assert (
        refuted("monotone", values) and refuted("falls", values) and refuted("below", values, 1.2)
    )
    assert refuted("below", [1.0, 0.5]), "a bound is needed"


def test_the_nearest_table_above_is_meant():
    lines = [*FOUNDING, "| train |", "|:--|", "| 3 |", "| −1.5e-1 |", "| n/a |", "", "here"]
    assert table_column(lines, len(lines) - 1, "train") == [3.0, -0.15]
    assert (
        table_column(lines, 8, "train") == [loss for _, loss in ROWS]
        and table_column(lines, 8, "absent") == []
    )
