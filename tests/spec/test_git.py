"""git in a foreign folder: pipes, devices, large files and large trees."""

import os
import resource
import socket
import sys

import pytest

from stackproof.evidence import archiving, ledgering
from stackproof.spec import archive
from stackproof.spec import git as bounded
from stackproof.spec.archive import Archive, History
from stackproof.spec.errors import IntegrityError
from tools.tampers import archived
from tools.tampers.small_repo import git


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init", "-q")
    (root / "f").write_text("content")
    git(root, "add", "f")
    git(root, "commit", "-qm", "one")
    return root


def include(root, text: str) -> None:
    with open(root / ".git/config", "a") as f:
        f.write(text)


def put_pipe(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


INSIDE = (
    "HEAD config config.worktree index packed-refs commondir refs/heads/x objects/ab/cd".split()
)
INCLUDES = {
    "plain": "[include] path = ../pipe\n",
    "quoted": '[include]\n\tpath = "../pi\\\npe"\n',
    "on one line": "[core] [Include] path = ../pipe\n",
    "conditional": '[includeIf "gitdir:/"]\n\tpath = ../pipe\n',
    "nested": "[include] path = more\n",
    "in a cycle": "[include] path = config\n\tpath = ../pipe\n",
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_pipe_in_the_place_of_a_file_of_git_is_refused(name, root):
    put_pipe(root / ".git" / name)
    with pytest.raises(IntegrityError, match=f"{name} is a pipe or a device"):
        History(root).git("rev-parse", "HEAD")
    with pytest.raises(IntegrityError, match=f"{name} is a pipe or a device"):
        list(History(root).read(["HEAD:./f"]))


ASIDE = {name: "" for name in (".mailmap", ".gitattributes", ".gitmodules")}
ASIDE |= {
    key: f"[{key.partition('.')[0]}]\n\t{key.partition('.')[2]} = {{root}}/{key}\n"
    for key in ("mailmap.file", "diff.orderFile", "core.attributesFile")
}


@pytest.mark.parametrize("follow", ["true", "false"])
@pytest.mark.parametrize("name", ASIDE)
def test_what_git_could_read_beside_history_is_not_opened(name, follow, root, monkeypatch):
    """With a file that moved, which git finds renames for, and a submodule."""
    head = git(root, "rev-parse", "HEAD")
    (root / "g").mkdir()
    git(root, "mv", "f", "g/f")
    (root / "g/f").write_text("content and")
    git(root, "add", ".")
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{head},sub")
    git(root, "commit", "-qm", "two")
    put_pipe(root / name)
    include(root, ASIDE[name].format(root=root) + f"[log]\n\tfollow = {follow}\n")
    monkeypatch.setattr(bounded, "TIMEOUT_S", 60)
    last = git(root, "rev-parse", "HEAD")
    assert archiving.last_commits(History(root)) == {"g": last}


@pytest.mark.parametrize("how", INCLUDES)
def test_a_configuration_that_includes_a_pipe_is_refused(how, root):
    put_pipe(root / "pipe")
    (root / ".git/more").write_text(INCLUDES["plain"])
    include(root, INCLUDES[how])
    with pytest.raises(IntegrityError, match="pipe is a pipe or a device"):
        History(root).git("rev-parse", "HEAD")


@pytest.mark.parametrize("place", ["link", ".git", "a bare repository", "work tree"])
def test_a_pipe_that_git_is_led_to_is_refused(place, root, tmp_path):
    folder = root
    match place:
        case "link":
            (root / ".git/packed-refs").symlink_to("/dev/zero")
        case ".git":
            folder = root / "inner"
            put_pipe(folder / ".git")
        case "a bare repository":
            folder = root / "inner"
            put_pipe(folder / "HEAD")
        case "work tree":
            folder = tmp_path / "other"
            git(root, "worktree", "add", "-q", str(folder))
            put_pipe(root / ".git/packed-refs")
    with pytest.raises(IntegrityError, match="is a pipe or a device"):
        History(folder).git("rev-parse", "HEAD")


def test_what_an_honest_repository_holds_is_no_pipe(root, tmp_path, monkeypatch):
    """Included files, hooks, links, the socket of the file monitor, and a second work tree."""
    monkeypatch.chdir(root / ".git")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind("fsmonitor--daemon.ipc")
    (root / ".git/hooks").mkdir(exist_ok=True)
    (root / ".git/hooks/pre-push").symlink_to(os.devnull)
    (root / ".git/linked").symlink_to("gone")
    (tmp_path / "more").write_text("[user]\n\tname = A User\n")
    include(root, f"[include]\n\tpath = {tmp_path}/more\n\tpath = gone\n")
    git(root, "worktree", "add", "-q", str(tmp_path / "other"))
    for folder in (root, tmp_path / "other"):
        history = History(folder)
        assert history.complete and len(history.commits) == 1
        assert [*history.read(["HEAD:./f"])] == [b"content"]


@pytest.mark.parametrize("name", [".git", "commondir"])
def test_a_file_that_names_a_folder_is_read_as_git_reads_it(name, root, tmp_path):
    """git takes all bytes up to the end of the line, and none after a NUL byte."""
    other = tmp_path / "other"
    git(root, "worktree", "add", "-q", str(other))
    file = other / ".git" if name == ".git" else root / ".git/worktrees/other/commondir"
    named = file.read_bytes().rstrip(b"\n")
    odd = tmp_path / os.fsdecode(b"caf\xe9 ")
    odd.symlink_to(root, target_is_directory=True)
    inside = os.fsencode(odd / ".git")
    for good in (b"\n", b"\r\n", b""):
        moved = b"gitdir: " + inside + b"/worktrees/other" if name == ".git" else inside + b"/."
        file.write_bytes(moved + good)
        assert [*History(other).read(["HEAD:./f"])] == [b"content"]
    file.write_bytes(named + b"\0more\n")
    with pytest.raises(IntegrityError, match=rf"{name} names a folder with a NUL byte"):
        History(other).git("rev-parse", "HEAD")


def test_evidence_with_a_nul_byte_in_the_name_of_a_folder_of_git_does_not_verify(tmp_path):
    archived.build(tmp_path)
    (tmp_path / ".git/commondir").write_bytes(b"a\0b")
    problems = ledgering.verify(tmp_path / "evidence")
    assert problems and all("commondir names a folder with a NUL byte" in p for p in problems)


@pytest.fixture
def inner(root):
    """A repository in a folder of one whose configuration is a pipe."""
    inner = root / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    git(inner, "commit", "-qm", "inner", "--allow-empty")
    put_pipe(root / ".git/config")
    return inner


@pytest.mark.parametrize("how", ["branch", "detached", "work tree"])
def test_a_repository_in_one_with_a_pipe_is_read(how, inner):
    folder = inner
    if how == "detached":
        git(inner, "checkout", "-q", "--detach")
    elif how == "work tree":
        folder = inner.parent / "tree"
        git(inner, "worktree", "add", "-q", str(folder))
    assert History(folder).git("rev-parse", "HEAD").decode().strip() == git(
        inner, "rev-parse", "HEAD"
    )


@pytest.mark.parametrize("broken", ["HEAD", "objects", "refs"])
def test_a_pipe_above_a_folder_that_git_does_not_take_is_refused(broken, inner, monkeypatch):
    (inner / ".git" / broken).rename(inner / ".git/other")
    if broken == "HEAD":
        (inner / ".git/HEAD").write_text("no ref")
    with pytest.raises(IntegrityError, match="config is a pipe or a device"):
        History(inner).git("rev-parse", "HEAD")
    monkeypatch.setattr(bounded, "TIMEOUT_S", 0.1)
    with pytest.raises(IntegrityError, match="did not end"):
        bounded.run_git(inner, "rev-parse", "HEAD")


def test_included_files_are_bounded(root, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_CONFIGURATIONS", 3)
    for name in ("one", "two", "three"):
        (root / ".git" / name).write_text("[user]\n\tname = A User\n")
    include(root, "[include]\n\tpath = one\n\tpath = two\n\tpath = one\n\tpath = gone\n")
    assert History(root).git("rev-parse", "HEAD")
    include(root, "\tpath = three\n")
    with pytest.raises(IntegrityError, match=r"is beyond the 3 files of configuration"):
        History(root).git("rev-parse", "HEAD")


def test_a_file_that_is_included_by_where_git_is_installed_is_refused(root):
    include(root, '[include]\n\tpath = "%(prefix)/etc/more"\n')
    with pytest.raises(IntegrityError, match="config includes a file of the installation of git"):
        History(root).git("rev-parse", "HEAD")


def test_a_git_that_waits_is_ended(root, monkeypatch):
    put_pipe(root / ".git/HEAD")
    monkeypatch.setattr(bounded, "TIMEOUT_S", 0.01)
    with pytest.raises(IntegrityError, match=r"git rev-parse did not end(.|\n)*at most 0.01 s"):
        bounded.run_git(root, "rev-parse", "HEAD")


def test_a_repository_that_was_refused_is_not_waited_for_again(root, monkeypatch):
    (root / ".git/objects/info/alternates").write_text(f"{root}/objects\n")
    put_pipe(root / "objects/info/alternates")
    monkeypatch.setattr(bounded, "TIMEOUT_S", 0.01)
    history = History(root)
    with pytest.raises(IntegrityError, match="did not end"):
        history.git("cat-file", "-t", "0" * 39 + "1")
    monkeypatch.setattr(archive, "run_git", None)
    for again in (lambda: history.commits, lambda: next(history.read(["HEAD:./f"]))):
        with pytest.raises(IntegrityError, match="did not end"):
            again()


def test_output_and_files_above_the_limit_are_refused(root, monkeypatch):
    (root / "large").write_bytes(bytes(501))
    git(root, "add", "large")
    git(root, "commit", "-qm", "two")
    for module in (bounded, archive):
        monkeypatch.setattr(module, "MAX_BYTES", 500)
    found = History(root).read(["HEAD:./f", "HEAD:./large"])
    assert next(found) == b"content"
    with pytest.raises(IntegrityError, match=r"HEAD:\./large in the git(.|\n)*501 bytes(.|\n)*500"):
        next(found)
    assert len(History(root).files("HEAD")) == 2
    for n in range(10):
        (root / f"{n}").write_bytes(b"")
    git(root, "add", ".")
    git(root, "commit", "-qm", "three")
    with pytest.raises(IntegrityError, match=r"the output of git ls-tree(.|\n)*500 bytes"):
        History(root).files("HEAD")


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is a call of Linux")
def test_the_memory_of_git_is_bounded(root):
    with bounded.started(root, "rev-parse", "HEAD") as (process, _):
        limits = resource.prlimit(process.pid, resource.RLIMIT_DATA)
    assert max(limits) <= bounded.MAX_MEMORY_BYTES


def test_of_archived_files_few_are_kept_in_memory(tmp_path, monkeypatch):
    archived.build(tmp_path)
    for minute in (12, 13):
        archived.append(tmp_path, archived.benchmark(tmp_path, minute))
    found = Archive(tmp_path / "evidence")
    gone = next(iter(found.by_record))
    monkeypatch.setattr(archive, "BLOCK_BYTES", 0)
    assert found.read(gone) and sum(map(len, found._read.values())) == 1


def test_evidence_of_a_repository_with_a_pipe_does_not_verify(tmp_path):
    archived.build(tmp_path)
    assert ledgering.verify(tmp_path / "evidence") == []
    put_pipe(tmp_path / "evidence/pipe")
    include(tmp_path, "[include] path = ../evidence/pipe\n")
    problems = ledgering.verify(tmp_path / "evidence")
    assert problems and all("pipe is a pipe or a device" in problem for problem in problems)
