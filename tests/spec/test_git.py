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
from tests.tools import archived
from tests.tools.small_repo import git


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
    head = git(root, "rev-parse", "HEAD").strip()
    (root / "g").mkdir()
    git(root, "mv", "f", "g/f")
    (root / "g/f").write_text("content and")
    git(root, "add", ".")
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{head},sub")
    git(root, "commit", "-qm", "two")
    put_pipe(root / name)
    include(root, ASIDE[name].format(root=root) + f"[log]\n\tfollow = {follow}\n")
    monkeypatch.setattr(bounded, "TIMEOUT_S", 60)
    last = git(root, "rev-parse", "HEAD").strip()
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
    (tmp_path / "more").write_text("[user]\n\tname = somebody\n")
    include(root, f"[include]\n\tpath = {tmp_path}/more\n\tpath = gone\n")
    git(root, "worktree", "add", "-q", str(tmp_path / "other"))
    for folder in (root, tmp_path / "other"):
        history = History(folder)
        assert history.complete and len(history.commits) == 1
        assert [*history.read(["HEAD:./f"])] == [b"content"]


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
