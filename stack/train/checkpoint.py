"""Checkpoints: hashed, atomic, complete.
A new folder is written and verified before `latest` names it.

checkpoints/step-00000200/   model.safetensors  state.safetensors  state.json  manifest.json
checkpoints/latest, best     text files naming a step folder
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stackproof import tensorfile, tensorfolder
from stackproof.config import CheckpointConfig
from stackproof.contracts.conditions import ensure, require
from stackproof.model.foreign import plain_name
from stackproof.spec.canonical import canonical_json, parse_strict, sha256_bytes
from stackproof.spec.errors import CheckpointError, IntegrityError
from stackproof.spec.files import write_atomically
from stackproof.train import optimizer as opt
from stackproof.train.rng import default_rng_state, set_default_rng_state
from stackproof.train.state import TrainState

SCHEMA, FORMER = "stackproof/checkpoint/3", "stackproof/checkpoint/2"
FILES = ("model.safetensors", "state.safetensors", "state.json")
# Fields of the training state that the document holds as they are.
COUNTERS = ("step tokens_seen wall_s ema_loss_nats min_ema_loss_nats last_val_nats best").split()
STATE_KEYS = frozenset(
    (
        "schema step tokens_seen cursor curriculum wall_s scaler stopper gates ema_loss_nats "
        "min_ema_loss_nats last_val_nats best config config_sha256 tokenizer_sha256 vocab_size "
        "record"
    ).split()
)


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
    """Every tensor of a checkpoint, live, by file and name."""
    held = state.optimizer.state
    moments = {
        name: held[parameter][field].detach()
        for name, (parameter, field) in optimizer_slots(state).items()
        if field in held.get(parameter, ())
    }
    return {
        "model.safetensors": model_tensors(state.model),
        "state.safetensors": moments | default_rng_state(),
    }


def state_document(
    state: TrainState, *, tokenizer_sha256: str, vocab_size: int, gates: dict, record: str
) -> dict:
    """The JSON half of a checkpoint."""
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
        "config_sha256": sha256_bytes(canonical_json(config)),
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "record": record,
    }


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, ready to be written: its tensors and the bytes of its document."""

    step: int
    content: tensorfolder.Content


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
def write(root: Path, snapshot: Snapshot) -> Path:
    """Write `root/step-XXXXXXXX`, compare it with memory and point `latest` at it.
    Returns the folder.

    Raises CheckpointError if anything fails; the earlier checkpoints and
    pointers are then unchanged.
    """
    final = root / step_name(snapshot.step)
    temporary = root / f".writing-{final.name}-{os.getpid()}"
    try:
        # Write under a temporary name: a kill never leaves half a checkpoint under the final one.
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        manifest = tensorfolder.write(temporary, snapshot.content)
        with tensorfolder.in_place(temporary, final):
            # Read everything back before `latest` moves: a full or failing disk may report success.
            tensorfolder.compare(final, snapshot.content, manifest)
            point(root, "latest", final)
    except (OSError, tensorfile.BadTensorFile) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} could not be written: {e}",
            value=(
                f"{shutil.disk_usage(root if root.exists() else root.parent).free} bytes free "
                f"below {root}"
            ),
            allowed="a disk with room for two checkpoints",
            next_step="free space, then stack train --resume; earlier checkpoints are intact",
        ) from e
    return final


def point(root: Path, name: str, folder: Path) -> None:
    """Point `name` (`latest` or `best`) at a step folder, atomically."""
    write_atomically(root / name, folder.name.encode())


def pointed(root: Path, name: str) -> Path | None:
    """The step folder that the pointer `name` names, whether or not it exists;
    None without such a pointer.
    """
    return root / (root / name).read_text().strip() if (root / name).is_file() else None


def pointed_step(root: Path, name: str) -> int | None:
    """Step of the folder that the pointer `name` names; None unless that folder is complete."""
    folder = pointed(root, name)
    complete = folder is not None and (folder / "manifest.json").is_file()
    return int(folder.name.removeprefix("step-")) if complete else None


def retain(root: Path, keep: int) -> None:
    """Delete all step folders but the newest `keep` and those a pointer names,
    and leftovers of interrupted writes.
    """
    kept = {pointed(root, n) for n in ("latest", "best")}
    folders = sorted(p for p in root.glob("step-*") if p.is_dir())
    for folder in folders[:-keep]:
        if folder not in kept:
            shutil.rmtree(folder)
    for leftover in (*root.glob(".writing-*"), *root.glob(".replaced-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def find(path: Path) -> Path:
    """The step folder to load from a run directory, a checkpoints folder or a step folder.

    Follows `latest`. If a kill interrupted its replacement, takes the folder that was moved aside;
    if it is gone, the newest complete one. A damaged folder is an error and is never skipped.
    Raises CheckpointError without any complete folder.
    """
    if path.is_file():
        _refuse_file(path)
    if (path / "manifest.json").is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = pointed(root, "latest")
    name = latest.name if latest else "none"
    for folder in (
        root / name,
        *root.glob(f".replaced-{name}-*"),
        *sorted(root.glob("step-*"), reverse=True),
    ):
        if (folder / "manifest.json").is_file():
            return folder
    raise CheckpointError(
        f"there is no checkpoint in {path}",
        allowed="a run directory or a step folder",
        next_step="stack train --run-dir DIR makes one",
    )


def _refuse_file(path: Path) -> None:
    magic = path.open("rb").read(4)
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
    # The manifest comes first, as it declares what the other files must be.
    manifest = _read_json(folder / "manifest.json")
    if manifest.get("schema") not in (SCHEMA, FORMER) or set(manifest.get("files", {})) != set(
        FILES
    ):
        raise CheckpointError(
            f"{folder / 'manifest.json'} is not a manifest of {SCHEMA}",
            value=f"{manifest.get('schema')}, {', '.join(sorted(manifest.get('files', {})))}",
            allowed=f"{SCHEMA} or {FORMER} with {', '.join(FILES)}",
            next_step="use the version of stackproof that wrote it: its record names the commit",
        )
    # Verify the bytes before anything reads their content.
    tensorfolder.verify(folder, manifest["files"], by_tensor=manifest["schema"] == SCHEMA)
    # A missing key would start again at its default, so the set of keys must be exact.
    document = _read_json(folder / "state.json")
    if set(document) != STATE_KEYS:
        odd = sorted(set(document) ^ STATE_KEYS)
        raise CheckpointError(
            f"{folder / 'state.json'} lacks or adds keys",
            value=", ".join(odd),
            allowed="exactly the declared keys",
        )
    return Loaded(
        folder,
        _read_tensors(folder / "model.safetensors"),
        _read_tensors(folder / "state.safetensors"),
        document,
    )


def _read_json(path: Path) -> dict:
    try:
        return parse_strict(path.read_bytes(), origin=str(path))
    except (OSError, IntegrityError) as e:
        raise CheckpointError(
            f"cannot read {path}: {e}", next_step="resume from an older step folder"
        ) from e


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
        parameter.copy_(given[name])


def restore(state: TrainState, loaded: Loaded) -> list[str]:
    """Load a checkpoint into a freshly built state of the same configuration;
    the run then continues bit for bit.

    Returns the arms of the curriculum that were dropped because configuration
    and data do not have them.
    """
    # In any order, but complete: a part that is left out starts again, and no loss curve shows it.
    document = loaded.state
    load_model(state.model, loaded.model)
    _restore_optimizer(state, loaded.tensors)
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


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
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
        state.optimizer.state[parameter][field] = tensors[name].to(parameter.device).clone()


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
