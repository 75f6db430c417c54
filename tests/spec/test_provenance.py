"""The state of the code, as records hold it."""

import pytest

from stackproof.spec import provenance
from stackproof.spec.git import run_git
from stackproof.spec.records import Code
from tools.tampers.small_repo import git, write


@pytest.fixture
def root(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    write(tmp_path, "spec/__init__.py", "")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "IN_CHECKOUT", True)
    return tmp_path


def test_a_checkout_is_clean_until_a_file_of_the_code_changes(root):
    commit = git(root, "rev-parse", "HEAD")
    assert provenance.code_state() == Code(commit=commit, dirty=False)
    write(root, "docs/text.md", "no code")
    assert not provenance.code_state().dirty
    write(root, "spec/__init__.py", "x = 1")
    changed = provenance.code_state()
    assert changed.commit == commit and changed.dirty and changed.diff_sha256
    write(root, "spec/__init__.py", "x = 2")
    assert provenance.code_state().diff_sha256 not in (None, changed.diff_sha256)


@pytest.mark.parametrize("command", ["ls-files", "status", "rev-parse"])
def test_what_git_does_not_read_is_not_known_to_be_clean(command, root, monkeypatch):
    def failing(folder, *arguments):
        return None if arguments[0] == command else run_git(folder, *arguments)

    monkeypatch.setattr(provenance, "run_git", failing)
    code = provenance.code_state()
    assert code.dirty and code.diff_sha256 is None
    assert (code.commit == "unknown") == (command != "status")


def test_the_code_of_an_installed_wheel_has_no_commit_and_no_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "IN_CHECKOUT", False)
    assert provenance.code_state() == Code(commit="unknown", dirty=False)
