"""Gates of checkpoints: what is stored is complete, durable, verified, and an interrupted run
equals an uninterrupted one.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from stackproof.contracts.events import Evaluated, Event, Finished, Started, StateRestored
from stackproof.contracts.gate import (
    RuntimeCheck,
    Stateless,
    Verdict,
    decide,
    decides,
    failed,
    first_of,
    passed,
)
from stackproof.contracts.subject import SavedCheckpoint, Subject, TraineeOptions

FILES = ("model.safetensors", "state.safetensors", "state.json", "manifest.json")
REQUIRED_STATE = tuple(
    (
        "step cursor curriculum tokens_seen scaler stopper gates config config_sha256 "
        "tokenizer_sha256"
    ).split()
)


def _contents(path: Path) -> tuple[str, dict[str, int]]:
    """sha256 of a file, and crc32 of every tensor's bytes in it,
    read with nothing but the format's definition.
    """
    with (
        open(path, "rb") as f,
        mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        (length,) = struct.unpack("<Q", view[:8])
        header = json.loads(bytes(view[8 : 8 + length]))
        spans = {n: e["data_offsets"] for n, e in header.items() if n != "__metadata__"}
        crcs = {}
        for name, (start, stop) in spans.items():
            with view[8 + length + start : 8 + length + stop] as body:
                crcs[name] = zlib.crc32(body)
        return hashlib.sha256(view).hexdigest(), crcs


@decides("checkpoint.reloads")
def reloads(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """What a save has written, read back, is the live state bit for bit, with one tensor where head
    and embedding are one.

    A folder in the format of `stack train` is read here, without its loader, and must be complete:
    every declared key, matching hashes, no pickle, and `latest` names it. Elsewhere the trainer's
    own loader has read the tensors. Checksums are no defence against intent; the sha256 of the
    manifest are.
    """
    saved = subject.saved
    if saved.folder is None:
        return _reloaded(limits, saved)
    folder, live = saved.folder, saved.live_checksums
    if missing := [f for f in FILES if not (folder / f).is_file()]:
        return failed(f"{folder.name} lacks {', '.join(missing)}", missing_files=len(missing))
    if strangers := sorted(p.name for p in folder.iterdir() if p.name not in FILES):
        return failed(
            f"{folder.name} holds undeclared files: {', '.join(strangers)}",
            strangers=len(strangers),
        )
    (model_sha256, weights), (state_sha256, moments) = (_contents(folder / f) for f in FILES[:2])
    stored = weights | moments
    if odd := sorted(stored.keys() ^ live.keys()):
        return failed(
            f"stored and live tensors differ in name: {', '.join(odd[:4])}", differing=len(odd)
        )
    if wrong := sorted(n for n in stored if stored[n] != live[n]):
        return failed(f"stored tensor {wrong[0]} is not the live one", differing=len(wrong))
    state = json.loads((folder / "state.json").read_bytes())
    if absent := [k for k in REQUIRED_STATE if k not in state]:
        return failed(f"state.json lacks {', '.join(absent)}", absent_keys=len(absent))
    if "rng.cpu" not in moments:
        return failed("state.safetensors lacks the random state", absent_keys=1)
    manifest = json.loads((folder / "manifest.json").read_bytes())["files"]
    document_sha256 = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    actual = dict(zip(FILES, (model_sha256, state_sha256, document_sha256), strict=False))
    if bad := [f for f in actual if manifest.get(f, {}).get("sha256") != actual[f]]:
        return failed(f"the manifest does not describe {', '.join(bad)}", bad_hashes=len(bad))
    if state["step"] != saved.step:
        return failed(
            f"the folder says step {state['step']}, the run was at {saved.step}",
            stored_step=state["step"],
        )
    latest = (folder.parent / "latest").read_text().strip()
    return decide(
        latest == folder.name,
        f"latest names {latest}",
        differing=0,
        compared=len(stored),
    )


def _reloaded(limits: SimpleNamespace, saved: SavedCheckpoint) -> Verdict:
    """The live tensors against those that the trainer's own loader has read."""
    live, reloaded, (live_tied, reloaded_tied) = (
        saved.live_checksums,
        saved.reloaded_checksums,
        saved.tied,
    )
    differing = sorted(n for n in live.keys() | reloaded.keys() if live.get(n) != reloaded.get(n))
    text = (
        f"saved and loaded again, {len(differing)} tensor(s) are others: {', '.join(differing[:4])}"
    )
    if live_tied != reloaded_tied:
        text = (
            f"embedding and head are {'one tensor' if live_tied else 'two tensors'}, loaded again "
            f"they are not; {text}"
        )
    return decide(
        bool(live) and len(differing) <= limits.differing_max and live_tied == reloaded_tied,
        text if live else "no tensor of the live model was compared",
        differing=len(differing),
        compared=len(live),
        live_tied=live_tied,
        reloaded_tied=reloaded_tied,
    )


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


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 0x40
    (folder / "model.safetensors").write_bytes(bytes(data))


def _truncate(folder: Path) -> None:
    path = folder / "state.safetensors"
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
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"\x00" * 64)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": _flip,
    "a truncated file": _truncate,
    "a missing key": _drop_key,
    "a pickle": _pickle_instead,
}


def _refuses(root: Path, damage: Callable[[Path], None], load: Callable) -> bool:
    copy = root.parent / (root.name + "-damaged")
    shutil.copytree(root, copy)
    try:
        damage(copy / (copy / "latest").read_text().strip())
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
    crossed = first_row + 4 * rows_per_step > epoch_rows
    return decide(
        len(differing) <= limits.differing_parts_max,
        f"a resumed run differs from the straight one in {', '.join(differing[:5])}",
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

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.least_nats, self.least_step, self.began = limits, math.inf, 0, 0

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

    def state_dict(self) -> dict:
        return (
            {"least_nats": self.least_nats, "least_step": self.least_step}
            if self.least_step
            else {}
        )

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@decides("checkpoint.state-restored")
class Restored(Stateless):
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
