"""A repository of which one benchmark is archived and a newer one is kept."""

from pathlib import Path

from stackproof.evidence import archiving
from stackproof.spec.archive import Archived
from stackproof.spec.canonical import sha256_file
from tools.tampers import small_repo
from tools.tampers.small_repo import git

LIST, SERIES = "evidence/archive.jsonl", "rounds.jsonl"


def benchmark(root: Path, minute: int, **fields) -> str:
    """Accept a benchmark with a series; returns its id."""
    lines = {SERIES: [{"round": n, "seconds": n + minute} for n in range(3)]}
    commit = git(root, "rev-list", "--max-parents=0", "HEAD")
    return small_repo.record(root, "benchmark", minute, commit, series_lines=lines, **fields).id


def build(root: Path) -> tuple[str, str]:
    """Write and commit everything; returns the archived record and the kept one."""
    small_repo.build(root)
    gone, stays = benchmark(root, 10), benchmark(root, 11)
    small_repo.commit_all(root)
    made = archiving.archive(root / "evidence")
    assert [line.record for line in made.lines] == [gone]
    small_repo.commit_all(root)
    return gone, stays


def append(root: Path, record: str) -> None:
    """List a record that is in the tree, as committed at HEAD."""
    folder = root / "evidence" / record
    files = {file.name: sha256_file(file) for file in folder.iterdir()}
    line = Archived(record=record, commit=git(root, "rev-parse", "HEAD"), files=files)
    with open(root / LIST, "ab") as f:
        f.write(line.to_line())
