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
from tests.fault_injection.rank_runs import HALTED, LAUNCHER, Fault, launched, places
from tests.fault_injection.runs import assert_same_end, assert_same_training
from tests.fault_injection.scale import STRESS, chance

pytestmark = pytest.mark.usefixtures("prepared")
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 3
STATUS = {75: "preempted", 130: "interrupted"}
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
    ("a step", "SIGTERM", (LAUNCHER,), 75),
    ("a step", "SIGINT", (LAUNCHER,), 130),
    ("preflight", "SIGTERM", (LAUNCHER,), 75),
]
HANGS = [("preflight", 0), ("a step", 1), ("a step", 0)]


def some(cases, n):
    """All cases in a long round, the first ones in a short one."""
    return cases if STRESS else cases[:n]


@pytest.mark.parametrize(("part", "signals", "to", "code"), some(SIGNALS, 2))
def test_a_signal_ends_all_ranks_once_and_the_run_goes_on(
    undisturbed, tmp_path, part, signals, to, code
):
    at = chance(f"{part} {signals} {to}").choice(places(undisturbed.done.calls(0))[part])
    fault = Fault(0, at, signals, to)
    told = undisturbed.call(fault)
    done = launched(*undisturbed.command, folder=tmp_path, fault=fault, restarts=2)
    assert (done.code, done.codes) == (code, [[code, code]]), (told, done.said())
    record = read_record(tmp_path / "run" / "metadata.json")
    assert (record.status, record.exit_code) == (STATUS[code], code), told
    at_once = part == "preflight" or signals == "SIGINT SIGINT"
    if not at_once:  # with a save that the other run has not
        step = checkpoint.load(checkpoint.find(tmp_path / "run")).state["step"]
        assert record.end_reason.endswith(f"after step {step}; its checkpoint is good"), told
    compare = assert_same_end if at_once else assert_same_training
    undisturbed.require_continued(tmp_path, told, compare)


def test_a_red_gate_ends_all_ranks_and_is_not_restarted(undisturbed, tmp_path):
    done = launched(*undisturbed.command, folder=tmp_path, restarts=2, code=HALTED)
    assert (done.code, done.codes) == (4, [[4, 4]]), done.said()
    record = read_record(tmp_path / "run" / "metadata.json")
    assert record.status == "halted" and "runtime.finite" in record.end_reason
    assert (tmp_path / "run/repro/runtime.finite-step-5/repro.json").is_file()


@pytest.mark.skipif(not STRESS, reason="three starts")
def test_torchrun_does_not_take_up_a_run_that_a_gate_has_halted(undisturbed, tmp_path):
    options = {"restarts": 1, "torchrun": True, "code": HALTED}
    done = launched(*undisturbed.command, folder=tmp_path, **options)
    first, (again, _) = done.codes  # torchrun ends rank 1, which waits for rank 0
    assert (first, again) == ([4, 4], 2), done.said()
    assert "runtime.finite halted this run at step 5" in done.output(0)


@pytest.mark.parametrize(("part", "rank"), some(HANGS, 1))
def test_a_rank_that_hangs_is_named_with_step_and_operation(undisturbed, tmp_path, part, rank):
    at = chance(f"hang in {part}").choice(places(undisturbed.done.calls(0))[part])
    fault = Fault(0, at, "SIGSTOP", (rank,))
    told = undisturbed.call(fault)
    command = *undisturbed.command, "--set", f"parallel.timeout_s={TIMEOUT_S}"
    done = launched(*command, folder=tmp_path, fault=fault, closing_s=3)
    assert done.code == 7, (told, done.said())
    assert done.codes[0][rank] == -signal.SIGKILL and done.codes[0][1 - rank] == 7, told
    place = "step 0, preflight" if part == "preflight" else "step "
    assert f"without an answer: rank {rank} at {place}" in done.output(1 - rank), told
    if rank:
        record = read_record(tmp_path / "run" / "metadata.json")
        assert (record.status, record.exit_code) == ("failed", 7)
        assert f"without an answer: rank {rank} at step " in record.end_reason


@pytest.mark.parametrize("rank", some([1, 0], 1))
def test_a_full_disk_of_one_rank_ends_all_with_its_message(undisturbed, tmp_path, rank):
    numbered = enumerate(undisturbed.done.calls(rank), start=1)
    written = [n for n, call in numbered if call.startswith("write") and "metrics.jsonl" in call]
    fault = Fault(rank, chance(f"full {rank}").choice(written), "full")
    told = undisturbed.call(fault)
    done = launched(*undisturbed.command, folder=tmp_path, fault=fault, restarts=2)
    assert (done.code, done.codes) == (5, [[5, 5]]), (told, done.said())
    record = read_record(tmp_path / "run" / "metadata.json")
    assert (record.status, record.exit_code) == ("failed", 5)
    assert "No space left" in record.end_reason, told
    assert record.end_reason.startswith("rank 1 ended") == (rank == 1), told
    undisturbed.require_continued(tmp_path, told)


@pytest.mark.skipif(not STRESS, reason="the ranks must be processes of Python that import all")
def test_without_its_launcher_no_rank_goes_on(undisturbed, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tools/checkout")}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "stackproof", *undisturbed.command, "--nproc", "2"],
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
    assert read_record(run / "metadata.json").status == "preempted"
    undisturbed.require_continued(tmp_path, "without its launcher")


def runs(pid: str) -> bool:
    """Whether a process is there that has not ended; its parent may not have noticed its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
