"""A record is bound to its configuration, lock file, spec, plants and kin: all hashes may fit."""

import json

import pytest

from stackproof.spec.canonical import canonical_json, sha256_json
from tools.integrity.all_rules import check
from tools.tampers import small_repo
from tools.tampers.breaks import folder, found, nothing, put, rechain
from tools.tampers.found import found_something
from tools.tampers.small_repo import edit, git

LATER = {"started_at": "2026-01-10T23:00:00Z", "finished_at": "2026-01-10T23:00:30Z"}


def messages(root, code):
    small_repo.forget()
    return [f.message for f in check(root) if f.code == code]


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("train", lambda d: d["gates"][0]["limits"].update(error_max=1e-4), "limits of loss.gol"),
        ("train", lambda d: d["gates"][0]["limits"].clear(), "limits of loss.golden"),
        ("train", lambda d: d["gates"][0].update(fingerprint="d" * 64), "has a fingerprint"),
        ("falsification", lambda d: d["kills"][0].update(fingerprint="d" * 64), "has a fingerp"),
        ("resume", lambda d: d["spec"].update(version="0.9.0"), "never released"),
    ],
)
def test_what_a_record_states_of_its_gates_is_what_was_released(repo, kind, change, named):
    rechain(repo, kind, change)
    (message,) = messages(repo, "SPEC-OF-RELEASE")
    assert named in message


def test_a_gate_that_was_not_run_has_no_limits_to_compare(repo):
    unseen = {"verdict": "not_run", "checks": 0, "limits": {}}
    rechain(repo, "train", lambda d: d["gates"][0].update(unseen))
    assert messages(repo, "SPEC-OF-RELEASE") == []


def test_code_with_changes_states_their_hash(repo):
    rechain(repo, "resume", lambda d: d["code"].update(dirty=True, diff_sha256="d" * 64))
    assert "CLEAN-DIFF" not in found(repo)


def test_an_emptied_plant_is_no_plant_that_was_killed(repo):
    edit(repo, "stack/museum/plants/loss.toml", 'old = "a + b"', 'old = "a"')
    edit(repo, "stack/museum/plants/loss.toml", 'new = "a - b"', 'new = "a"')
    assert "PLANT-AT-PROOF" in found(repo)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, "began later"),
        (LATER, ""),
        (LATER | {"gates": []}, ""),
    ],
)
def test_a_record_is_superseded_by_one_that_began_later(repo, change, named):
    twin = copied(repo, "resume", "resume-20260110T230000Z-00000009", change)
    rechain(repo, twin, nothing, supersedes="resume")
    found_messages = messages(repo, "SUPERSEDES")
    assert [named in m for m in found_messages] == ([True] if named else [])


@pytest.mark.parametrize("verdict", ["pass", "fail", "not_run"])
def test_a_red_run_is_superseded_by_one_that_judges_the_gate(repo, verdict):
    rechain(repo, "train", lambda d: d["gates"][0].update(verdict="fail"))
    gate = json.loads((folder(repo, "train") / "metadata.json").read_bytes())["gates"][0]
    change = LATER | {"gates": [gate | {"verdict": verdict}]}
    twin = copied(repo, "train", "train-20260110T230000Z-00000009", change)
    rechain(repo, twin, nothing, supersedes="train")
    assert bool(messages(repo, "SUPERSEDES")) == (verdict == "not_run")


def copied(root, kind, name, change):
    """A further record: that of a kind with changes, under another name."""
    former = folder(root, kind)
    twin = former.with_name(name)
    twin.mkdir()
    for file in former.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    document = json.loads((twin / "metadata.json").read_bytes()) | {"id": name} | change
    (twin / "metadata.json").write_bytes(canonical_json(document))
    ledger = root / "evidence/ledger.jsonl"
    lines = ledger.read_bytes().splitlines()
    line = {"prev": "0" * 64, "record": name, "seq": len(lines), "sha256": "0" * 64}
    ledger.write_bytes(b"\n".join([*lines, canonical_json(line)]) + b"\n")
    return name


def test_parents_begin_before_their_children_so_that_no_cycle_is_possible(repo):
    train, evaluate = folder(repo, "train").name, folder(repo, "evaluate").name
    rechain(repo, "train", put("parents", value=[evaluate]))
    rechain(repo, "evaluate", put("parents", value=[train]))
    codes = found(repo)
    assert "PARENTS" in codes and "INTERNAL" not in codes
    assert f"its parent {evaluate} began" in messages(repo, "PARENTS")[0]


@pytest.mark.parametrize(
    "name", ["resume-20260110T230000Z-0000000a", "train-20260110T090000Z-0000000a"]
)
def test_a_record_has_the_id_that_the_ledger_names(repo, name):
    """Of its own kind, and of another."""
    rechain(repo, "resume", put("id", value=name))
    assert "RECORD-HASH" in found(repo)


def test_a_release_of_a_commit_that_trained_nothing_is_named(repo):
    head = git(repo, "rev-parse", "HEAD").strip()
    rechain(repo, "train", put("code", "commit", value=head))
    (message,) = messages(repo, "REG-COMMIT")
    assert head[:12] in message and "small-1" in message


def test_a_tag_stays_at_the_commit_of_its_release(repo):
    edit(repo, "evidence/registry.toml", 'recipe = "small"', 'recipe = "small"\ntag = "small-1"')
    trained = json.loads((folder(repo, "train") / "metadata.json").read_bytes())["code"]["commit"]
    git(repo, "tag", "small-1", trained)
    assert "REG-REF" not in found(repo)
    git(repo, "tag", "-f", "-m", "moved", "small-1", "HEAD")
    (message,) = messages(repo, "REG-REF")
    assert trained[:12] in message


@pytest.mark.parametrize(("shown", "stands"), [("positive", False), ("negative", True)])
def test_a_finding_does_not_stand_on_a_record_that_was_revoked(repo, shown, stands):
    """The record that shows the failure may have a successor without it."""
    found_something(repo)
    assert "FINDING-SHOWN" not in found(repo)
    negative, positive = sorted((repo / "evidence").glob("compare-*"))
    revoked = positive if shown == "positive" else negative
    name = "compare-20260110T230000Z-00000009"
    twin = copied(repo, revoked.name, name, LATER)
    rechain(repo, twin, nothing, supersedes=revoked.name)
    assert ("FINDING-SHOWN" not in found(repo)) == stands


@pytest.mark.parametrize("section", ["model", "train"])
def test_the_resume_of_a_release_is_of_its_model(repo, section):
    """A shorter run of the same model is one."""
    other = {"model": {**small_repo.MODEL, "d_ff": 32}, "train": {"max_steps": 2}}[section]
    config = {**small_repo.CONFIG, section: {**small_repo.CONFIG[section], **other}}
    hashed = {"config": config, "config_sha256": sha256_json(config)}
    rechain(repo, "resume", lambda d: d.update(hashed))
    assert ("REG-KIN" in found(repo)) == (section == "model")


@pytest.mark.parametrize(
    "name", ["Metrics.jsonl", "run.py", "deeper/metrics.jsonl", "events.jsonl", ".hidden"]
)
def test_a_record_folder_is_closed(repo, name):
    small_repo.write(repo, f"evidence/{folder(repo, 'train').name}/{name}", "{}\n")
    assert "RECORD-CLOSED" in found(repo)


def test_evidence_itself_is_closed_and_holds_no_link(repo):
    (repo / "evidence/notes").symlink_to(repo / "docs")
    assert "evidence/notes" in {f.path for f in check(repo) if f.code == "RECORD-CLOSED"}
    (repo / "evidence/notes").unlink()
    small_repo.write(repo, "evidence/helper.py", "print()\n")
    assert "RECORD-CLOSED" in found(repo)


def test_ids_of_plants_differ_in_more_than_case(repo):
    plants = repo / "stack/museum/plants/loss.toml"
    text = plants.read_text()
    plants.write_text(text + text.replace('"loss.wrong"', '"loss.w-rong"'))
    assert "ID-UNIQUE" not in found(repo)
    plants.write_text(text + text)
    assert found(repo) & {"ID-UNIQUE", "SCHEMA"}


@pytest.mark.parametrize("outcome", ["killed", "missed", "crashed", "awaiting"])
def test_a_proof_that_missed_a_plant_is_superseded_by_one_that_tries_it(repo, outcome):
    rechain(repo, "falsification", lambda d: d["kills"][0].update(outcome="missed"))
    kill = json.loads((folder(repo, "falsification") / "metadata.json").read_bytes())["kills"][0]
    change = LATER | {"kills": [kill | {"outcome": outcome}]}
    twin = copied(repo, "falsification", "falsification-20260110T230000Z-00000009", change)
    rechain(repo, twin, nothing, supersedes="falsification")
    assert bool(messages(repo, "SUPERSEDES")) == (outcome in ("crashed", "awaiting"))


def test_a_child_may_begin_in_the_second_of_its_parent(repo):
    train = json.loads((folder(repo, "train") / "metadata.json").read_bytes())
    rechain(repo, "evaluate", lambda d: d.update(started_at=train["started_at"][:-1] + ".5Z"))
    assert messages(repo, "PARENTS") == []


def test_a_lock_file_that_was_changed_belongs_to_code_that_was(repo):
    rechain(repo, "resume", lambda d: d["code"].update(dirty=True, lock_sha256="d" * 64))
    assert messages(repo, "LOCK-AT-COMMIT") == []
