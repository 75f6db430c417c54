"""What is opened, written and deleted, and what is refused."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from stackproof.spec.canonical import parse_strict, read_json, sha256_file
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import (
    FileRefused,
    create,
    end_last_line,
    holds,
    lines_of,
    open_regular,
    open_to_append,
    process_name,
    read_bytes,
    read_text,
    remedy,
    remove_folder,
    remove_leftovers,
    sync,
    text_lines,
    write_atomically,
)
from stackproof.spec.tables import parse_toml


def made(kind: str, path: Path):
    """Something at a path that is no regular file."""
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, read_json, sha256_file])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket"])
def test_only_regular_files_are_read_and_a_pipe_is_not_waited_for(tmp_path, read, kind):
    made(kind, tmp_path / "f")
    with pytest.raises(OSError) as error:
        read(tmp_path / "f")
    # A socket cannot even be opened; the system has its own message.
    assert kind in str(error.value) or error.value.errno == 6


def test_a_regular_file_is_read_through_a_link(tmp_path):
    (tmp_path / "f").write_bytes(b"text")
    (tmp_path / "link").symlink_to("f")
    assert read_bytes(tmp_path / "link", 4) == b"text"


def test_a_file_that_holds_more_than_its_stated_size_is_read_whole_and_keeps_its_limit():
    """The system states 0 bytes for its own files, as for a file that grows while it is read."""
    status = Path("/proc/self/status")
    assert status.stat().st_size == 0 and b"\nThreads:" in read_bytes(status)
    with pytest.raises(FileRefused, match="more than the 100 bytes"):
        read_bytes(status, 100)


def test_lines_are_read_one_by_one_up_to_a_length_and_a_size(tmp_path):
    (tmp_path / "f").write_bytes(b"one\n\nthree")
    assert list(lines_of(tmp_path / "f", 10, 5)) == [(1, b"one\n"), (2, b"\n"), (3, b"three")]
    read = lines_of(tmp_path / "f", 100, 4)
    assert next(read) == (1, b"one\n") and next(read) == (2, b"\n")
    with pytest.raises(FileRefused, match="line 3 holds more than the 4 bytes"):
        next(read)
    with pytest.raises(FileRefused, match="f holds more than the 9 bytes"):
        list(lines_of(tmp_path / "f", 9, 5))


def test_lines_of_a_text_are_those_of_a_shell():
    assert text_lines("# a\x0b\x0c\x1c\u2028b\n\nc\r\nd\re") == [
        "# a\x0b\x0c\x1c\u2028b", "", "c", "d", "e",
    ]  # fmt: skip
    assert text_lines("a\n") == ["a"] and text_lines("") == []


def test_the_content_of_a_file_is_compared_without_reading_a_larger_one(tmp_path):
    (tmp_path / "f").write_bytes(b"text")
    assert holds(tmp_path / "f", b"text")
    assert not holds(tmp_path / "f", b"tex") and not holds(tmp_path / "f", b"texts")
    with pytest.raises(FileNotFoundError):
        holds(tmp_path / "g", b"text")


def test_a_file_above_the_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "f", "wb") as f:
        f.truncate(2**40)  # takes no room on the disk, and would not fit into memory
    with pytest.raises(FileRefused, match="more than the 33554432 bytes"):
        read_bytes(tmp_path / "f")


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    (tmp_path / "f").write_bytes(b"ab\xff")
    with pytest.raises(FileRefused, match="not UTF-8 at byte 2"):
        read_text(tmp_path / "f")


@pytest.mark.parametrize("data", [b'"\\ud800"', b'{"\\udfff":1}', b'["\\uD8aa"]'])
def test_a_lone_surrogate_is_not_json_and_a_pair_is(data):
    with pytest.raises(IntegrityError, match="not strict JSON"):
        parse_strict(data, origin="x")
    assert parse_strict(b'"\\ud83d\\ude00"', origin="x") == "\N{GRINNING FACE}"


def test_an_atomic_write_replaces_a_link_and_leaves_its_target(tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


def test_a_prepared_temporary_is_not_written_through(tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / f".f.{process_name()}.tmp").symlink_to("target")
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "target"]


def test_a_write_that_fails_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "f", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_what_a_killed_write_left_is_deleted(tmp_path):
    (tmp_path / ".f.123.tmp").write_bytes(b"half")
    (tmp_path / "f.tmp").write_bytes(b"of a user")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["f.tmp"]


def test_nothing_is_appended_through_a_link_or_to_a_pipe(tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(FileRefused, match=f"{name} is a {name}"):
            open_to_append(tmp_path / name)
    with open_to_append(tmp_path / "target") as f:
        f.write(b"!")
    assert (tmp_path / "target").read_bytes() == b"mine!"


def test_a_linked_folder_is_neither_written_to_nor_deleted(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(FileRefused, match="is a link"):
        remove_folder(tmp_path / "link")
    with pytest.raises(FileRefused, match="is a link"):
        write_atomically(tmp_path / "link" / "f", b"new")
    assert (tmp_path / "folder" / "f").read_bytes() == b"mine"
    remove_folder(tmp_path / "folder")
    remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    (tmp_path / "f").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        create(tmp_path / "f")
    create(tmp_path / "f", replace=True).close()
    assert (tmp_path / "f").is_file() and not (tmp_path / "nothing").exists()


def test_the_last_line_gets_its_newline_if_it_is_whole_and_is_removed_if_not(tmp_path):
    path = tmp_path / "f"
    for content, removed, left in (
        (b"a\nb", b"", b"a\nb\n"),
        (b"a\nhalf", b"half", b"a\n"),
        (b"a\n", b"", b"a\n"),
    ):
        path.write_bytes(content)
        assert end_last_line(path, lambda tail: tail == b"b") == removed
        assert path.read_bytes() == left
    assert end_last_line(tmp_path / "absent", lambda tail: True) == b""


def test_a_key_of_many_parts_is_refused_and_a_long_text_is_not():
    with pytest.raises(ValueError, match="more than 100 parts"):
        parse_toml(".".join("a" * 101) + " = 1")
    # By a pattern that tries each start anew, a megabyte takes hours.
    text = "a" * 2**20
    assert parse_toml(f'x = "{text}"  # {text}') == {"x": text}
    assert parse_toml("a.b.c = 1") == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_file_system_that_cannot_sync_a_folder_is_no_error(tmp_path, monkeypatch, number, of):
    """Every other error of a folder is one, and every error of a file."""
    fsync, asked = os.fsync, []

    def failing(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        asked.append(is_folder)
        if is_folder == (of == "folder"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    (tmp_path / "f").write_bytes(b"old")
    if of == "folder" and number in (errno.EINVAL, errno.ENOTSUP):
        write_atomically(tmp_path / "f", b"new")
        assert asked == [False, True] and (tmp_path / "f").read_bytes() == b"new"
        return
    for act in (
        lambda: write_atomically(tmp_path / "f", b"new"),
        lambda: sync(tmp_path if of == "folder" else tmp_path / "f"),
    ):
        with pytest.raises(OSError) as error:
            act()
        assert error.value.errno == number


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "correct the permissions of a/f and of its folder"),
        (errno.EROFS, "make the file system of a/f writable"),
        (errno.EIO, "check the disk of a/f"),
        (errno.EMFILE, "raise the limit of open files"),
        (errno.EEXIST, "move a/f away"),
        (errno.EXDEV, "remove the cause"),
    ],
)
def test_the_next_step_is_that_of_the_error(number, advice):
    assert remedy(OSError(number, os.strerror(number), "a/f")) == advice


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "link"])
def test_what_is_no_regular_file_is_moved_away(tmp_path, kind):
    path = tmp_path / "f"
    path.symlink_to("elsewhere") if kind == "link" else made(kind, path)
    with pytest.raises(OSError) as error:
        open_to_append(path)
    assert remedy(error.value) == f"move {path} away"


def test_the_next_step_is_that_of_the_cause(tmp_path):
    (tmp_path / "f").write_bytes(b"a\xff")
    with pytest.raises(FileRefused) as refused:
        read_text(tmp_path / "f")
    assert remedy(refused.value) == f"restore {tmp_path / 'f'}"
    with pytest.raises(FileRefused) as refused:
        read_bytes(tmp_path / "f", 1)
    assert remedy(refused.value) == f"make {tmp_path / 'f'} smaller"
    wrapped = IntegrityError("x")
    assert remedy(wrapped) == "remove the cause"
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert remedy(wrapped) == "free space"
