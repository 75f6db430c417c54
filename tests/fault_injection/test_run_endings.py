"""However a run ends, by a kill, a halt, a signal, a full disk or a clock set back, it leaves a
record or can be resumed, and then ends as one that nothing disturbed.
"""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from stackproof.config import ByteTokenizer, load_config
from stackproof.museum.collection import museum_config
from stackproof.spec import checksums
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentUnfit,
    GateFailed,
    IntegrityError,
    Stopped,
)
from stackproof.spec.gates import load_spec
from stackproof.spec.records import Artefact, read_record
from stackproof.train import checkpoint, checkpoint_folders, loop, start
from stackproof.train.restart import require_recorded
from stackproof.train.run_dir import RunDir
from stackproof.train.trainer import Callback
from tests.fault_injection.nine_steps import (
    EVERY,
    STEPS,
    Dead,
    Ending,
    begin,
    environment_with,
    killed,
    resume,
    waived,
)
from tests.fault_injection.runs import assert_same_end
from tests.fault_injection.scale import STRESS

pytestmark = pytest.mark.usefixtures("few_gates")


# --- one end, whatever came between ---------------------------------------------------------------


EACH_STEP = [("on_step_end", step) for step in range(1, STEPS + 1)]
EACH_SAVE = [
    (hook, step) for hook in ("on_save", "on_saved") for step in range(EVERY, STEPS + 1, EVERY)
]
SOME = EACH_STEP[::4] + EACH_SAVE[::2]


def begin_child(cfg, run, parent, *callbacks, continued):
    changed, overrides = load_config(cfg, sets=["curriculum.probe_every=5"])
    options = {"parent": parent, "continued": continued}
    return loop.train(start.fresh(changed, overrides, run, callbacks, **options))


def kill_child(cfg, run, parent, step, *, continued):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(start, "recorded", lambda trainer: nullcontext())
        begin_child(cfg, run, parent, Ending(Dead(), step), continued=continued)
    return run


@pytest.mark.parametrize("continued", [False, True])
def test_a_killed_child_ends_as_a_straight_one(cfg, tmp_path, continued):
    parent = killed(cfg, tmp_path / "parent", 4)
    begin_child(cfg, tmp_path / "straight", parent, continued=continued)
    run = kill_child(cfg, tmp_path / "child", parent, 7, continued=continued)
    record = resume(run)
    assert record.parents and any("continuation" in o.path for o in record.outputs) == continued
    assert_same_end(tmp_path / "straight", run, "a child killed after step 7")


@pytest.mark.parametrize("at", [None, 0])
def test_a_child_without_a_checkpoint_does_not_begin_at_the_seed(cfg, interrupted, tmp_path, at):
    run = kill_child(cfg, tmp_path / "child", interrupted, 7, continued=False)
    with pytest.raises(CheckpointError, match="began at a checkpoint of another run"):
        resume(run, at=at)


@pytest.mark.parametrize("change", ["eval.batches=3", "eval.batches=7", "eval.batch_size=2"])
def test_a_child_with_other_held_out_batches_seeks_its_best_step_anew(
    cfg, interrupted, tmp_path, change
):
    changed, overrides = load_config(cfg, sets=[change])
    options = {"parent": interrupted}
    record = loop.train(start.fresh(changed, overrides, tmp_path / "child", **options))
    losses = [json.loads(x) for x in (tmp_path / "child/metrics.jsonl").read_text().splitlines()]
    own = [x["val_loss_nats"] for x in losses if x.get("val_loss_nats")]
    assert record.metric("best_val_loss_nats") == min(own)
    state = checkpoint.load_document(checkpoint.find(tmp_path / "child"))
    assert state["stopper"]["rounds"] == len(own) == 1
    gate = next(g for g in record.gates if g.id == "evaluation.same-batches")
    assert (gate.verdict, gate.checks) == ("pass", 1)


def rounds(run):
    return checkpoint.load_document(checkpoint.find(run))["stopper"]["rounds"]


def test_a_child_on_the_same_held_out_batches_keeps_the_best_step(cfg, interrupted, tmp_path):
    """Another key of the data, which changes no batch."""
    changed, overrides = load_config(cfg, sets=["data.verify=size"])
    loop.train(start.fresh(changed, overrides, tmp_path / "child", parent=interrupted))
    assert rounds(tmp_path / "child") == rounds(interrupted) + 1


def test_a_child_on_other_text_seeks_its_best_step_again(cfg, museum_folder, tmp_path):
    """The configuration is the same: it names files, whose text is another."""
    shutil.copytree(museum_folder, tmp_path / "texts")
    base = museum_config(tmp_path / "texts")
    data = base.data.model_copy(update={"tokenizer": ByteTokenizer()})
    small = cfg.model_copy(update={"data": data})
    begin(small, tmp_path / "parent")
    for path in (Path(p) for source in data.corpus.sources for p in source.paths):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[4:]))
    longer, overrides = load_config(small, sets=[f"train.max_steps={STEPS + EVERY}"])
    options = {"parent": tmp_path / "parent"}
    record = loop.train(start.fresh(longer, overrides, tmp_path / "child", **options))
    assert record.succeeded and rounds(tmp_path / "child") == 1


def test_a_changed_file_of_the_parent_is_refused_in_a_child(cfg, tmp_path):
    parent = killed(cfg, tmp_path / "parent", 4)
    run = kill_child(cfg, tmp_path / "child", parent, 7, continued=True)
    (run / "continuation.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"continuation\.json is not the file that the run"):
        resume(run)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("../outside", "a path that leaves the run"),
        ("a\0b", "no readable"),
        ("a" * 5000, "no read"),
    ],
)
def test_a_child_states_only_files_of_its_own(tmp_path, path, found):
    (tmp_path / "outside").write_bytes(b"x")
    stated = Artefact(name="x", path=path, bytes=1, sha256=sha256_bytes(b"x"))
    (tmp_path / "run").mkdir()
    with pytest.raises(IntegrityError, match=found):
        require_recorded(tmp_path / "run", [stated])


@pytest.mark.parametrize(("after", "step"), EACH_STEP + EACH_SAVE if STRESS else SOME)
def test_a_kill_after_any_step_and_save_ends_as_a_straight_run(
    cfg, straight, tmp_path, step, after
):
    run = killed(cfg, tmp_path / "run", step, after)
    resume(run)
    assert_same_end(straight, run, f"killed at {after} of step {step}")


def test_an_early_stop_that_lost_its_record_is_not_trained_further(cfg, tmp_path):
    stops = {"kind": "patience", "patience": 2, "min_evaluations": 2, "min_delta_nats": 100.0}
    early, _ = load_config(cfg, sets=[f"stop.{k}={json.dumps(v)}" for k, v in stops.items()])
    early = early.model_copy(update={"eval": early.eval.model_copy(update={"every": 2})})
    record = begin(early, tmp_path / "run")
    assert record.status == "early_stopped" and record.metric("steps") == 6
    (tmp_path / "run" / "metadata.json").unlink()
    again = resume(tmp_path / "run")
    assert (again.status, again.end_reason) == (record.status, record.end_reason)
    assert again.metric("steps") == 6


def test_a_kill_between_record_and_checksums_leaves_an_ended_run(finished, straight):
    """The record is there, so nothing is left to train."""
    (finished / checksums.FILE).unlink()
    (finished / f".{checksums.FILE}.123.tmp").write_bytes(b"half")
    before = (finished / "metadata.json").read_bytes()
    changed, overrides = load_config(start.read_config(finished))
    assert start.completed(finished, overrides, changed).succeeded
    assert (finished / "metadata.json").read_bytes() == before
    assert_same_end(straight, finished, "killed before SHA256SUMS")


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.json"])
def test_without_checksums_an_ended_run_is_compared_with_its_record(finished, name):
    """Checksums written now would vouch for a file that nobody has compared."""
    (finished / checksums.FILE).unlink()
    (finished / name).write_bytes((finished / name).read_bytes() + b"\n")
    changed, overrides = load_config(start.read_config(finished))
    with pytest.raises(IntegrityError, match=f"{name} is not the file that the run states"):
        start.completed(finished, overrides, changed)
    assert not (finished / checksums.FILE).exists()


# --- halts, signals, disks and clocks -------------------------------------------------------------


def halted(cfg, run, monkeypatch):
    """A run that runtime.finite halts at step 8, for a reason that is gone at a resume."""
    with monkeypatch.context() as patch:
        take = loop.steps.train_step

        def broken(state, batches):
            report = take(state, batches)
            if state.step == 8:
                report.loss_nats = float("nan")
            return report

        patch.setattr(loop.steps, "train_step", broken)
        with pytest.raises(GateFailed, match=r"runtime\.finite"):
            begin(cfg, run)
    return run


def test_a_carried_verdict_outlives_another_kill(cfg, tmp_path, monkeypatch):
    run = halted(cfg, tmp_path / "run", monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(start, "recorded", lambda trainer: nullcontext())
        resume(run, waived("runtime.finite"), callbacks=[Ending(Dead(), 7)])
    record = resume(run, waived("runtime.finite"))
    gate = next(g for g in record.gates if g.id == "runtime.finite")
    assert (gate.verdict, gate.first_failure_step) == ("fail", 8)


def test_a_halted_run_is_not_resumed_into_a_green_record(cfg, tmp_path, monkeypatch):
    run = halted(cfg, tmp_path / "run", monkeypatch)
    before = (run / "metadata.json").read_bytes()
    with pytest.raises(ConfigError, match=r"runtime\.finite halted this run at step 8"):
        resume(run)
    assert (run / "metadata.json").read_bytes() == before
    record = resume(run, waived("runtime.finite"))
    gate = next(g for g in record.gates if g.id == "runtime.finite")
    assert record.status == "completed"
    assert (gate.verdict, gate.first_failure_step) == ("fail", 8)
    assert gate.waiver and gate.waiver.reason == "memory was replaced"


class Signal(Callback):
    """Sends signals to this process, at a preflight phase or after a step."""

    def __init__(self, *numbers, step=None):
        self.numbers, self.step = numbers, step

    def _send(self):
        for number in self.numbers:
            os.kill(os.getpid(), number)

    def on_phase(self, name):
        if self.step is None and name == "preflight":
            self._send()

    def on_step(self, trainer, report):
        if report.step == self.step:
            self._send()


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_in_preflight_ends_with_a_record_and_the_run_is_begun_again(
    cfg, straight, tmp_path, number, code, status
):
    run = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        begin(cfg, run, Signal(number))
    assert stopped.value.exit_code == code
    assert read_record(run / "metadata.json").status == status
    begin(cfg, run)
    assert_same_end(straight, run, status)


def test_a_signal_in_the_preflight_of_a_resume_leaves_the_record_of_the_checkpoint(
    cfg, straight, tmp_path
):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        begin(cfg, run, Signal(signal.SIGTERM, step=6))
    former = read_record(run / "metadata.json")
    with pytest.raises(Stopped):
        resume(run, callbacks=[Signal(signal.SIGTERM)])
    record = read_record(run / "metadata.json")
    assert record.end_reason == "stopped at once by SIGTERM, after step 6"
    for name in ("steps", "tokens_seen", "train_loss_nats", "ema_loss_nats", "train_s"):
        assert record.metric(name) == former.metric(name), name
    saved = checkpoint.load(checkpoint.find(run)).state["gates"]
    assert [g.id for g in record.gates] == [g.id for g in former.gates]
    for gate in record.gates:
        assert (gate.verdict, gate.checks) == (saved[gate.id]["outcome"], saved[gate.id]["checks"])
    resume(run)
    assert_same_end(straight, run, "SIGTERM in the preflight of a resume")


def test_a_red_gate_in_the_preflight_of_a_resume_leaves_a_record_of_the_checkpoint(
    interrupted, straight, monkeypatch
):
    """Its logs end at the checkpoint as well, and it states which process took the steps."""

    def preflight(trainer, n_eval_batches):
        raise GateFailed("a gate of preflight is red")

    with monkeypatch.context() as patch, environment_with(threads=77), pytest.raises(GateFailed):
        patch.setattr(start, "run_preflight", preflight)
        resume(interrupted)
    record = read_record(interrupted / "metadata.json")
    assert (record.status, record.metric("steps")) == ("halted", 6)
    assert any(t.startswith("steps 1 to 6 ") and ", now 77" in t for t in record.not_covered)
    lines = (interrupted / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert record.metric("train_loss_nats") == json.loads(lines[-1])["loss_nats"]
    resume(interrupted)
    assert_same_end(straight, interrupted, "red in the preflight of a resume")


def test_a_request_for_a_checkpoint_in_preflight_does_not_end_the_run(cfg, tmp_path):
    boundary = cfg.checkpoint.model_copy(update={"every": 100, "signal_boundary": 4})
    early = cfg.model_copy(update={"checkpoint": boundary})
    assert begin(early, tmp_path / "run", Signal(signal.SIGUSR1)).status == "completed"
    assert 4 in [
        checkpoint_folders.step_of(p)
        for p in checkpoint_folders.step_folders(tmp_path / "run/checkpoints")
    ]


def test_a_scheduler_that_repeats_sigterm_gets_its_checkpoint(cfg, straight, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped, match="preempted after step 4; its checkpoint is good"):
        begin(cfg, run, Signal(*[signal.SIGTERM] * 3, step=4))
    assert checkpoint.load(checkpoint.find(run)).state["step"] == 4
    resume(run)


def test_a_second_ctrl_c_ends_at_once_with_a_record(cfg, straight, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        begin(cfg, run, Signal(signal.SIGINT, signal.SIGINT, step=4))
    record = read_record(run / "metadata.json")
    assert stopped.value.exit_code == 130 and record.status == "interrupted"
    assert checkpoint.load(checkpoint.find(run)).state["step"] == 3
    resume(run)
    assert_same_end(straight, run, "twice Ctrl-C")


def test_a_disk_without_room_is_refused_before_step_1(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folders, "free_bytes", lambda root: 1000)
    with pytest.raises(EnvironmentUnfit, match="no room for 2 checkpoint") as error:
        begin(cfg, tmp_path / "run")
    assert "1000 bytes free" in str(error.value.value)


def test_a_disk_that_fills_up_ends_with_a_record_and_the_run_goes_on_later(
    cfg, straight, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    free = checkpoint_folders.free_bytes
    with monkeypatch.context() as patch:
        full = lambda root: 1000 if (run / "checkpoints/step-00000003").exists() else free(root)  # noqa: E731
        patch.setattr(checkpoint_folders, "free_bytes", full)
        with pytest.raises(EnvironmentUnfit, match="no room for 1 checkpoint"):
            begin(cfg, run)
    record = read_record(run / "metadata.json")
    assert (record.status, record.exit_code) == ("failed", 7)
    resume(run)
    assert_same_end(straight, run, "a full disk")


def test_a_clock_that_is_set_back_leaves_a_valid_record(tmp_path, monkeypatch):
    import datetime as dt

    builder = RecordBuilder("train", load_spec(), {}, "claim", ("nothing",))
    earlier = builder.started - dt.timedelta(days=2)
    monkeypatch.setattr("stackproof.spec.building.utc_now", lambda: earlier)
    for resumed in (False, True):
        if resumed:
            builder.continue_record(builder.id, builder.started.isoformat())
        record = builder.finish(tmp_path, status="completed", end_reason="x", exit_code=0)
        assert record.wall_s >= 0 and record.finished_at >= record.started_at


def test_leftovers_of_killed_writes_are_cleared_away(interrupted, straight):
    (interrupted / ".run.json.1.tmp").write_bytes(b"half")
    (interrupted / "checkpoints/.latest.1.tmp").write_bytes(b"half")
    (interrupted / "checkpoints/.writing-step-00000009-1").mkdir()
    resume(interrupted)
    assert_same_end(straight, interrupted, "leftovers")


def test_the_logs_of_a_run_that_never_began_are_not_kept(cfg, straight, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    RunDir(run).log("gates.jsonl", gate="runtime.finite", step=None, verdict="pass")
    begin(cfg, run)
    assert_same_end(straight, run, "begun again")


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a name that is no text"])
def test_what_lies_beside_a_run_does_not_change_its_ending(cfg, tmp_path, in_process, kind):
    run = tmp_path / "run"

    class Placing(Callback):
        def on_step(self, trainer, report):
            if report.step != 2:
                return
            match kind:
                case "a link":
                    (run / "data").symlink_to("/etc")
                case "a pipe":
                    os.mkfifo(run / "notes")
                case _:
                    with open(os.fsencode(run) + b"/caf\xe9.txt", "wb"):
                        pass

    assert begin(cfg, run, Placing()).status == "completed"
    assert read_record(run / "metadata.json").status == "completed"
    code, found = in_process("inspect", run, "--verify")
    (problem,) = found["problems"]
    assert code == 5 and problem.endswith("is no regular file with a printable name")


def test_checksums_that_cannot_be_written_leave_the_record(cfg, tmp_path, monkeypatch):
    def full(folder, paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write_checksums", full)
    assert begin(cfg, tmp_path / "run").status == "completed"
    assert read_record(tmp_path / "run/metadata.json").status == "completed"
