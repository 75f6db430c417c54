"""Checkpoints: hashed, atomic, complete.
A new folder is written and verified before `latest` names it.

checkpoints/step-00000200/   model.safetensors  state.safetensors  state.json  manifest.json
checkpoints/latest, best     text files naming a step folder
"""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackproof import tensorfile, tensorfolder
from stackproof.config import CheckpointConfig
from stackproof.contracts.conditions import ensure, require
from stackproof.distributed.tensors import local_part, part_like, whole
from stackproof.model.foreign import plain_name
from stackproof.spec.canonical import canonical_json, read_json, sha256_json
from stackproof.spec.checksums import require_unchanged
from stackproof.spec.errors import CheckpointError, EnvironmentUnfit, IntegrityError
from stackproof.spec.files import (
    open_regular,
    read_bytes,
    remedy,
    remove_folder,
    require_own,
    write_atomically,
)
from stackproof.spec.tables import validated
from stackproof.tensorfolder import OLDER
from stackproof.train import optimizer as opt
from stackproof.train.checkpoint_format import STATE_KEYS, Manifest, StateDocument
from stackproof.train.rng import default_rng_state, set_default_rng_state
from stackproof.train.state import TrainState

SCHEMA = "stackproof/checkpoint/4"
# 3 does not state the lines of the logs, 2 in addition not the checksum of each tensor.
FORMER = ("stackproof/checkpoint/3", "stackproof/checkpoint/2")
FILES = ("model.safetensors", "state.safetensors", "state.json")
# Fields of the training state that the document holds as they are.
COUNTERS = ("step tokens_seen wall_s ema_loss_nats min_ema_loss_nats last_val_nats best").split()
STEP = re.compile(r"step-(\d{8})")
SPARE_BYTES = 16 * 2**20  # left free beside checkpoints, for logs and the record


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint in memory: model tensors, state tensors and the state document."""

    path: Path
    model: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers by plain name, detached.
    A tied head has no entry beside the embedding.
    """
    return {plain_name(n): t.detach() for n, t in model.state_dict(keep_vars=True).items()}


def optimizer_slots(state: TrainState) -> dict[str, tuple[Tensor, str]]:
    """Where each moment and update count belongs: `optim.<parameter>.<field>` to parameter and
    field.
    """
    fields = opt.state_fields(state.optimizer)
    return {
        f"optim.{plain_name(n)}.{field}": (p, field)
        for n, p in state.model.named_parameters()
        for field in fields.get(p, ())
    }


def tensors_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a checkpoint, live, by file and name; divided ones are assembled."""
    held = state.optimizer.state
    moments = {
        name: whole(held[parameter][field].detach())
        for name, (parameter, field) in optimizer_slots(state).items()
        if field in held.get(parameter, ())
    }
    return {
        "model.safetensors": {n: whole(t) for n, t in model_tensors(state.model).items()},
        "state.safetensors": moments | default_rng_state(),
    }


def state_document(
    state: TrainState,
    *,
    tokenizer_sha256: str,
    vocab_size: int,
    gates: dict,
    record: str,
    run: dict[str, Any] | None = None,
) -> dict:
    """The JSON half of a checkpoint. `run` ties it to its run directory: sha256 of run.json, marks
    of the logs, sections that were compared; None outside of one.
    """
    config = state.cfg.to_dict()
    return {
        **{name: getattr(state, name) for name in COUNTERS},
        "schema": SCHEMA,
        "cursor": state.data_loader.cursor,
        "curriculum": state.data_loader.sampler.state_dict(),
        "wall_s": round(state.wall_s, 3),
        "scaler": {k: float(v) for k, v in state.scaler.state_dict().items()},
        "stopper": state.stopper.state_dict(),
        "gates": gates,
        "config": config,
        "config_sha256": sha256_json(config),
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "record": record,
        "run": run,
    }


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, ready to be written: its tensors and the bytes of its document."""

    step: int
    content: tensorfolder.Content

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors and of the document."""
        groups = self.content.tensors.values()
        return sum(t.nbytes for g in groups for t in g.values()) + len(self.content.document)


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


@require(lambda document: set(document) == STATE_KEYS, "the document has exactly the declared keys")
def capture(state: TrainState, document: dict, *, copied: bool) -> Snapshot:
    """Snapshot of a state: its live tensors, or with `copied` copies in host memory that
    later steps do not change.
    """
    tensors = tensors_of(state)
    if copied:
        tensors = {file: copies(group) for file, group in tensors.items()}
    metadata = {"step": str(state.step)}
    content = tensorfolder.Content(SCHEMA, tensors, metadata, canonical_json(document))
    return Snapshot(state.step, content)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; from a GPU through pinned buffers, which torch keeps for reuse."""
    on_gpu = any(t.is_cuda for t in tensors.values())
    hosts = {
        n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True)
        for n, t in tensors.items()
    }
    if on_gpu:
        torch.cuda.synchronize()
    return hosts


def save(root: Path, state: TrainState, document: dict) -> Path:
    """Write `root/step-XXXXXXXX` from the live tensors; see `write`."""
    return write(root, capture(state, document, copied=False))


@ensure(lambda result: (result / "manifest.json").is_file(), "a finished checkpoint has a manifest")
def write(
    root: Path, snapshot: Snapshot, judge: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Write `root/step-XXXXXXXX`, compare it with memory, `judge` it, and point `latest` at it.
    Returns the folder.

    Raises CheckpointError if anything fails, and what `judge` raises; the earlier checkpoints and
    pointers are then unchanged, and the folder is gone.
    """
    final = root / step_name(snapshot.step)
    temporary = root / f".writing-{final.name}-{os.getpid()}"
    try:
        # Write under a temporary name: a kill never leaves half a checkpoint under the final one.
        root.mkdir(parents=True, exist_ok=True)
        require_own(root)
        require_free(root, snapshot.n_bytes)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        manifest = tensorfolder.write(temporary, snapshot.content)
        with tensorfolder.in_place(temporary, final):
            # Read everything back before `latest` moves: a full or failing disk may report success.
            tensorfolder.compare(final, snapshot.content, manifest)
            judge(final)
        point(root, "latest", final)
    except (OSError, tensorfile.BadTensorFile) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} could not be written: {e}",
            value=f"{free_bytes(root)} bytes free below {root}",
            allowed="a disk with room for two checkpoints",
            next_step=f"{remedy(e)}, then stack train --resume; earlier checkpoints are intact",
        ) from e
    return final


def free_bytes(root: Path) -> int:
    """Bytes that this process may still write below a folder that may not exist yet."""
    return shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free


def require_free(root: Path, n_bytes: int, n_checkpoints: int = 1) -> None:
    """Raises EnvironmentUnfit unless that many checkpoints of `n_bytes` fit on the disk, with room
    for logs and record.
    """
    needed, free = n_checkpoints * n_bytes + SPARE_BYTES, free_bytes(root)
    if needed > free:
        raise EnvironmentUnfit(
            f"the disk below {root} has no room for {n_checkpoints} checkpoint(s)",
            value=f"{free} bytes free",
            allowed=f"at least {needed} bytes",
            next_step=(
                "free space, then stack train --resume; or another --run-dir; checkpoint.keep sets "
                "how many are kept"
            ),
        )


def point(root: Path, name: str, folder: Path) -> None:
    """Point `name` (`latest` or `best`) at a step folder, atomically."""
    write_atomically(root / name, folder.name.encode())


def point_best(root: Path, step: int | None) -> None:
    """Point `best` at the folder of a step. If there is no such folder, as in a child run whose
    best step is its parent's, or after an older step was taken, nothing is called best.
    """
    if step is None or not (folder := root / step_name(step)).is_dir():
        (root / "best").unlink(missing_ok=True)
    elif pointed(root, "best") != folder:
        point(root, "best", folder)


def pointed(root: Path, name: str) -> Path | None:
    """The step folder that the pointer `name` names, whether or not it exists;
    None without such a pointer. Raises CheckpointError if the file holds anything else.
    """
    if not os.path.lexists(root / name):
        return None
    try:
        data = read_bytes(root / name, 64)
        text = data.decode("ascii").strip()
        if root.name == "checkpoints":
            require_unchanged(root.parent, f"checkpoints/{name}", data)
    except IntegrityError as e:
        raise CheckpointError(e.what, value=e.value, allowed=e.allowed, next_step=OLDER) from e
    except (OSError, UnicodeDecodeError) as e:
        text = str(e)
    if not STEP.fullmatch(text):
        raise CheckpointError(
            f"{root / name} does not name a step folder",
            value=repr(text),
            allowed="the name of a folder, such as step-00000200",
            next_step="give the folder of a step, or --resume DIR --at STEP",
        )
    return root / text


def step_of(folder: Path) -> int | None:
    """The step of a step folder, by its name; None for other names."""
    found = STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def pointed_step(root: Path, name: str) -> int | None:
    """Step of the folder that the pointer `name` names; None unless that folder is complete."""
    folder = pointed(root, name)
    complete = folder is not None and (folder / "manifest.json").is_file()
    return step_of(folder) if complete else None


def step_folders(root: Path) -> list[Path]:
    """The step folders below `root`, oldest first. Links are left out."""
    found = (p for p in root.glob("step-*") if step_of(p) is not None)
    return sorted(p for p in found if p.is_dir() and not p.is_symlink())


def retain(root: Path, keep: int, *, with_later: bool = True) -> None:
    """Delete all step folders but the newest `keep` and those a pointer names, and leftovers of
    interrupted writes. Folders of steps after `latest` belong to a part of the run that was taken
    back; they go too, `with_later`.
    """
    kept = {pointed(root, n) for n in ("latest", "best")}
    newest = pointed(root, "latest")
    folders = step_folders(root)
    current = [p for p in folders if newest is None or p.name <= newest.name]
    for folder in folders if with_later else current:
        if folder not in kept and folder not in current[-keep:]:
            remove_folder(folder)
    for leftover in (*root.glob(".writing-*"), *root.glob(".replaced-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def find(path: Path) -> Path:
    """The step folder to load from a run directory, a checkpoints folder or a step folder.

    Follows `latest`. If a kill interrupted its replacement, takes the folder that was moved aside.
    Without `latest`, which a kill may have prevented, takes the newest folder. Raises
    CheckpointError if that folder is gone or has no manifest: none is skipped.
    """
    if path.is_file():
        _refuse_file(path)
    if (path / "manifest.json").is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = pointed(root, "latest") or next(reversed(step_folders(root)), None)
    if latest is None:
        raise CheckpointError(
            f"there is no checkpoint in {path}",
            allowed="a run directory or a step folder",
            next_step="stack train --run-dir DIR makes one",
        )
    aside = () if latest.exists() else root.glob(f".replaced-{latest.name}-*")
    for folder in (latest, *aside):
        if (folder / "manifest.json").is_file():
            return folder
    intact = newest_intact(root)
    raise CheckpointError(
        f"{latest} {'has no manifest.json' if latest.exists() else 'is gone'}",
        allowed="the folder as the run has written it",
        next_step=f"{root / step_name(intact)} is intact" if intact else "restore it",
    )


def has_any(root: Path) -> bool:
    """Whether a save of the run has reached its place."""
    return bool(step_folders(root)) or any(root.glob(".replaced-*"))


def at(root: Path, step: int) -> Path:
    """The folder of a step below the checkpoints folder. Raises CheckpointError naming the steps
    that are there.
    """
    folder = root / step_name(step)
    if (folder / "manifest.json").is_file():
        return folder
    there = [p for p in step_folders(root) if (p / "manifest.json").is_file()]
    raise CheckpointError(
        f"there is no checkpoint of step {step} in {root}",
        allowed=", ".join(str(step_of(p)) for p in there) or "none is there",
        next_step="--at 0 begins at the seed",
    )


def newest_intact(root: Path) -> int | None:
    """The newest step whose folder is complete and verifies, or None."""
    for folder in reversed(step_folders(root)):
        try:
            verify(folder)
        except CheckpointError:
            continue
        return step_of(folder)
    return None


def _refuse_file(path: Path) -> None:
    with open_regular(path) as f:
        magic = f.read(4)
    kind = "a file"
    if magic[:1] == b"\x80":
        kind = "a pickle"
    elif magic[:2] == b"PK":
        kind = "a zip archive as torch.save writes it, with a pickle inside"
    raise CheckpointError(
        f"{path} is {kind}, not a checkpoint folder",
        allowed=f"a folder with {', '.join(FILES)} and manifest.json",
        next_step="loading a pickle can run foreign code, so no option allows it; "
        "convert the weights to safetensors first",
    )


def load(folder: Path) -> Loaded:
    """Read and verify a step folder: every file by size and sha256, every tensor by CRC-32,
    the exact set of keys.

    Never unpickles. The former version has no CRC-32.
    Raises CheckpointError naming the file and what differs.
    """
    document = verify(folder)
    return Loaded(
        folder,
        _read_tensors(folder / "model.safetensors"),
        _read_tensors(folder / "state.safetensors"),
        document,
    )


def verify(folder: Path) -> dict:
    """Verify a step folder as `load` does, without keeping a tensor. Returns the state document."""
    # The manifest comes first, as it declares what the other files must be.
    manifest = read_manifest(folder)
    # Verify the bytes before anything reads their content.
    tensorfolder.verify(folder, manifest.files, by_tensor=manifest.schema_ != FORMER[1])
    return _read_state(folder, manifest)


def load_document(folder: Path) -> dict:
    """The state document of a step folder, verified by its hash; reads no tensor.
    Raises CheckpointError as `load`.
    """
    manifest, name = read_manifest(folder), "state.json"
    tensorfolder.verify(folder, {name: manifest.files[name]}, by_tensor=False)
    return _read_state(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder. Raises CheckpointError."""
    document = _read_json(path := folder / "manifest.json")
    try:
        manifest = validated(Manifest, document, origin=str(path))
    except IntegrityError as e:
        raise CheckpointError(e.what, value=e.value, next_step=OLDER) from e
    if manifest.schema_ not in (SCHEMA, *FORMER) or set(manifest.files) != set(FILES):
        raise CheckpointError(
            f"{path} is not a manifest of {SCHEMA}",
            value=f"{manifest.schema_}, {', '.join(sorted(manifest.files))}",
            allowed=f"{SCHEMA}, {' or '.join(FORMER)}, with {', '.join(FILES)}",
            next_step="use the version of stackproof that wrote it: its record names the commit",
        )
    return manifest


def _read_state(folder: Path, manifest: Manifest) -> dict:
    document = _read_json(folder / "state.json")
    # A missing key would start again at its default, so the set of keys must be exact.
    keys = STATE_KEYS if manifest.schema_ == SCHEMA else STATE_KEYS - {"run"}
    if set(document) != keys:
        odd = sorted(set(document) ^ keys)
        raise CheckpointError(
            f"{folder / 'state.json'} lacks or adds keys",
            value=", ".join(odd),
            allowed="exactly the declared keys",
            next_step=OLDER,
        )
    config = document["config"]
    if manifest.schema_ == SCHEMA and document["config_sha256"] != sha256_json(config):
        raise CheckpointError(
            f"{folder / 'state.json'}: the configuration does not match its hash", next_step=OLDER
        )
    _require_types(folder / "state.json", document)
    return {"run": None} | document


def _require_types(path: Path, document: dict) -> None:
    try:
        validated(StateDocument, document, origin=str(path))
    except IntegrityError as e:
        raise CheckpointError(e.what, value=e.value, next_step=OLDER) from e


def _read_json(path: Path) -> dict:
    try:
        document = read_json(path)
    except (OSError, IntegrityError) as e:
        raise CheckpointError(f"cannot read {path}: {e}", next_step=OLDER) from e
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object", next_step=OLDER)
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model. Raises CheckpointError for names or shapes that differ."""
    own = model_tensors(model)
    given = {plain_name(n): t for n, t in tensors.items()}
    if missing := sorted(own.keys() ^ given.keys()):
        raise CheckpointError(
            "the checkpoint's tensors are not the model's",
            value=", ".join(missing[:6]),
            allowed=f"{len(own)} parameters",
        )
    for name, parameter in own.items():
        if parameter.shape != given[name].shape:
            raise CheckpointError(
                f"tensor {name} has another shape",
                value=tuple(given[name].shape),
                allowed=tuple(parameter.shape),
            )
        local_part(parameter).copy_(local_part(part_like(parameter, given[name])))


def restore(state: TrainState, loaded: Loaded) -> list[str]:
    """Load a checkpoint into a freshly built state of the same configuration;
    the run then continues bit for bit.

    Returns the arms of the curriculum that were dropped because configuration
    and data do not have them.
    """
    # In any order, but complete: a part that is left out starts again, and no loss curve shows it.
    document = loaded.state
    load_model(state.model, loaded.model)
    restore_optimizer(state, loaded.tensors)
    set_default_rng_state(loaded.tensors)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(
            {k: int(v) if k == "_growth_tracker" else v for k, v in document["scaler"].items()}
        )
    state.stopper.load_state_dict(document["stopper"])
    state.data_loader.cursor = document["cursor"]
    for name in COUNTERS:
        setattr(state, name, document[name])
    # The probe compares with its last call: from here on with the loaded weights.
    state.probe.changed_frac()
    return state.data_loader.sampler.load_state_dict(document["curriculum"])


def restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    slots = optimizer_slots(state)
    given = {n for n in tensors if n.startswith("optim.")}
    if given != slots.keys() and (given or state.step):
        odd = sorted(given ^ slots.keys())
        raise CheckpointError(
            "the checkpoint's optimizer state is not this optimizer's",
            value=", ".join(odd[:6]),
            allowed=f"the moments of optim.kind = {state.cfg.optim.kind}",
            next_step=(
                "keep optim.kind as the checkpoint's run had it: moments of one rule mean nothing "
                "to another"
            ),
        )
    for name, (parameter, field) in slots.items() if given else ():
        tensor = tensors[name].to(parameter.device)
        moment = part_like(parameter, tensor) if tensor.shape == parameter.shape else tensor
        state.optimizer.state[parameter][field] = moment.clone()


class SyncWriter:
    """Writes a checkpoint while training waits; it may write the live tensors themselves."""

    copied = False

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Run `job`, then `then` with its result."""
        then(job())

    def wait(self) -> None:
        """Nothing is ever left to wait for."""


class AsyncWriter:
    """Writes one checkpoint at a time in a background thread, from a copy of the state.

    `then` runs in the calling thread, at the next `start` or `wait`.
    """

    copied = True

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[Future[Path], Callable[[Path], None]] | None = None

    def start(self, job: Callable[[], Path], then: Callable[[Path], None]) -> None:
        """Begin a job after the previous one. Raises what the previous one raised."""
        self.wait()
        self._running = self._pool.submit(job), then

    def wait(self) -> None:
        """Wait for the job, if any, and run its `then`. Raises what it raised, once."""
        if self._running is None:
            return
        job, then = self._running
        error = job.exception()
        self._running = None
        if error is not None:
            raise error
        then(job.result())


Writer = SyncWriter | AsyncWriter


def make_writer(cfg: CheckpointConfig) -> Writer:
    """The writer that the configuration names."""
    return AsyncWriter() if cfg.async_save else SyncWriter()
