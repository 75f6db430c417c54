"""Archived records are read from history, and only a checkout without history may lack them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stackproof.spec.archive import METADATA, Archive, Archived, History
from stackproof.spec.errors import IntegrityError, NoHistory
from stackproof.spec.ledger import Ledger
from tools.tampers import archived, small_repo
from tools.tampers.small_repo import edit, git


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("archived") / "repo"
    return root, *archived.build(root)


@pytest.fixture
def repo(built, tmp_path):
    """A copy with the archived record's id and the id of a kept one."""
    root, gone, stays = built
    shutil.copytree(root, tmp_path / "repo", symlinks=True)
    return tmp_path / "repo", gone, stays


def shallow(root: Path, target: Path) -> Path:
    command = ["git", "clone", "-q", "--depth", "1", f"file://{root}", str(target)]
    subprocess.run(command, check=True)
    return target


def untracked(root: Path, target: Path) -> Path:
    """The tree inside another repository that ignores it, as in a virtual environment."""
    shutil.copytree(root, target / "site", ignore=shutil.ignore_patterns(".git"))
    git(target, "init", "-q")
    (target / ".gitignore").write_text("site\n")
    small_repo.commit_all(target)
    return target / "site"


def exported(root: Path, target: Path) -> Path:
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(".git"))
    return target


def test_an_archived_record_and_its_series_are_read_from_history(repo):
    root, gone, stays = repo
    assert not (root / "evidence" / gone).exists() and (root / "evidence" / stays).is_dir()
    ledger = Ledger(root / "evidence")
    record = ledger.records()[gone]
    assert record.id == gone and list(ledger.records())[-2:] == [gone, stays]
    assert ledger.series(record, record.series[0]).count(b"\n") == 3
    assert ledger.unread() == [] and set(ledger.accepted()) == {e.record for e in ledger.entries()}


def test_records_and_series_in_turn_are_each_read_once(repo, monkeypatch):
    root, gone, _ = repo
    archive, processes, read = Ledger(root / "evidence").archive, [], History.read
    monkeypatch.setattr(History, "read", lambda self, at: processes.append(at) or read(self, at))
    files = [METADATA, archived.SERIES] * 3
    assert all(archive.read(gone, name) for name in files)
    assert len(processes) == 2


@pytest.mark.parametrize("without", [shallow, untracked, exported])
def test_without_history_an_archived_record_is_unread_and_the_others_are_not(
    repo, tmp_path, without
):
    root, gone, stays = repo
    ledger = Ledger(without(root, tmp_path / "copy") / "evidence")
    assert ledger.unread() == [gone]
    assert stays in ledger.records() and gone not in ledger.records()
    with pytest.raises(NoHistory, match="lacks the history"):
        ledger.content(gone)


def test_a_complete_history_must_hold_the_commit(repo):
    root, gone, _ = repo
    path = root / "evidence" / "archive.jsonl"
    commit = Archive(root / "evidence").by_record[gone].commit
    git(root, "checkout", "-q", "--orphan", "other")
    small_repo.commit_all(root)
    ledger = Ledger(root / "evidence")
    assert git(root, "cat-file", "-t", commit) == "commit" and ledger.unread() == []
    with pytest.raises(IntegrityError, match="not an ancestor of HEAD") as caught:
        ledger.content(gone)
    assert not isinstance(caught.value, NoHistory)
    path.write_text(path.read_text().replace(commit, "d" * 40))
    with pytest.raises(IntegrityError, match="not an ancestor of HEAD"):
        Ledger(root / "evidence").content(gone)


@pytest.mark.parametrize("name", [METADATA, archived.SERIES])
def test_other_bytes_than_listed_are_refused(repo, name):
    root, gone, _ = repo
    sha256 = Archive(root / "evidence").by_record[gone].files[name]
    edit(root, "evidence/archive.jsonl", sha256, "e" * 64)
    with pytest.raises(IntegrityError, match="missing or not what was archived"):
        Archive(root / "evidence").read(gone, name)
    with pytest.raises(IntegrityError, match="does not list"):
        Archive(root / "evidence").read(gone, "other.jsonl")


def test_the_list_is_canonical_and_names_are_plain(repo):
    root, gone, _ = repo
    path = root / "evidence" / "archive.jsonl"
    good = path.read_text()
    for bad, says in (
        (good.replace('":"', '": "', 1), "not canonical"),
        (good.rstrip("\n"), "middle of a line"),
        (good.replace(gone, f"../{gone}"), "not a plain name"),
        (good.replace(gone, ""), "not a plain name"),
        (good.replace(gone, f"{gone}\\n"), "not a plain name"),
        (re.sub(r'"files":{[^}]*}', '"files":{}', good), "lists no file"),
        (good.replace('"commit":"', '"commit":"x'), "pattern"),
    ):
        path.write_text(bad)
        with pytest.raises(IntegrityError, match=says):
            Archive(root / "evidence").lines  # noqa: B018


def test_history_reads_many_places_at_once_and_none_for_what_is_not_there(repo):
    root, gone, _ = repo
    history = History(root / "evidence")
    wanted = ["HEAD:./ledger.jsonl", f"HEAD:./{gone}/x y", "HEAD:./archive.jsonl"]
    ledger, absent, listed = history.read(wanted)
    assert ledger == (root / "evidence" / "ledger.jsonl").read_bytes() and absent is None
    assert listed == (root / "evidence" / "archive.jsonl").read_bytes()
    nowhere = History(root / "nowhere")
    assert [*nowhere.read(wanted)] == [None] * 3 and not [*history.read([])]
    assert not nowhere.complete


def test_a_line_says_where_its_files_are():
    line = Archived(record="a-1", commit="c" * 40, files={METADATA: "a" * 64})
    assert line.place(METADATA) == f"{'c' * 40}:./a-1/{METADATA}"


def test_history_starts_no_program_that_a_foreign_folder_names(tmp_path):
    """A missing object of a partial clone is fetched by a program that its configuration names."""
    root, mark = tmp_path / "repo", tmp_path / "mark"
    root.mkdir()
    git(root, "init", "-q")
    (root / "f").write_text("content")
    git(root, "add", "f")
    git(root, "commit", "-qm", "one")
    blob = git(root, "rev-parse", "HEAD:f").strip()
    (root / ".git/objects" / blob[:2] / blob[2:]).unlink()
    with open(root / ".git/config", "a") as f:
        f.write(
            "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = origin\n"
            f'[remote "origin"]\n\turl = {tmp_path}\n\tpromisor = true\n'
            f"\tuploadpack = touch {mark}; git-upload-pack\n"
        )
    assert [*History(root).read(["HEAD:./f"])] == [None]
    assert not mark.exists()
    subprocess.run(["git", "-C", str(root), "cat-file", "-p", "HEAD:f"], capture_output=True)
    assert mark.exists(), "git itself starts it, so that the test shows something"
