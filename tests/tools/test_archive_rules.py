"""The rules of the archive are green on a good list and red on each break of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stackproof.evidence import archiving
from stackproof.spec import ROOT
from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.ledger import GENESIS, Entry, Ledger
from tools.integrity.all_rules import check
from tools.tampers import archived, small_repo
from tools.tampers.archived import LIST
from tools.tampers.small_repo import edit, git, write


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("archived") / "repo"
    return root, *archived.build(root)


@pytest.fixture
def repo(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "repo", symlinks=True)
    return tmp_path / "repo", *built[1:]


def found(root: Path) -> dict[str, str]:
    small_repo.forget()
    return {f.code: f.message for f in check(root)}


def line_of(root: Path, record: str) -> dict:
    lines = map(json.loads, (root / LIST).read_text().splitlines())
    return next(line for line in lines if line["record"] == record)


def test_an_archive_has_no_finding(repo):
    assert found(repo[0]) == {}


def test_the_sha256_of_the_list_is_that_of_the_ledger(repo):
    root, gone, _ = repo
    edit(root, LIST, line_of(root, gone)["files"]["metadata.json"], "e" * 64)
    assert found(root)["ARCHIVE"]
    assert any("no ledger line with this sha256" in f.message for f in check(root))


def test_an_altered_series_is_found(repo):
    root, gone, _ = repo
    edit(root, LIST, line_of(root, gone)["files"][archived.SERIES], "e" * 64)
    assert "not what was archived" in found(root)["ARCHIVE"]


def test_an_unreachable_commit_is_found(repo):
    root, gone, _ = repo
    edit(root, LIST, line_of(root, gone)["commit"], "d" * 40)
    assert "not an ancestor of HEAD" in found(root)["ARCHIVE"]


def test_a_commit_that_does_not_hold_the_record_is_found(repo):
    root, gone, _ = repo
    first = git(root, "rev-list", "--max-parents=0", "HEAD")
    edit(root, LIST, line_of(root, gone)["commit"], first)
    assert "missing or not what was archived" in found(root)["ARCHIVE"]


def test_an_archived_record_needs_its_ledger_line(repo):
    root, gone, _ = repo
    previous, out = GENESIS, []
    for entry in Ledger(root / "evidence").entries():
        if entry.record != gone:
            kept = Entry(
                seq=len(out), record=entry.record, sha256=entry.sha256, prev=previous
            ).to_line()
            out.append(kept)
            previous = sha256_bytes(kept)
    write(root, "evidence/ledger.jsonl", b"\n".join(out) + b"\n")
    assert "no ledger line" in found(root)["ARCHIVE"]


def test_a_record_in_the_tree_is_not_archived(repo):
    root, _, stays = repo
    archived.append(root, stays)
    assert "is in the tree" in found(root)["ARCHIVE"]


@pytest.mark.parametrize("kind", ["train", "resume"])
def test_a_record_of_a_released_model_is_not_archived(repo, kind):
    root, *_ = repo
    folder = next((root / "evidence").glob(f"{kind}-*"))
    archived.append(root, folder.name)
    shutil.rmtree(folder)
    codes = found(root)
    assert "of a released model" in codes.pop("ARCHIVE") and codes == {}


def test_a_run_that_failed_is_not_archived(repo):
    root, *_ = repo
    failed = archived.benchmark(root, 12, status="failed", exit_code=1)
    small_repo.commit_all(root)
    archived.append(root, failed)
    shutil.rmtree(root / "evidence" / failed)
    codes = found(root)
    assert "did not succeed" in codes.pop("ARCHIVE") and codes == {}


def test_a_record_is_listed_once(repo):
    root, *_ = repo
    write(root, LIST, (root / LIST).read_text() * 2)
    assert "listed twice" in found(root)["ARCHIVE"]


def test_a_committed_line_never_changes(repo):
    root, gone, _ = repo
    edit(root, LIST, line_of(root, gone)["commit"], git(root, "rev-parse", "HEAD"))
    assert "ARCHIVE-APPEND-ONLY" in found(root)
    git(root, "commit", "-qam", "another line")
    assert "ARCHIVE-APPEND-ONLY" in found(root)
    git(root, "checkout", "-q", "HEAD~1", "--", LIST)
    git(root, "commit", "-qam", "the line again")
    write(root, LIST, "")
    assert {"ARCHIVE-APPEND-ONLY", "RECORD-ORPHAN"} <= found(root).keys()


def test_a_broken_list_is_a_finding_and_no_crash(repo):
    root, *_ = repo
    write(root, LIST, "{}\n")
    assert "SCHEMA" in found(root) and "INTERNAL" not in found(root)


@pytest.fixture
def series(repo):
    """A repository with a record in the tree of which a large series is archived."""
    root, *_ = repo
    lines = {"points.jsonl": [{"n": n, "text": "x" * 1000} for n in range(300)]}
    commit = git(root, "rev-list", "--max-parents=0", "HEAD")
    name = small_repo.record(root, "benchmark", 20, commit, series_lines=lines).id
    small_repo.commit_all(root)
    archiving.archive(root / "evidence")
    small_repo.commit_all(root)
    return root, name


def test_an_archived_series_has_no_finding_until_it_or_its_line_changes(series):
    root, name = series
    assert line_of(root, name)["files"].keys() == {"points.jsonl"} and found(root) == {}
    edit(root, LIST, line_of(root, name)["files"]["points.jsonl"], "e" * 64)
    codes = found(root)
    assert "not what was archived" in codes["ARCHIVE"] or "declares no series" in codes["ARCHIVE"]
    assert "points.jsonl" in codes["ARTEFACT-HASH"]


def test_an_archived_series_is_declared_by_its_record_and_not_in_the_tree(series):
    root, name = series
    write(root, f"evidence/{name}/points.jsonl", "{}\n")
    assert "is listed as archived and is in the tree" in found(root)["ARCHIVE"]
    (root / "evidence" / name / "points.jsonl").unlink()
    sha256 = line_of(root, name)["files"]["points.jsonl"]
    edit(root, LIST, f'"points.jsonl":"{sha256}"', f'"other.jsonl":"{sha256}"')
    messages = [f.message for f in check(root) if f.code == "ARCHIVE"]
    assert any("declares no series other.jsonl" in m for m in messages)


def test_a_series_that_is_removed_without_a_line_is_found(series):
    root, _ = series
    write(root, LIST, "".join(x + "\n" for x in (root / LIST).read_text().splitlines()[:-1]))
    assert "points.jsonl" in found(root)["ARTEFACT-HASH"]


def test_without_history_an_archived_series_is_not_verified(series, tmp_path):
    root, _ = series
    shutil.copytree(root, tmp_path / "bare", ignore=shutil.ignore_patterns(".git"))
    command = [sys.executable, str(ROOT / "tools/check_integrity.py"), "--root"]
    done = subprocess.run(
        [*command, str(tmp_path / "bare"), "--json"], capture_output=True, text=True
    )
    document = json.loads(done.stdout)
    assert "ARCHIVE: 1 archived series" in document["not_verified"] and not document["ok"]
    assert not {"ARTEFACT-HASH", "ARCHIVE"} & {f["code"] for f in document["findings"]}


def test_a_checkout_without_history_is_not_verified_and_not_ok(repo, tmp_path):
    root, *_ = repo
    shutil.copytree(root, tmp_path / "bare", ignore=shutil.ignore_patterns(".git"))
    command = [sys.executable, str(ROOT / "tools/check_integrity.py"), "--root"]
    done = subprocess.run([*command, str(tmp_path / "bare")], capture_output=True, text=True)
    assert "not verified: ARCHIVE: 1 archived record(s)" in done.stdout
    assert "pass" not in done.stdout and "RECORD-" not in done.stdout
    for where, unread in ((tmp_path / "bare", ["ARCHIVE: 1 archived record(s)"]), (root, [])):
        done = subprocess.run([*command, str(where), "--json"], capture_output=True, text=True)
        document = json.loads(done.stdout)
        assert document["not_verified"] == unread and document["ok"] is (not unread)
