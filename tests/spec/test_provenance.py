"""The state of the code, as records hold it."""

import pytest

from stackproof.spec import provenance
from stackproof.spec.archive import History
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


@pytest.mark.parametrize("command", ["ls-files", "ls-tree", "rev-parse"])
def test_what_git_does_not_read_is_not_known_to_be_clean(command, root, monkeypatch):
    read = History.git

    def failing(history, *arguments, **options):
        return None if arguments[0] == command else read(history, *arguments, **options)

    monkeypatch.setattr(History, "git", failing)
    code = provenance.code_state()
    assert code.dirty and code.diff_sha256 is None
    assert (code.commit == "unknown") == (command != "ls-tree")


@pytest.mark.parametrize(
    "hide",
    [
        ("update-index", "--assume-unchanged", "spec/__init__.py"),
        ("update-index", "--skip-worktree", "spec/__init__.py"),
        ("config", "core.ignoreStat", "true"),
        ("config", "status.showUntrackedFiles", "no"),
    ],
)
def test_flags_of_git_do_not_hide_a_change(root, hide):
    git(root, *hide)
    assert not provenance.code_state().dirty
    write(root, "spec/__init__.py", "x = 1")
    assert provenance.code_state().dirty


@pytest.mark.parametrize("name", ["spec/patch.py", "stack/loss.py", "contracts/limits.toml"])
def test_a_file_beside_the_code_makes_it_dirty_though_it_is_ignored(root, name):
    write(root, ".git/info/exclude", "*.py\n*.toml\n")
    assert not provenance.code_state().dirty
    write(root, name, "x = 1")
    assert provenance.code_state().dirty


def test_a_link_in_the_place_of_a_file_and_a_file_that_is_gone_make_it_dirty(root, tmp_path):
    file = root / "spec/__init__.py"
    file.unlink()
    gone = provenance.code_state()
    write(root, "copy", "")
    file.symlink_to(root / "copy")
    assert gone.dirty and provenance.code_state().dirty


@pytest.mark.parametrize("kind", ["link", "compiled"])
def test_a_package_that_hides_a_module_makes_it_dirty(root, kind, tmp_path):
    """`import step` prefers a folder to a file, also one with compiled code alone."""
    if kind == "link":
        write(root, "elsewhere/__init__.py", "x = 1")
        (root / "spec/step").symlink_to(root / "elsewhere")
    else:
        write(root, "spec/step/__init__.pyc", b"x")
    assert provenance.code_state().dirty


def test_compiled_and_hidden_files_are_not_code(root):
    write(root, "spec/__pycache__/a.cpython-311.pyc", b"x")
    write(root, "spec/.editor", "x")
    assert not provenance.code_state().dirty


def test_the_code_of_an_installed_wheel_has_no_commit_and_no_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "IN_CHECKOUT", False)
    assert provenance.code_state() == Code(commit="unknown", dirty=False)
