"""What a person sees while nothing else can be seen."""

from types import SimpleNamespace

from stackproof.cli import console
from stackproof.contracts.gate import passed


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
