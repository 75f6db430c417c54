"""`stack train --run-dir DIR --auto-resume`: the same command begins a run, continues it, and ends
where it has ended.
"""

import json
import shutil
import signal

import pytest

from tests.cli.conftest import Stack, tiny
from tests.cli.test_resume import wait_for_step
from tests.cli.test_train_errors import assert_standard
from tests.processes import NAN_AT_STEP_5, NO_PREFLIGHT

AGAIN = "--run-dir", "run", "--auto-resume"


@pytest.fixture
def stack(tmp_path, cli_cache):
    return Stack(tmp_path, cli_cache, NO_PREFLIGHT)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_command_begins_continues_and_ends_a_run(stack, text_file):
    run, command = stack.folder / "run", ["train", *tiny(text_file, train__max_steps="60"), *AGAIN]
    begun = stack.begin(*command)
    wait_for_step(run, 9, begun)
    begun.send_signal(signal.SIGKILL)
    assert begun.wait().code == -signal.SIGKILL
    done = stack(*command, "--set", "train.log_every=7", "--json")
    assert done.code == 0 and done.json["metrics"]["steps"] == 60, done.err
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [8]
    record = json.loads((run / "metadata.json").read_text())
    keys = [change["key"] for change in record["overrides"]]
    assert keys.count("train.log_every") == 1 and len(set(keys)) == len(keys)
    before = files_of(run)
    done = stack(*command, "--set", "train.log_every=7", "--json")
    assert done.code == 0 and "nothing is left to do" in done.err
    assert done.json["record"] == record["id"] and files_of(run) == before


def test_another_run_and_a_folder_without_the_option_are_refused(stack, text_file):
    sets, run = tiny(text_file, train__max_steps="9"), stack.folder / "run"
    assert stack("train", *sets, *AGAIN).code == 0
    before = files_of(run)
    assert_standard(
        stack("train", *sets, *AGAIN, "--set", "optim.lr=0.5"), 2, "differs in optim.lr"
    )
    child = stack("train", "--fork", "run", "--set", "train.max_steps=9", *AGAIN)
    assert_standard(child, 2, "run holds a run with another parent")
    for more in ((), ("--nproc", "2", "--restarts", "3")):
        refused = stack("train", *sets, "--run-dir", "run", *more)
        assert_standard(refused, 2, "run already holds a run", "--auto-resume")
    assert files_of(run) == before


def test_a_halted_run_and_a_damaged_checkpoint_are_refused(stack, text_file):
    command = ["train", *tiny(text_file, train__max_steps="9", checkpoint__every="3"), *AGAIN]
    assert stack(*command, code=NAN_AT_STEP_5 + NO_PREFLIGHT).code == 4
    assert_standard(stack(*command), 2, "runtime.finite halted this run at step 5")
    shutil.rmtree(stack.folder / "run")
    assert stack(*command).code == 0
    (stack.folder / "run/metadata.json").unlink()
    weights = stack.folder / "run/checkpoints/step-00000009/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    assert_standard(stack(*command), 5, " is intact: stack train --resume run --at ")


def test_it_needs_a_folder_and_stands_alone(in_process, tmp_path):
    (tmp_path / "run").mkdir()
    for given, named in (((), "no --run-dir"), (("--resume", "run"), "--resume run")):
        code, error = in_process("train", *given, "--auto-resume")
        assert code == 2 and error["value"] == named
