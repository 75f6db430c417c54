"""Checkpoints written behind training: the same files, later; and nothing lost when one fails."""

import errno
import json
import threading

import pytest

from stackproof import tensorfolder
from stackproof.config import NeverStop
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import CheckpointError
from stackproof.spec.records import read_record
from stackproof.train import checkpoint, checkpoint_folders
from stackproof.train.loop import train
from stackproof.train.start import fresh
from stackproof.train.trainer import Callback

FEW = ("runtime.finite", "checkpoint.reloads")


@pytest.fixture
def cfg(museum_folder):
    base = museum_config(museum_folder)
    train = base.train.model_copy(update={"max_steps": 9})
    return base.model_copy(update={"train": train, "stop": NeverStop()})


def saving(cfg, async_save: bool):
    return cfg.model_copy(
        update={
            "checkpoint": cfg.checkpoint.model_copy(
                update={"every": 3, "keep": 9, "async_save": async_save}
            )
        }
    )


def tensor_files(run_dir) -> dict[str, str]:
    """sha256 of every tensor file of a run's checkpoints."""
    manifests = {
        p.parent.name: json.loads(p.read_bytes())["files"]
        for p in run_dir.glob("checkpoints/step-*/manifest.json")
    }
    return {
        f"{step}/{name}": entry["sha256"]
        for step, files in manifests.items()
        for name, entry in files.items()
        if "crc32" in entry
    }


def test_asynchronous_checkpoints_hold_what_synchronous_ones_hold(cfg, tmp_path):
    for name, async_save in (("sync", False), ("async", True)):
        train(fresh(saving(cfg, async_save), (), tmp_path / name, only=FEW))
    files = tensor_files(tmp_path / "async")
    assert files == tensor_files(tmp_path / "sync")
    assert {
        f"{s}/{f}.safetensors"
        for s in ("step-00000003", "step-00000006", "step-00000009")
        for f in ("model", "state")
    } <= set(files)
    assert (tmp_path / "async/checkpoints/latest").read_text() == "step-00000009"


@pytest.mark.parametrize(("async_save", "goes_on"), [(True, True), (False, False)])
def test_training_goes_on_while_the_disk_is_busy(cfg, tmp_path, monkeypatch, async_save, goes_on):
    """The first write waits until a later step is taken; in line that step never comes,
    and the wait ends by itself.
    """
    later, waited, write = threading.Event(), [], checkpoint.write

    def slow(root, snapshot, judge):
        if not waited:
            waited.append(later.wait(timeout=60 if goes_on else 1))
        return write(root, snapshot, judge)

    class Watching(Callback):
        def on_step(self, trainer, report):
            if report.step == 4:
                later.set()

    monkeypatch.setattr(checkpoint, "write", slow)
    record = train(fresh(saving(cfg, async_save), (), tmp_path / "run", [Watching()], only=FEW))
    assert waited == [goes_on]
    assert (
        record.succeeded
        and next(g for g in record.gates if g.id == "checkpoint.reloads").checks >= 3
    )


def test_a_write_that_fails_behind_ends_the_run_and_leaves_the_one_before(
    cfg, tmp_path, monkeypatch
):
    calls, write = [], tensorfolder.write

    def full(folder, content):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(folder, content)

    monkeypatch.setattr(tensorfolder, "write", full)
    with pytest.raises(CheckpointError, match="step 6 could not be written"):
        train(fresh(saving(cfg, True), (), tmp_path / "run", only=("runtime.finite",)))
    record = read_record(tmp_path / "run/metadata.json")
    assert (record.status, record.exit_code) == ("failed", 5)
    assert checkpoint.load(checkpoint.find(tmp_path / "run")).state["step"] == 3


def test_two_failures_at_once_are_both_told(cfg, tmp_path, monkeypatch):
    """While a checkpoint fails behind, the run ends for another reason: that one travels on,
    the save's is an event.
    """
    monkeypatch.setattr(
        tensorfolder,
        "write",
        lambda folder, content: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )

    class Broken(Callback):
        def on_step(self, trainer, report):
            if report.step == 4:
                raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(fresh(saving(cfg, True), (), tmp_path / "run", [Broken()], only=("runtime.finite",)))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert next(e["message"] for e in events if e["event"] == "save_failed").startswith(
        "the checkpoint of step 3 could not be written"
    )
    assert read_record(tmp_path / "run/metadata.json").end_reason == "RuntimeError: something else"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC])
def test_a_refused_save_states_what_refused_it_and_a_step_that_is_there(tmp_path, begun, number):
    """A run can be continued from run.json on."""
    root = tmp_path / "checkpoints"
    if begun:
        (tmp_path / "run.json").touch()
    error = checkpoint_folders.not_written(root, 3, OSError(number, "refused"))
    limited = number == errno.EFBIG
    assert ("ulimit -f" in error.value) == limited and ("bytes free" in error.value) != limited
    solved = "raise the limit" if limited else "free space"
    again = f"stack train --resume {tmp_path}" if begun else "give the command again"
    assert error.next_step == f"{solved}, then {again}"
