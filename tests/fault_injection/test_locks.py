"""A lock lets one process in at a time, also at the moment when it changes hands."""

from multiprocessing import get_context

import pytest

from stackproof.evidence.file_lock import LOCK, file_lock
from stackproof.spec.errors import UsageError
from tests.fault_injection.scale import scaled

PROCESSES = 8


def _enter(folder, rounds, overlaps, inside):
    for _ in range(rounds):
        with file_lock(folder, "test", wait=True):
            with inside.get_lock():
                inside.value += 1
                overlaps.value += inside.value > 1
            with inside.get_lock():
                inside.value -= 1


def test_one_of_eight_processes_is_inside_at_a_time(tmp_path):
    context = get_context("fork")
    overlaps, inside = context.Value("i", 0), context.Value("i", 0)
    rounds = scaled(100, 2000)
    processes = [
        context.Process(target=_enter, args=(tmp_path, rounds, overlaps, inside))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * PROCESSES
    assert overlaps.value == 0


def test_a_held_lock_is_refused_and_a_freed_one_is_not(tmp_path):
    refused = pytest.raises(UsageError, match="another run is writing")
    with file_lock(tmp_path, "run"), refused, file_lock(tmp_path, "run"):
        pass
    with file_lock(tmp_path, "run"):
        pass


def test_a_lock_does_not_empty_what_it_is_linked_to(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / LOCK).symlink_to("mine")
    with pytest.raises(OSError, match="is a link"), file_lock(tmp_path, "run"):
        pass
    assert (tmp_path / "mine").read_bytes() == b"mine"
