"""Pages of archived records: whole from history, a note without it."""

import shutil

import pytest

from stackproof.evidence import archiving
from tools.tampers import archived, small_repo
from tools.tampers.small_repo import git
from tools.site_pages import home
from tools.site_pages.runs import archived_page, run_page, runs_index
from tools.site_pages.world import load_world


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("archived") / "repo"
    gone, _ = archived.build(root)
    bare = tmp_path_factory.mktemp("bare") / "repo"
    shutil.copytree(root, bare, ignore=shutil.ignore_patterns(".git"))
    return root, bare, gone


def test_with_history_an_archived_record_has_its_page_with_a_note(built):
    root, _, gone = built
    world = load_world(root, root / "evidence")
    assert world.unread == [] and gone in world.records
    page = run_page(world, world.records[gone]).text()
    line = world.ledger.archive.by_record[gone]
    assert "Archived: its files are in git history" in page and line.commit in page
    assert (
        "## How to repeat it" in page
        and len(world.series(world.records[gone], "rounds.jsonl")) == 3
    )
    kept = next(r for r in world.records.values() if r.kind == "train")
    assert "Archived" not in run_page(world, kept).text()
    assert "archived" not in runs_index(world).text()


def test_without_history_it_is_listed_as_archived(built):
    _, bare, gone = built
    world = load_world(bare, bare / "evidence")
    (line,) = world.unread
    assert line.record == gone and gone not in world.records
    (row,) = [x for x in runs_index(world).text().splitlines() if gone in x]
    assert "| archived |" in row
    page = archived_page(line)
    assert page.path == f"runs/{gone}.md" and "the record is not verified" in page.text()
    assert line.commit in page.text() and all(sha in page.text() for sha in line.files.values())
    assert "and 1 archived ones that this build could not verify" in home.verdict(world, "a")
    assert gone in home.evidence_json(world)


def test_a_page_names_an_archived_series_and_whether_it_was_read(tmp_path):
    root = tmp_path / "repo"
    archived.build(root)
    lines = {"points.jsonl": [{"n": n, "text": "x" * 1000} for n in range(300)]}
    commit = git(root, "rev-list", "--max-parents=0", "HEAD")
    name = small_repo.record(root, "benchmark", 20, commit, series_lines=lines).id
    small_repo.commit_all(root)
    archiving.archive(root / "evidence")
    small_repo.commit_all(root)
    bare = tmp_path / "bare"
    shutil.copytree(root, bare, ignore=shutil.ignore_patterns(".git"))
    for where, n_lines in ((root, 300), (bare, 0)):
        world = load_world(where, where / "evidence")
        record = world.records[name]
        assert len(world.series(record, "points.jsonl")) == n_lines
        page = run_page(world, record).text()
        assert "points.jsonl</code> is in git history" in page
        assert ("not shown and not verified" in page) is (where == bare)
