"""Integrity rules about gates, releases, rates, plants and failures: both sides of each."""

import subprocess
from pathlib import Path

import pytest

from stackproof.spec.releases import read_releases, release_line, release_text
from tools.check_integrity import main
from tools.freeze_spec import freeze
from tools.integrity.all_rules import check
from tools.integrity.core import Repo
from tools.tampers import small_repo
from tools.tampers.breaks import (
    carry,
    found,
    loosen,
)
from tools.tampers.small_repo import edit, git, write


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"old": "a" * 64}, "the old fingerprint of loss.golden is not the one"),
        ({"new": "a" * 64}, "the new fingerprint of loss.golden is not the one"),
        ({"gate": "loss.gone"}, "gate loss.gone is not in the spec"),
        ({"commit": "a" * 40}, "is no ancestor"),
    ],
)
def test_the_table_of_carried_gates_is_recomputed_on_both_sides(repo, changes, says):
    carry(repo, **changes)
    messages = [f.message for f in check(repo) if f.code == "GATE-CARRIED"]
    assert [says in m for m in messages] == ([True] if says else [])


def test_the_commit_of_a_carried_gate_is_read_and_not_the_working_tree(repo):
    carry(repo)
    edit(repo, "contracts/loss.py", "return x", "return x * 2")
    small_repo.forget()
    assert [f.message for f in check(repo) if f.code == "GATE-CARRIED"] == []


def test_without_history_a_carried_gate_is_not_verified(repo, tmp_path, capsys):
    carry(repo)
    small_repo.commit_all(repo)
    shallow = tmp_path / "shallow"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{repo}", str(shallow)], check=True
    )
    small_repo.forget()
    main(["--root", str(shallow)])
    shown = capsys.readouterr().out
    assert (
        "not verified: GATE-CARRIED: commit" in shown and "GATE-CARRIED         spec" not in shown
    )


def _rewrite_releases(root: Path, **fields) -> None:
    """Another release under the same version, its hash recomputed."""
    (old,) = read_releases(root).values()
    write(root, "spec/releases.jsonl", release_line({}, old | fields))


def test_a_release_that_was_rewritten_with_its_hash_differs_from_history(repo):
    _rewrite_releases(repo, sha256="f" * 64)
    messages = [f.message for f in check(repo) if f.code == "RELEASE-FROZEN"]
    assert len(messages) == 1 and messages[0].endswith("were changed or removed")
    git(repo, "commit", "-qam", "rewritten")
    assert "RELEASE-FROZEN" in found(repo)


def test_a_release_is_what_history_holds_as_a_single_file(repo):
    """Releases were files of their own before; the line must give each of them byte for byte."""
    (release,) = read_releases(repo).values()
    write(repo, "spec/releases/1.0.0.json", release_text(release))
    small_repo.commit_all(repo)
    git(repo, "rm", "-q", "spec/releases/1.0.0.json")
    small_repo.commit_all(repo)
    assert found(repo) == set()
    for version in ("1.0.0", "0.9.0"):
        write(repo, f"spec/releases/{version}.json", release_text(release) + b"\n")
        small_repo.commit_all(repo)
        messages = [f.message for f in check(repo) if f.code == "RELEASE-FROZEN"]
        assert any(f"release {version} is not the one" in m for m in messages)


def test_a_new_release_is_appended_and_both_are_read(repo):
    before = (repo / "spec/releases.jsonl").read_bytes()
    loosen(repo)
    edit(repo, "spec/spec.toml", "1.0.0", "1.1.0")
    small_repo.forget()
    assert freeze(repo) == 0
    assert (repo / "spec/releases.jsonl").read_bytes().startswith(before)
    assert list(read_releases(repo)) == ["1.0.0", "1.1.0"]
    assert not {"SPEC-NOBUMP", "RELEASE-FROZEN"} & found(repo)
    edit(repo, "spec/spec.toml", "1.1.0", "1.0.5")
    assert "SPEC-CHANGELOG" in found(repo), "1.0.5 is older than the released 1.1.0"


def test_loosening_with_a_new_version_that_says_so_is_allowed(repo):
    loosen(repo)
    edit(repo, "spec/spec.toml", "1.0.0", "1.1.0")
    assert "GOALPOST" in found(repo)
    edit(
        repo,
        "spec/CHANGELOG.md",
        "# Changes\n",
        "# Changes\n\n## 1.1.0\n\nloss.golden: error_max, because of noise.\n",
    )
    codes = found(repo)
    assert "GOALPOST" not in codes and "STALE-KILL" in codes, (
        "what the old limit discharged is open again"
    )


def test_a_new_version_names_every_gate_that_it_changes(repo):
    """Not one whose id only begins alike."""
    edit(repo, "spec/gates/loss.toml", "value = 1e-5", "value = 1e-6")
    edit(repo, "spec/spec.toml", "1.0.0", "1.1.0")
    for text, named in (("", False), ("loss.golden-rule", False), ("`loss.golden`.", True)):
        write(repo, "spec/CHANGELOG.md", f"# Changes\n\n## 1.1.0\n\nStricter: {text}\n")
        messages = [f.message for f in check(repo) if f.code == "SPEC-CHANGELOG"]
        assert messages == ([] if named else [UNNAMED])


UNNAMED = "the section of 1.1.0 does not name loss.golden, which it changes"


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("spec/spec.toml", 'scope = "s"', 'scope = "another"'),
        ("spec/chance.toml", "Compares a loss", "Compares the loss"),
        ("spec/failures/loss.toml", "severity = 5", "severity = 1"),
        ("spec/failures/loss.toml", 'name = "A wrong loss"', 'name = "A loss"'),
    ],
)
def test_what_is_stated_beside_the_gates_is_frozen_too(repo, path, old, new):
    edit(repo, path, old, new)
    assert "SPEC-NOBUMP" in found(repo)


def test_what_covers_a_failure_may_change_without_a_version(repo):
    edit(repo, "spec/failures/loss.toml", 'sources = ["a thread"]', 'sources = ["another"]')
    assert "SPEC-NOBUMP" not in found(repo)


@pytest.mark.parametrize(
    ("new", "stated"),
    [
        ('value = 1e-2, unit = "nats", direction = "at-most"', "now at-most 0.01 nats"),
        ('value = 1e-5, unit = "nats", direction = "at-least"', "now at-least 1e-05 nats"),
    ],
)
def test_a_moved_goalpost_is_stated_with_its_direction(repo, new, stated):
    old = 'value = 1e-5, unit = "nats", direction = "at-most"'
    edit(repo, "spec/gates/loss.toml", old, new)
    (message,) = [f.message for f in check(repo) if f.code == "GOALPOST"]
    assert message == f"loss.golden.error_max: at-most 1e-05 nats in 1.0.0, {stated}"


RATES = (
    'rates = { false_alarm = 0.01, per = "run", power = POWER, effect = "ten percent", '
    'measured_by = "tests/a.py::test_golden" }'
)


@pytest.mark.parametrize(
    ("power", "listed", "message"),
    [
        (0.9, "", None),
        (0.01, "", "no more often"),
        (0.9, '"loss.golden"', "not beyond chance"),
        (0.9, '"loss.silver"', "is no gate"),
    ],
)
def test_rates_are_stated_in_one_place_and_say_something(repo, power, listed, message):
    edit(
        repo,
        "spec/gates/loss.toml",
        "[gate.limits]",
        RATES.replace("POWER", str(power)) + "\n[gate.limits]",
    )
    edit(repo, "spec/chance.toml", '"loss.golden"', listed)
    assert [message in f.message for f in check(repo) if f.code == "RATES-STATED"] == (
        [True] if message else []
    )


def test_a_gate_that_chance_is_said_to_spare_twice_is_refused(repo):
    edit(repo, "spec/chance.toml", '"loss.golden"', '"loss.golden", "loss.golden"')
    assert any("listed twice" in f.message for f in check(repo) if f.code == "SCHEMA")


def test_repo_reads_plants_with_their_places(repo):
    exhibit = Repo(repo).plants["loss.wrong"]
    assert exhibit.gate == "loss.golden" and (exhibit.path, exhibit.line) == (
        "stack/museum/plants/loss.toml",
        3,
    )


def test_an_edit_whose_old_text_is_gone_is_found(repo):
    """A refactoring that rewrites the line a plant edits has to take the plant along."""
    edit(repo, "stack/loss_of.py", "a + b", "b + a")
    messages = [f.message for f in check(repo) if f.code == "PLANT-EXISTS"]
    assert (
        len(messages) == 1
        and "edits loss_of:total, where its old text 'a + b' does not stand once" in messages[0]
    )


def test_a_plant_that_names_no_function_of_the_museum_is_found(repo):
    path = "stack/museum/plants/loss.toml"
    edit(
        repo,
        path,
        'target = "loss_of:total"\nold = "a + b"\nnew = "a - b"\n',
        'function = "loss:gone"\n',
    )
    assert [
        "names loss:gone, which does not exist" in f.message
        for f in check(repo)
        if f.code == "PLANT-EXISTS"
    ] == [True]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('plants = ["loss.wrong"]', 'plants = ["loss.lost"]', "which is not in the museum"),
        (
            'plants = ["loss.wrong"]',
            'rules = ["NO-RULE"]\nno_gate = "No run reaches this."',
            "names the rule NO-RULE",
        ),
        (
            'plants = ["loss.wrong"]',
            'tests = ["tests/test_loss.py::test_gone"]\nno_gate = "No run reaches this."',
            "names the test",
        ),
    ],
)
def test_a_failure_that_names_what_is_not_there_is_found(repo, old, new, says):
    edit(repo, "spec/failures/loss.toml", old, new)
    small_repo.forget()
    assert [f.message for f in check(repo) if f.code == "FAILURE-PLANTED" and says in f.message]


def test_a_failure_of_before_step_one_needs_a_gate_that_looks_there(repo):
    edit(repo, "spec/gates/loss.toml", 'moment = "preflight"', 'moment = "runtime"')
    small_repo.forget()
    assert "no gate of its plants looks there" in " ".join(
        f.message for f in check(repo) if f.code == "FAILURE-PLANTED"
    )


def test_an_awaited_failure_is_no_finding_until_its_capability_is_built(repo):
    write(repo, "stack/tune/masks.py", "x = 1\n")
    assert "FAILURE-PLANTED" not in found(repo)
    write(repo, "stack/tune/masks.py", "def tune():\n    return 1\n")
    small_repo.forget()
    messages = [f.message for f in check(repo) if f.code == "FAILURE-PLANTED"]
    assert messages == ["SF-T01 A wrong mask: nothing stands for it, and tuning is built"]
