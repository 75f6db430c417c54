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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from stackproof.contracts.events import Evaluated, Event, Finished, Started, StateRestored
from stackproof.contracts.gate import Stateless, Verdict, decide, decides, failed, first_of, passed

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


@decides("checkpoint.contract")
def contract(
    limits: SimpleNamespace,
    *,
    checkpoint_dir: Path,
    live_crc32: Mapping[str, int],
    expected_step: int,
) -> Verdict:
    """A saved folder holds exactly the live state, every declared key, no pickle, matching hashes,
    and `latest` names it.

    `live_crc32` are checksums of the parameters, buffers, moments (`optim.<parameter>.<field>`) and
    random states (`rng.cpu`) in memory at the moment of the save, taken without the writer's help.
    They are no defence against intent; the sha256 of the manifest are.
    """
    if missing := [f for f in FILES if not (checkpoint_dir / f).is_file()]:
        return failed(
            f"{checkpoint_dir.name} lacks {', '.join(missing)}", missing_files=len(missing)
        )
    strangers = sorted(p.name for p in checkpoint_dir.iterdir() if p.name not in FILES)
    if strangers:
        return failed(
            f"{checkpoint_dir.name} holds files nobody declared: {', '.join(strangers)}",
            strangers=len(strangers),
        )
    (model_sha256, weights), (state_sha256, moments) = (
        _contents(checkpoint_dir / f) for f in FILES[:2]
    )
    stored = weights | moments
    if stored.keys() != live_crc32.keys():
        odd = sorted(stored.keys() ^ live_crc32.keys())
        return failed(
            f"stored and live tensors differ in name: {', '.join(odd[:4])}",
            differing_names=len(odd),
        )
    if wrong := sorted(n for n in stored if stored[n] != live_crc32[n]):
        return failed(f"stored tensor {wrong[0]} is not the live one", differing_tensors=len(wrong))
    state = json.loads((checkpoint_dir / "state.json").read_bytes())
    if absent := [k for k in REQUIRED_STATE if k not in state]:
        return failed(f"state.json lacks {', '.join(absent)}", absent_keys=len(absent))
    if "rng.cpu" not in moments:
        return failed("state.safetensors lacks the random state", absent_keys=1)
    manifest = json.loads((checkpoint_dir / "manifest.json").read_bytes())["files"]
    document_sha256 = hashlib.sha256((checkpoint_dir / "state.json").read_bytes()).hexdigest()
    actual = dict(zip(FILES, (model_sha256, state_sha256, document_sha256), strict=False))
    if bad := [f for f in actual if manifest.get(f, {}).get("sha256") != actual[f]]:
        return failed(f"the manifest does not describe {', '.join(bad)}", bad_hashes=len(bad))
    if state["step"] != expected_step:
        return failed(
            f"the folder says step {state['step']}, the run was at {expected_step}",
            stored_step=state["step"],
        )
    latest = (checkpoint_dir.parent / "latest").read_text().strip()
    return decide(
        latest == checkpoint_dir.name,
        f"latest names {latest}",
        tensors=len(stored),
        differing_tensors=0,
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
def durability(
    limits: SimpleNamespace, *, save_checkpoint: Callable, load_checkpoint: Callable
) -> Verdict:
    """Whatever breaks during a save, an error is raised and a loadable checkpoint remains;
    damaged ones are refused.

    `save_checkpoint(root, step)` writes a real checkpoint; `load_checkpoint(root)` loads what
    `latest` names and returns its step.
    """
    with tempfile.TemporaryDirectory(prefix="stackproof-durability-") as temporary:
        root = Path(temporary)
        save_checkpoint(root, 1)
        faults = 0
        for target in ("fsync", "replace"):
            for at in range(1, int(limits.faults_per_call_min) + 1):
                for error in (OSError(errno.ENOSPC, "No space left on device"), _Killed()):
                    problem = _survives(root, target, at, error, save_checkpoint, load_checkpoint)
                    if problem:
                        return failed(
                            f"{type(error).__name__} at os.{target} #{at}: {problem}", faults=faults
                        )
                    faults += 1
        accepted = [
            name for name, damage in _DAMAGES.items() if not _refuses(root, damage, load_checkpoint)
        ]
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
def resume_equivalence(
    limits: SimpleNamespace,
    *,
    fresh_state,
    advance,
    save_state,
    resume_state,
    digest,
    epoch_samples: int,
) -> Verdict:
    """A run interrupted twice, once before an epoch's end and once after it, equals the
    uninterrupted one bit for bit.

    `fresh_state(cursor)` builds the run's own state; `advance(state)` makes one update and returns
    its loss; `save_state(state, root)`, `resume_state(root)`; `digest(state)` maps every part of
    the state to a hash.
    """
    samples_per_step = digest(fresh_state(None))["samples_per_step"]
    cursor = max(0, epoch_samples - 2 * samples_per_step)
    state = fresh_state(cursor)
    losses = [advance(state) for _ in range(4)]
    expected = digest(state)
    del state  # one state in memory at a time: a large model's are most of what it needs
    with tempfile.TemporaryDirectory(prefix="stackproof-resume-") as temporary:
        state, resumed_losses = fresh_state(cursor), []
        for part, n in enumerate((1, 2, 1)):
            resumed_losses += [advance(state) for _ in range(n)]
            if part < 2:
                save_state(state, Path(temporary) / str(part))
                del state
                state = resume_state(Path(temporary) / str(part))
        got = digest(state)
    differing = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
    if losses != resumed_losses:
        differing.insert(0, "losses")
    crossed = cursor + 4 * samples_per_step > epoch_samples
    return decide(
        len(differing) <= limits.differing_parts_max,
        f"a resumed run differs from the straight one in {', '.join(differing[:5])}",
        differing_parts=len(differing),
        compared_parts=len(expected),
        crossed_epoch_end=crossed,
    )


@decides("checkpoint.pointers")
class Pointers:
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
