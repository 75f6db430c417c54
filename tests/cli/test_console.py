"""What a person sees while nothing else can be seen."""

from types import SimpleNamespace

import pytest

from stackproof.cli import console, evidence
from stackproof.contracts.gate import passed
from stackproof.spec.errors import IntegrityError


def test_a_long_preflight_says_where_it_is_and_a_short_one_says_nothing(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    reporter = console.ProgressReporter()
    reporter.on_phase("preflight")
    for gate, seconds in (("a.first", 4), ("a.second", 4), ("a.third", 4), ("a.fourth", 4)):
        now[0] += seconds
        reporter.on_preflight(SimpleNamespace(id=gate), passed(), seconds)
    assert capsys.readouterr().err.splitlines() == [
        "· preflight",
        "  3 gates checked, the last a.third",
    ]


def test_a_rerun_shows_its_result_before_it_suggests_commands(monkeypatch, tmp_path):
    shown = []
    closed = SimpleNamespace(
        **{"gates": (), "metrics": {}, "succeeded": True, "status": "completed", "id": "train-2"},
        end_reason="done",
        exit_code=0,
    )

    def again(record, run_dir, callback):
        callback.on_close(closed, run_dir)
        return {"ok": ok, "compared": [], "run_dir": str(run_dir)}

    record = SimpleNamespace(kind="train", id="train-1")
    monkeypatch.setattr("stackproof.evidence.ledgering.find", lambda *_: record)
    monkeypatch.setattr("stackproof.replay.rerun.rerun", again)
    for module in (console, evidence):
        monkeypatch.setattr(module, "print_table", lambda title, *_: shown.append(title))
    monkeypatch.setattr(console, "note", lambda text, *_: shown.append(text.strip()[:12]))
    ok = True
    evidence.rerun("train-1", run_dir=tmp_path)
    assert shown.index("Re-run") < shown.index("next") < shown.index("stack sample")
    shown.clear()
    ok = False
    with pytest.raises(IntegrityError, match="differs"):
        evidence.rerun("train-1", run_dir=tmp_path)
    assert "Re-run" in shown and "next" not in shown
