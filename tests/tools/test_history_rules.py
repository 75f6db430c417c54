"""What was committed once stays: in all ancestors, whatever the shape of the history."""

import pytest

from tools.tampers.breaks import change_frozen, found, put, rechain
from tools.tampers.small_repo import git

REWRITTEN = {
    "LEDGER-APPEND-ONLY": lambda root: rechain(root, "resume", put("claim", value="another")),
    "RELEASE-FROZEN": change_frozen,
}


def committed(root, *parents):
    """A commit of the working tree with these parents."""
    git(root, "add", "-A")
    tree = git(root, "write-tree").strip()
    sides = [word for parent in parents for word in ("-p", parent)]
    return git(root, "commit-tree", tree, *sides, "-m", "x").strip()


@pytest.mark.parametrize("code", REWRITTEN)
@pytest.mark.parametrize("honest_first", [True, False])
def test_a_rewrite_on_a_branch_from_before_is_found_after_its_merge(repo, code, honest_first):
    """The merge has the tree of the branch, so that `git log FILE` shows no other line."""
    honest = git(repo, "rev-parse", "HEAD").strip()
    git(repo, "rm", "-rq", "--cached", "evidence", "spec/releases.jsonl")
    root = git(repo, "commit-tree", git(repo, "write-tree").strip(), "-m", "first").strip()
    REWRITTEN[code](repo)
    side = committed(repo, root)
    parents = (honest, side) if honest_first else (side, honest)
    git(repo, "reset", "-q", "--hard", committed(repo, *parents))
    assert code in found(repo)


def test_a_rewrite_is_found_after_any_number_of_commits(repo):
    rechain(repo, "resume", put("claim", value="another"))
    tip = committed(repo, "HEAD")
    ledger = repo / "evidence/ledger.jsonl"
    rewritten = ledger.read_bytes()
    for number in range(60):
        ledger.write_bytes(rewritten + b"\n" * (number % 2))
        tip = committed(repo, tip)
    git(repo, "reset", "-q", "--hard", tip)
    assert "LEDGER-APPEND-ONLY" in found(repo)


def test_a_replaced_commit_does_not_hide_a_rewrite(repo):
    """`git replace` shows other objects under the ids of those that were committed."""
    honest = git(repo, "rev-parse", "HEAD").strip()
    rechain(repo, "resume", put("claim", value="another"))
    tip = committed(repo, honest)
    git(repo, "reset", "-q", "--hard", tip)
    git(repo, "replace", honest, tip)
    assert "LEDGER-APPEND-ONLY" in found(repo)


def test_a_branch_with_fewer_lines_may_be_merged(repo):
    honest = git(repo, "rev-parse", "HEAD").strip()
    ledger = repo / "evidence/ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    side = committed(repo)
    ledger.write_bytes(whole)
    git(repo, "reset", "-q", "--hard", committed(repo, honest, side))
    assert "LEDGER-APPEND-ONLY" not in found(repo)
