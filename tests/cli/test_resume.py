"""Kills and signals: an interrupted run equals an uninterrupted one, byte for byte."""

import json
import random
import signal
import time

import pytest

from stackproof.evidence.file_lock import file_lock
from stackproof.spec.gates import load_spec
from tests.cli.conftest import Stack, tiny
from tests.cli.test_train_errors import assert_standard
from tests.processes import HANGING_S, NO_PREFLIGHT

LAST = "step-00000060"


@pytest.fixture
def stack(tmp_path, cli_cache):
    return Stack(tmp_path, cli_cache, NO_PREFLIGHT)


def sixty(text_file, **changes):
    return tiny(
        text_file,
        **{
            "train__max_steps": "60",
            "checkpoint__every": "6",
            "eval__every": "20",
            "sample__every": "20",
        }
        | changes,
    )


def wait_for_step(run, step: int, process, timeout_s: float = HANGING_S) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lines = (
            (run / "metrics.jsonl").read_bytes().count(b"\n")
            if (run / "metrics.jsonl").is_file()
            else 0
        )
        if lines >= step or process.poll() is not None:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_three_sigkills_leave_identical_weights(stack, text_file):
    # A small training split, so that the run crosses the end of its epoch; dropout is on.
    sets = sixty(text_file, data__split__validation_frac="0.85")
    straight = stack("train", *sets, "--run-dir", "straight", "--json")
    assert straight.code == 0, straight.err
    run, draw = stack.folder / "killed", random.Random(5)
    assert straight.json["metrics"]["epochs"] > 1.05
    arguments = ["train", *sets, "--run-dir", "killed"]
    for target in (9, 27, 44):
        process = stack.begin(*arguments)
        wait_for_step(run, target, process)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        arguments = ["train", "--resume", "killed"]
    done = stack(*arguments, "--json")
    assert done.code == 0, done.err
    weights = [
        (stack.folder / r / "checkpoints" / LAST / "model.safetensors").read_bytes()
        for r in ("straight", "killed")
    ]
    assert weights[0] == weights[1]
    series = [
        [json.loads(x) for x in (stack.folder / r / "metrics.jsonl").read_text().splitlines()]
        for r in ("straight", "killed")
    ]
    for a, b in zip(*series, strict=True):
        assert {k: v for k, v in a.items() if k != "tokens_per_s"} == {
            k: v for k, v in b.items() if k != "tokens_per_s"
        }
    assert (
        sum(
            json.loads(x)["event"] == "resumed"
            for x in (run / "events.jsonl").read_text().splitlines()
        )
        == 3
    )


def saved_steps(run) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in run.glob("checkpoints/step-*"))


def test_sigterm_saves_and_exits_75_and_sigusr1_saves_at_the_boundary_and_goes_on(stack, text_file):
    """Nothing else saves in this run: steps saved are the next multiple of the boundary after
    SIGUSR1, once, and the step of SIGTERM.
    """
    run, seldom = (
        stack.folder / "run",
        {f"{k}__every": "1000" for k in ("checkpoint", "eval")} | {"sample__every": "100"},
    )
    sets = sixty(text_file, **seldom, checkpoint__signal_boundary="10", train__max_steps="200")
    process = stack.begin("train", *sets, "--run-dir", "run")
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGUSR1)
    asked_by = len((run / "metrics.jsonl").read_text().splitlines())
    wait_for_step(run, asked_by + 12, process)
    assert process.poll() is None, "SIGUSR1 saves and the run goes on"
    (boundary,) = saved_steps(run)
    assert boundary % 10 == 0 and boundary < asked_by + 12
    process.send_signal(signal.SIGTERM)
    done = process.wait()
    assert (
        done.code == 75
        and "a checkpoint was requested; it comes after a multiple of 10 steps" in done.err
    ), done.err
    record = json.loads((run / "metadata.json").read_text())
    assert record["status"] == "preempted" and "--resume" in done.err
    assert (
        saved_steps(run) == [boundary, record["metrics"]["steps"]["value"]]
        and saved_steps(run)[1] >= asked_by + 12
    )
    done = stack("train", "--resume", "run", "--json")
    assert done.code == 0, done.err
    assert json.loads((run / "metadata.json").read_text())["id"] == record["id"]


def test_ctrl_c_saves_and_exits_130(stack, text_file):
    run = stack.folder / "run"
    process = stack.begin("train", *sixty(text_file), "--run-dir", "run")
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGINT)
    assert process.wait().code == 130
    assert json.loads((run / "metadata.json").read_text())["status"] == "interrupted"
    assert stack("inspect", "run", "--json").json["checksum"] == "VALID"


def test_resuming_a_finished_run_changes_nothing(stack, text_file):
    assert stack("train", *tiny(text_file, train__max_steps="9"), "--run-dir", "run").code == 0
    before = (stack.folder / "run" / "metadata.json").read_bytes()
    done = stack("train", "--resume", "run", "--json")
    assert (
        done.code == 0
        and done.json["status"] == "completed"
        and "nothing is left to do" in done.err
    )
    assert (stack.folder / "run" / "metadata.json").read_bytes() == before
    fork = ("train", "--fork", "run", "--run-dir", "child", "--set")
    assert_standard(stack(*fork, "optim.lr=1e-3"), 2, "step 9 of 9", "train.max_steps")
    assert not (stack.folder / "child").exists()
    with file_lock(stack.folder / "run", "run"):
        assert_standard(stack("train", "--resume", "run"), 2, "another run is writing to run")


def runtime_verdicts(record: dict) -> dict:
    runtime = {g.id for g in load_spec().gates.values() if g.moment == "runtime"}
    shown = ("verdict", "first_failure_step", "measured", "message")
    return {g["id"]: tuple(g[n] for n in shown) for g in record["gates"] if g["id"] in runtime}


def test_a_kill_between_the_last_checkpoint_and_the_record_loses_nothing(stack, text_file):
    assert stack("train", *tiny(text_file, train__max_steps="9"), "--run-dir", "run").code == 0
    path = stack.folder / "run" / "metadata.json"
    recorded = json.loads(path.read_text())
    before, verdicts = recorded["metrics"], runtime_verdicts(recorded)
    path.unlink()
    assert stack("train", "--resume", "run").code == 0
    recorded = json.loads(path.read_text())
    after = recorded["metrics"]
    same = (
        "steps",
        "tokens_seen",
        "train_loss_nats",
        "val_loss_nats",
        "val_bits_per_byte",
        "best_val_loss_nats",
        "ema_loss_nats",
    )
    assert {n: before[n] for n in same} == {n: after[n] for n in same}
    assert verdicts["loss.first"][0] == "pass"
    assert runtime_verdicts(recorded) == verdicts
