"""Checkpoints: hashed, atomic, complete.
A new folder is written and verified before `latest` names it.

checkpoints/step-00000200/   state.json  manifest.json, and in the single layout
                             model.safetensors  state.safetensors
                             or in the sharded layout one file of each rank
checkpoints/latest, best     text files naming a step folder
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stackproof import tensorfile, tensorfolder
from stackproof.config import CheckpointConfig
from stackproof.contracts.conditions import ensure, require
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.distributed.started import n_started
from stackproof.distributed.tensors import local_part, part_like, whole
from stackproof.model.foreign import plain_name
from stackproof.spec.canonical import canonical_json, read_json, sha256_json
from stackproof.spec.errors import CheckpointError, IntegrityError
from stackproof.spec.files import open_regular, require_own
from stackproof.spec.tables import validated
from stackproof.tensorfolder import OLDER
from stackproof.train import optimizer as opt
from stackproof.train import sharded_checkpoint as sharded
from stackproof.train.checkpoint_folders import (
    not_written,
    point,
    pointed,
    require_free,
    step_folders,
    step_name,
    step_of,
)
from stackproof.train.checkpoint_format import STATE_KEYS, Manifest, StateDocument
from stackproof.train.rng import default_rng_state, set_default_rng_state
from stackproof.train.state import TrainState

SCHEMA = "stackproof/checkpoint/4"
# 3 does not state the lines of the logs, 2 in addition not the checksum of each tensor.
FORMER = ("stackproof/checkpoint/3", "stackproof/checkpoint/2")
FILES = ("model.safetensors", "state.safetensors", "state.json")
# Fields of the training state that the document holds as they are.
COUNTERS = ("step tokens_seen wall_s ema_loss_nats min_ema_loss_nats last_val_nats best").split()
MODEL, STATE = FILES[:2]
# The tensors of state.safetensors, by the beginning of their names.
OF_STATE = ("optim.", "rng.")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: its state document, and its tensors. Those of a sharded one are
    assembled.
    """

    path: Path
    state: dict

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """Parameters and buffers by plain name, in host memory."""
        return self._read(MODEL, lambda name: not name.startswith(OF_STATE))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Moments and random state by name, in host memory."""
        return self._read(STATE, lambda name: name.startswith(OF_STATE))

    def read(self) -> "Loaded":
        """This checkpoint, with all tensors read now."""
        _ = self.model, self.tensors
        return self

    def _read(self, file: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        match layout_in(self.path):
            case "single":
                return _read_tensors(self.path / file)
            case "sharded":
                targets = sharded.empty(self.path, wanted=wanted)
                sharded.read(self.path, targets)
                return targets


Layout = Literal["single", "sharded"]


def layout_of(cfg: CheckpointConfig) -> Layout:
    """The layout in which this process and those started with it write checkpoints."""
    if cfg.layout == "auto":
        return "sharded" if n_started() > 1 else "single"
    return cfg.layout


def layout_in(folder: Path) -> Layout:
    """The layout of a step folder. Raises CheckpointError."""
    return "sharded" if read_manifest(folder).schema_ == sharded.SCHEMA else "single"


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
    """Every tensor of a checkpoint, live, by file and name; of divided ones the parts of this
    rank.
    """
    held = state.optimizer.state
    moments = {
        name: held[parameter][field].detach()
        for name, (parameter, field) in optimizer_slots(state).items()
        if field in held.get(parameter, ())
    }
    return {MODEL: model_tensors(state.model), STATE: moments | default_rng_state()}


def assembled(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same tensors, whole. All ranks call this."""
    return {file: {n: whole(t) for n, t in group.items()} for file, group in tensors.items()}


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


@require(lambda document: set(document) == STATE_KEYS, "the document has exactly the declared keys")
def capture(
    state: TrainState, document: dict, *, copied: bool
) -> Snapshot | sharded.ShardedSnapshot | None:
    """Snapshot of a state in the layout of its run: its live tensors, or with `copied` copies in
    host memory that later steps do not change. All ranks call this; None where a rank has nothing
    to write.
    """
    tensors = tensors_of(state)
    match layout_of(state.cfg.checkpoint):
        case "single":
            return _captured(state, assembled(tensors), document, copied=copied)
        case "sharded":
            held = tensors[MODEL] | tensors[STATE]
            held = sharded.copies(held) if copied else held
            behind = state.ranks.behind()
            return sharded.ShardedSnapshot(state.step, held, canonical_json(document), behind)


def _captured(
    state: TrainState, tensors: dict[str, dict[str, Tensor]], document: dict, *, copied: bool
) -> Snapshot | None:
    if not state.ranks.is_main:
        return None
    if copied:
        tensors = {file: copies(group) for file, group in tensors.items()}
    return single_snapshot(tensors, document)


def snapshot_of(loaded: Loaded, layout: Layout) -> Snapshot | sharded.ShardedSnapshot:
    """What one process writes of a loaded checkpoint, in another layout."""
    document = loaded.state | {"schema": SCHEMA}
    match layout:
        case "single":
            return single_snapshot({MODEL: loaded.model, STATE: loaded.tensors}, document)
        case "sharded":
            data, tensors = canonical_json(document), loaded.model | loaded.tensors
            return sharded.ShardedSnapshot(document["step"], tensors, data, ONE_PROCESS)


def single_snapshot(tensors: dict[str, dict[str, Tensor]], document: dict) -> Snapshot:
    """Whole tensors by file, and a state document, to be written in the single layout."""
    step, data = document["step"], canonical_json(document)
    return Snapshot(step, tensorfolder.Content(SCHEMA, tensors, {"step": str(step)}, data))


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
    root: Path,
    snapshot: Snapshot | sharded.ShardedSnapshot,
    judge: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write `root/step-XXXXXXXX`, compare it with memory, `judge` it, and point `latest` at it.
    Returns the folder.

    Raises CheckpointError if anything fails, and what `judge` raises; the earlier checkpoints and
    pointers are then unchanged, and the folder is gone, unless it was judged and only `latest`
    could not be moved.
    """
    if isinstance(snapshot, sharded.ShardedSnapshot):
        return sharded.write(root, snapshot, judge)
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
        raise not_written(root, snapshot.step, e) from e
    return final


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


def load(folder: Path, ranks: Ranks = ONE_PROCESS) -> Loaded:
    """Read and verify a step folder: every file by size and sha256, every tensor by CRC-32,
    the exact set of keys. One process has its tensors in memory then: later changes of the folder
    do no harm. Several ranks share the verification, read their parts at the restore, and all call
    this.

    Never unpickles. The former version has no CRC-32.
    Raises CheckpointError naming the file and what differs.
    """
    loaded = Loaded(folder, verify(folder, ranks))
    return loaded.read() if ranks.sizes.world_size == 1 else loaded


def verify(folder: Path, ranks: Ranks = ONE_PROCESS) -> dict:
    """Verify a step folder as `load` does. Returns the state document."""
    document = problem = None
    try:
        document = _verified(folder, ranks)
    except CheckpointError as e:
        problem = {"what": e.what, "value": e.value, "allowed": e.allowed, "next_step": e.next_step}
    # All ranks state the same error, whichever has found it.
    for found in ranks.gathered(problem):
        if found is not None:
            raise CheckpointError(**found)
    return document


def _verified(folder: Path, ranks: Ranks) -> dict:
    """The state document of a folder whose manifest, headers and document are verified, and of the
    files this rank's share.
    """
    # The manifest comes first, as it declares what the other files must be.
    manifest = read_manifest(folder)
    # Verify the bytes before anything reads their content.
    own = sorted(manifest.files)[ranks.rank :: ranks.sizes.world_size]
    files = {name: manifest.files[name] for name in own}
    try:
        tensorfolder.verify(folder, files, by_tensor=manifest.schema_ != FORMER[1])
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be read: {e}", next_step=OLDER) from e
    if manifest.schema_ == sharded.SCHEMA:
        sharded.parts(folder)
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
    held = set(manifest.files)
    match manifest.schema_:
        case sharded.SCHEMA:
            known = all(map(sharded.FILE.fullmatch, held - {"state.json"})) and "state.json" in held
        case schema:
            known = schema in (SCHEMA, *FORMER) and held == set(FILES)
    if not known:
        raise CheckpointError(
            f"{path} is not a manifest of {SCHEMA}",
            value=f"{manifest.schema_}, {', '.join(sorted(held)[:6])}",
            allowed=(
                f"{SCHEMA}, {' or '.join(FORMER)}, with {', '.join(FILES)}; or {sharded.SCHEMA}"
            ),
            next_step="use the version of stackproof that wrote it: its record names the commit",
        )
    _require_alone(folder, held)
    return manifest


def _require_alone(folder: Path, declared: set[str]) -> None:
    """Raise CheckpointError for a tensor file that no manifest declares: readers take what lies in
    the folder.
    """
    for path in folder.glob("*.safetensors"):
        if path.name not in declared:
            raise CheckpointError(
                f"{path} is not a file of this checkpoint",
                allowed=", ".join(sorted(declared)[:6]),
                next_step=f"remove it, or: {OLDER}",
            )


def files_of(folder: Path) -> list[Path]:
    """The files of a step folder, its manifest last. Raises CheckpointError."""
    return [folder / name for name in (*sorted(read_manifest(folder).files), "manifest.json")]


def weights_file(folder: Path) -> Path:
    """The file that stands for the weights in a record: the weights themselves, or the manifest
    that states the hashes of their parts. Raises CheckpointError.
    """
    return folder / (MODEL if layout_in(folder) == "single" else "manifest.json")


def _read_state(folder: Path, manifest: Manifest) -> dict:
    document = _read_json(folder / "state.json")
    # A missing key would start again at its default, so the set of keys must be exact.
    current = manifest.schema_ not in FORMER
    keys = STATE_KEYS if current else STATE_KEYS - {"run"}
    if set(document) != keys:
        odd = sorted(set(document) ^ keys)
        raise CheckpointError(
            f"{folder / 'state.json'} lacks or adds keys",
            value=", ".join(odd),
            allowed="exactly the declared keys",
            next_step=OLDER,
        )
    config = document["config"]
    if current and document["config_sha256"] != sha256_json(config):
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
    document, loaded = loaded.state, held_by(state, loaded)
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


@dataclass(frozen=True)
class Parts:
    """Of the tensors of a checkpoint what this rank holds: as `Loaded`, divided as a state is."""

    model: dict[str, Tensor]
    tensors: dict[str, Tensor]


def held_by(state: TrainState, loaded: Loaded) -> Loaded | Parts:
    """The tensors of a checkpoint for a state, which may be divided. All ranks call this."""
    if state.ranks.sizes.world_size == 1:
        return loaded
    own = model_tensors(state.model) | {n: p for n, (p, _) in optimizer_slots(state).items()}
    targets = sharded.empty(loaded.path, like=own)
    sharded.read(loaded.path, targets, state.ranks)
    of_state = {n: t for n, t in targets.items() if n.startswith(OF_STATE)}
    return Parts({n: t for n, t in targets.items() if n not in of_state}, of_state)


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
