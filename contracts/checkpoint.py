"""Gates of checkpoints: what is stored is complete, durable, verified, and an interrupted run
equals an uninterrupted one.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from stackproof.contracts.events import Evaluated, Event, Finished, Started, StateRestored
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    failed,
    first_of,
    passed,
)
from stackproof.contracts.subject import Subject, TraineeOptions


@decides("checkpoint.reloads")
def reloads(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """What a save has written, read back, is the live state bit for bit, with one tensor where head
    and embedding are one, and its files are as their format declares.

    Processes that hold one model are compared first. Without a reload the verdict is not_run.
    """
    saved = subject.saved
    live = saved.live_checksums
    if saved.replica_checksums is not None:
        apart = _differing(live, saved.replica_checksums)
        if len(apart) > limits.differing_max:
            return failed(
                f"two processes hold {len(apart)} other tensor(s): {first_of(apart, 4)}",
                differing=len(apart),
                compared=len(live),
            )
    differing = _differing(live, saved.reloaded_checksums)
    live_tied, reloaded_tied = saved.tied
    return decide_all(
        [
            *saved.format_problems,
            not live and "no tensor of the live model was compared",
            live_tied != reloaded_tied
            and (
                f"embedding and head are {'one tensor' if live_tied else 'two tensors'}, loaded "
                "again they are not"
            ),
            len(differing) > limits.differing_max
            and (
                f"{len(differing)} tensor(s), loaded again, are not the live ones: "
                f"{first_of(differing, 4)}"
            ),
        ],
        differing=len(differing),
        compared=len(live),
        live_tied=live_tied,
        reloaded_tied=reloaded_tied,
    )


def _differing(live: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of tensors that differ, or that one side lacks."""
    return sorted(n for n in live.keys() | other.keys() if live.get(n) != other.get(n))


class _Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@contextmanager
def _fault(target: str, at: int, error: BaseException) -> Iterator[list[int]]:
    """Make the `at`-th call of `os.<target>` raise; yields a one-element call counter."""
    original, calls = getattr(os, target), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise error
        return original(*args, **kwargs)

    with mock.patch.object(os, target, wrapper):
        yield calls


@decides("checkpoint.durability")
def durability(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Whatever breaks during a save, an error is raised and a loadable checkpoint remains; damaged
    ones are refused.
    """
    load = subject.checkpoints.load_step

    def save(root: Path, step: int) -> None:
        options = TraineeOptions(tiny=True, updates_done=step)
        subject.checkpoints.save(subject.training.trainee(options), root)

    with tempfile.TemporaryDirectory(prefix="stackproof-durability-") as temporary:
        root = Path(temporary)
        save(root, 1)
        faults = 0
        for target in ("fsync", "replace"):
            for at in range(1, int(limits.faults_per_call_min) + 1):
                for error in (OSError(errno.ENOSPC, "No space left on device"), _Killed()):
                    problem = _survives(root, target, at, error, save, load)
                    if problem:
                        return failed(
                            f"{type(error).__name__} at os.{target} #{at}: {problem}", faults=faults
                        )
                    faults += 1
        accepted = [name for name, damage in _DAMAGES.items() if not _refuses(root, damage, load)]
        if accepted:
            return failed(
                f"a damaged checkpoint was loaded: {', '.join(accepted)}",
                damages_accepted=len(accepted),
                faults=faults,
            )
    return passed("", faults=faults, damages_refused=len(_DAMAGES))


def _survives(
    root: Path, target: str, at: int, error: BaseException, save: Callable, load: Callable
) -> str:
    """What went wrong under one injected fault; empty if nothing."""
    before = load(root)
    raised = False
    with _fault(target, at, error) as calls:
        try:
            save(root, before + 1)
        except (Exception, _Killed):
            raised = True
    if calls[0] < at:
        return "" if at > 2 else f"a save never calls os.{target}, so it cannot be durable"
    if not raised:
        return "the save reported success"
    try:
        after = load(root)
    except Exception as e:
        return f"no loadable checkpoint remains ({type(e).__name__})"
    return "" if after in (before, before + 1) else f"latest went from step {before} to {after}"


def _tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _flip(folder: Path) -> None:
    path = _tensor_files(folder)[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(bytes(data))


def _truncate(folder: Path) -> None:
    path = _tensor_files(folder)[-1]
    path.write_bytes(path.read_bytes()[:-16])


def _drop_key(folder: Path) -> None:
    """Remove the loss scale and re-hash, as a consistent but incomplete writer would."""
    state = json.loads((folder / "state.json").read_bytes())
    del state["scaler"]
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["state.json"] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())


def _pickle_instead(folder: Path) -> None:
    _tensor_files(folder)[0].write_bytes(b"\x80\x04\x95" + b"\x00" * 64)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": _flip,
    "a truncated file": _truncate,
    "a missing key": _drop_key,
    "a pickle": _pickle_instead,
}


def _refuses(root: Path, damage: Callable[[Path], None], load: Callable) -> bool:
    copy = root.parent / (root.name + "-damaged")
    shutil.copytree(root, copy)
    damage(copy / (copy / "latest").read_text().strip())
    try:
        load(copy)
    except Exception:
        return True
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return False


@decides("checkpoint.resume-equivalence")
def resume_equivalence(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """A run interrupted twice, once before an epoch's end and once after it, equals the
    uninterrupted one bit for bit.
    """
    checkpoints, epoch_rows = subject.checkpoints, subject.data_loader.n_rows
    rows_per_step = sum(len(batch.input_ids) for batch in subject.training.trainee().draw())
    first_row = max(0, epoch_rows - 2 * rows_per_step)
    options = TraineeOptions(first_row=first_row)
    trainee = subject.training.trainee(options)
    losses = [trainee.advance() for _ in range(4)]
    expected = trainee.digest()
    del trainee  # one at a time: a large model's state is most of the memory that is needed
    with tempfile.TemporaryDirectory(prefix="stackproof-resume-") as temporary:
        trainee, resumed_losses = subject.training.trainee(options), []
        for part, n in enumerate((1, 2, 1)):
            resumed_losses += [trainee.advance() for _ in range(n)]
            if part < 2:
                checkpoints.save(trainee, Path(temporary) / str(part))
                del trainee
                trainee = checkpoints.resume(Path(temporary) / str(part))
        got = trainee.digest()
    differing = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
    if losses != resumed_losses:
        differing.insert(0, "losses")
    crossed = expected["cursor"] > epoch_rows
    text = f"a resumed run differs from the straight one in {', '.join(differing[:5])}"
    return decide(
        len(differing) <= limits.differing_parts_max and crossed,
        text
        if crossed
        else f"the run has drawn {expected['cursor']} rows, no more than the {epoch_rows} of an "
        "epoch",
        differing_parts=len(differing),
        compared_parts=len(expected),
        crossed_epoch_end=crossed,
    )


@decides("checkpoint.pointers")
class Pointers(RuntimeCheck):
    """At the end of a run `latest` names the folder of its last step, and `best` that of its lowest
    held-out loss; both folders are there.

    A child run whose lowest loss is its parent's has no folder of that.
    """

    events = (Started, Evaluated, Finished)
    kept = ("least_nats", "least_step")

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.least_nats, self.least_step, self.began = math.inf, 0, 0

    def observe(self, event: Event) -> Verdict | None:
        match event:
            case Started():
                self.began = event.step
            case Evaluated() if event.loss_nats < self.least_nats:
                self.least_nats, self.least_step = event.loss_nats, event.step
            case Finished():
                return self._judge(event)
        return None

    def _judge(self, event: Finished) -> Verdict:
        inherited = event.best_step is None and self.least_step <= self.began
        wrong = [
            (
                f"{name} names "
                f"{f'step {named}' if named is not None else 'no folder that is there'}, not step "
                f"{meant}"
            )
            for name, named, meant in (
                ("latest", event.latest_step, event.step),
                ("best", event.best_step, self.least_step),
            )
            if named != meant and not (name == "best" and inherited)
        ]
        return decide(
            len(wrong) <= self.limits.wrong_max,
            "; ".join(wrong),
            wrong=len(wrong),
            best_step=self.least_step,
        )


@decides("checkpoint.state-restored")
class Restored(RuntimeCheck):
    """Weights, optimizer, schedule, random state and data continue where the checkpoint left
    them.
    """

    events = (StateRestored,)

    def observe(self, event: StateRestored) -> Verdict:
        return decide(
            len(event.differing) <= self.limits.differing_max and event.compared > 0,
            f"step {event.step}: not as saved: {first_of(event.differing, 5)}",
            differing=len(event.differing),
            compared=event.compared,
        )
