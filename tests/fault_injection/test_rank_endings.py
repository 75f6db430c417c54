"""How a run on several ranks ends: by a hang, a full disk, a signal to one rank or all, a red gate,
or the end of its launcher. Every rank ends with the documented code, and the run can be resumed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stackproof.evidence.file_lock import file_lock
from stackproof.spec.records import read_record
from stackproof.train import checkpoint
from tests.fault_injection.rank_runs import (
    HALTED,
    Fault,
    arguments,
    launched,
    places,
    rows_of,
)
from tests.fault_injection.runs import assert_same_end
from tests.fault_injection.scale import SEED, STRESS, chance

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 3


@pytest.fixture(autouse=True)
def cache(monkeypatch, cli_cache):
    """All runs read the data that the first one prepared."""
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text_file, cli_cache):
    """A run that nothing disturbs: its arguments, folder, and calls of each rank."""
    folder, command = tmp_path_factory.mktemp("straight"), arguments(text_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKPROOF_CACHE", str(cli_cache))
        done = launched(*command, folder=folder)
    assert done.code == 0, done.said()
    return command, folder, [done.calls(rank) for rank in (0, 1)]


def goes_on(straight, folder, told):
    """Continue a run that has ended, and compare it with the straight one."""
    command, wanted, _ = straight
    begun = (folder / "run" / "run.json").is_file()
    done = launched(*(("train", "--resume", "run") if begun else command), folder=folder)
    assert done.code == 0, (told, done.said())
    assert_same_end(wanted / "run", folder / "run", told)
    assert rows_of(folder) == rows_of(wanted), told


# (part of the run, signals, to which ranks, exit code of all)
SIGNALS = [
    ("a save", "SIGTERM", (1,), 75),
    ("preflight", "SIGTERM", (0, 1), 75),
    ("preflight", "SIGTERM", (1,), 75),
    ("preflight", "SIGINT", (0,), 130),
    ("a step", "SIGTERM", (0, 1), 75),
    ("a step", "SIGTERM SIGTERM", (0, 1), 75),
    ("a step", "SIGINT", (0, 1), 130),
    ("a step", "SIGINT SIGINT", (0, 1), 130),
    ("a save", "SIGTERM SIGTERM", (0,), 75),
    ("a save", "SIGINT", (1,), 130),
    ("an evaluation", "SIGTERM", (0,), 75),
]


@pytest.mark.parametrize(("part", "signals", "to", "code"), SIGNALS if STRESS else SIGNALS[:2])
def test_a_signal_ends_all_ranks_once_and_the_run_goes_on(
    straight, tmp_path, part, signals, to, code
):
    command, _, calls = straight
    at = chance(f"{part} {signals} {to}").choice(places(calls[0])[part])
    told = f"{signals} to {to} at call {at} ({calls[0][at - 1]}), SEED={SEED}"
    done = launched(*command, folder=tmp_path, faults=[Fault(0, at, signals, to)], restarts=2)
    assert (done.code, done.codes) == (code, [[code, code]]), (told, done.said())
    record = read_record(tmp_path / "run" / "metadata.json")
    assert (record.status, record.exit_code) == (
        "preempted" if code == 75 else "interrupted",
        code,
    ), told
    if part != "preflight":
        checkpoint.load(checkpoint.find(tmp_path / "run"))
    goes_on(straight, tmp_path, told)


def test_a_red_gate_ends_all_ranks_and_is_not_restarted(straight, tmp_path):
    command, _, _ = straight
    done = launched(*command, folder=tmp_path, restarts=2, code=HALTED)
    assert (done.code, done.codes) == (4, [[4, 4]]), done.said()
    record = read_record(tmp_path / "run" / "metadata.json")
    assert record.status == "halted" and "runtime.finite" in record.end_reason
    assert (tmp_path / "run/repro/runtime.finite-step-5/repro.json").is_file()


@pytest.mark.parametrize(("part", "rank"), [("a step", 1), ("preflight", 0), ("a step", 0)])
def test_a_rank_that_hangs_is_named_with_step_and_operation(straight, tmp_path, part, rank):
    command, _, calls = straight
    at = chance(f"hang in {part}").choice(places(calls[0])[part])
    told = f"rank {rank} stopped in {part} at call {at} ({calls[0][at - 1]}), SEED={SEED}"
    sets = "--set", f"parallel.timeout_s={TIMEOUT_S}"
    done = launched(*command, *sets, folder=tmp_path, faults=[Fault(0, at, "SIGSTOP", (rank,))])
    assert done.code == 7, (told, done.said())
    assert done.codes[0][rank] == -signal.SIGKILL and done.codes[0][1 - rank] == 7, told
    place = "step 0, preflight" if part == "preflight" else "step "
    assert f"without an answer: rank {rank} at {place}" in done.attempts[0][1 - rank].err, told
    if rank:
        record = read_record(tmp_path / "run" / "metadata.json")
        assert (record.status, record.exit_code) == ("failed", 7)
        assert f"without an answer: rank {rank} at step " in record.end_reason


@pytest.mark.parametrize("rank", [1, 0])
def test_a_full_disk_of_one_rank_ends_all_with_its_message(straight, tmp_path, rank):
    command, _, calls = straight
    written = [
        n
        for n, call in enumerate(calls[rank], start=1)
        if call.startswith("write") and "metrics.jsonl" in call
    ]
    at = chance(f"full {rank}").choice(written)
    told = f"no room for rank {rank} at call {at} ({calls[rank][at - 1]}), SEED={SEED}"
    done = launched(*command, folder=tmp_path, faults=[Fault(rank, at, "full")], restarts=2)
    assert (done.code, done.codes) == (5, [[5, 5]]), (told, done.said())
    record = read_record(tmp_path / "run" / "metadata.json")
    assert (record.status, record.exit_code) == ("failed", 5)
    assert "No space left" in record.end_reason, told
    assert record.end_reason.startswith("rank 1 ended") == (rank == 1), told
    goes_on(straight, tmp_path, told)


def test_without_its_launcher_no_rank_goes_on(straight, tmp_path):
    """A process of Python, so that the ranks are its children; it is killed while rank 0 judges."""
    command, _, _ = straight
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tools/checkout")}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "stackproof", *command, "--nproc", "2"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = tmp_path / "run"
    while not (run / "gates.jsonl").exists():
        assert launcher.poll() is None, "ended before preflight"
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    with file_lock(run, "run", wait=True), file_lock(run / "ranks/00001", "run", wait=True):
        pass
    while any(map(runs, children)):
        time.sleep(0.05)
    assert not (run / "run.json").exists()
    goes_on(straight, tmp_path, "without its launcher")


def runs(pid: str) -> bool:
    """Whether a process is there that has not ended; its parent may not have noticed its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
