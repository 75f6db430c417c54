"""The count of false alarms: its bound is exact, its configurations exist,
and an alarm or a broken run is told.
"""

import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import false_alarms
import pytest

from stackproof.config import load_config
from stackproof.recipes import recipe
from stackproof.spec.records import read_record


def test_the_bound_is_that_of_clopper_and_pearson():
    """Without an alarm 1 − 0.05^(1/n), which the rule of three overstates by less than one in a
    hundred; 1 of 10 from tables.
    """
    for n in (20, 200):
        assert false_alarms.upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
    assert 0.99 < false_alarms.upper_bound(0, 200) / (3 / 200) < 1
    assert false_alarms.upper_bound(1, 10) == pytest.approx(0.3942, abs=5e-5)
    assert false_alarms.upper_bound(3, 3) == 1.0
    for alarms, runs in ((2, 50), (7, 40)):
        rate = false_alarms.upper_bound(alarms, runs)
        chance = sum(
            math.comb(runs, k) * rate**k * (1 - rate) ** (runs - k) for k in range(alarms + 1)
        )
        assert chance == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("shape", false_alarms.SHAPES, ids=lambda s: s.name)
def test_every_configuration_is_a_run_with_its_monitors_on(shape, tmp_path):
    cfg, _ = load_config(
        recipe("pocket"), sets=false_alarms.sets_of(shape, 7, tmp_path / "text.jsonl")[1::2]
    )
    assert cfg.seed == 7 and cfg.train.max_steps == shape.steps
    assert max(cfg.eval.every, cfg.sample.every) * 2 <= cfg.train.max_steps


def counted(monkeypatch, tmp_path, capsys, records) -> tuple[int, str]:
    given = iter(records)
    monkeypatch.setattr(false_alarms, "trained", lambda *a: next(given))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "false_alarms.py",
            "--runs",
            str(len(records)),
            "--work",
            str(tmp_path),
            "--run-dir",
            str(tmp_path / "record"),
        ],
    )
    return false_alarms.main(), capsys.readouterr().out


def gate(verdict: str, waiver=None):
    return SimpleNamespace(id="runtime.finite", verdict=verdict, checks=5, waiver=waiver)


def record(verdict: str = "pass", succeeded: bool = True, waiver=None):
    return SimpleNamespace(
        gates=[gate(verdict, waiver)],
        succeeded=succeeded,
        status="completed" if succeeded else "halted",
        wall_s=1.0,
    )


def test_an_alarm_is_counted_a_waived_one_is_not_and_a_broken_run_is_told(
    monkeypatch, tmp_path, capsys
):
    code, said = counted(monkeypatch, tmp_path, capsys, [record(), record("fail", waiver="known")])
    assert code == 0 and "runtime.finite                         1       5       0" in said, (
        "a waived gate is not counted as silent"
    )
    code, said = counted(
        monkeypatch,
        tmp_path,
        capsys,
        [record(), record("fail", succeeded=False), record("not_run")],
    )
    assert code == 4 and "runtime.finite                         3      15       2" in said
    assert json.loads(said.splitlines()[1])["alarms"] == ["runtime.finite"]
    code, said = counted(monkeypatch, tmp_path, capsys, [record(), record(succeeded=False), None])
    assert code == 1 and "0001-pocket-long, 0002-adamw-cosine" in said
    told = read_record(tmp_path / "record" / "metadata.json")
    assert (
        told.status == "failed"
        and told.exit_code == 1
        and told.end_reason == "0 alarm(s) in 1 clean runs, 2 run(s) broken"
    )
    assert told.metric("runtime_finite_alarm_rate_upper_95") == 0.95


@pytest.mark.parametrize("other", [None, "code", "settings"])
def test_a_finished_run_of_other_code_or_settings_is_made_again(monkeypatch, tmp_path, other):
    asked, folder, shape = [], tmp_path / "0000-pocket", false_alarms.SHAPES[0]
    folder.mkdir()
    (folder / "metadata.json").write_text("{}")
    sets = shlex.join(false_alarms.sets_of(shape, 1, tmp_path / "t"))
    folder.with_suffix(".asked").write_text("else" if other == "settings" else sets)
    monkeypatch.setattr(false_alarms, "read_record", lambda path: SimpleNamespace(code=None))
    monkeypatch.setattr(false_alarms, "same_code", lambda one, of: other != "code")
    monkeypatch.setattr(false_alarms, "stack", lambda arguments, log: asked.append(folder.exists()))
    found = false_alarms.trained(shape, 1, folder, tmp_path / "t", None)
    assert asked == ([False] if other else []), "what lay there is gone before"
    assert (found is None) == bool(other) and folder.with_suffix(".asked").read_text() == sets


def test_the_same_code_is_that_of_what_decides_a_run(tmp_path, monkeypatch):
    """Another text beside spec, contracts and stack is the same code; another line in them, or a
    change nobody committed, is not.
    """
    git = lambda *a: subprocess.run(  # noqa: E731
        ["git", *a], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    git("init", "-q")

    def commit(path: str, text: str) -> SimpleNamespace:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        git("add", "-A")
        git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "m")
        return SimpleNamespace(commit=git("rev-parse", "HEAD"), dirty=False)

    for part in ("spec", "contracts"):
        commit(f"{part}/a", "1")
    first, beside, within = commit("stack/a", "1"), commit("README", "2"), commit("stack/a", "2")
    monkeypatch.chdir(tmp_path)
    assert false_alarms.same_code(first, beside) and not false_alarms.same_code(beside, within)
    assert not false_alarms.same_code(first, SimpleNamespace(commit=first.commit, dirty=True))
    assert not false_alarms.same_code(first, SimpleNamespace(commit="unknown", dirty=False))


def test_a_halted_run_accuses_only_the_gate_that_halted_it(monkeypatch, tmp_path, capsys):
    halted = record("fail", succeeded=False)
    halted.gates.append(
        SimpleNamespace(id="runtime.trend", verdict="not_run", checks=0, waiver=None)
    )
    code, said = counted(monkeypatch, tmp_path, capsys, [halted])
    assert (
        code == 4
        and json.loads(said.splitlines()[0])["alarms"] == ["runtime.finite"]
        and "runtime.trend" not in said.splitlines()[-1]
    )
