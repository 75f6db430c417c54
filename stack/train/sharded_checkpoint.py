"""The sharded layout of a checkpoint: each rank writes its parts, by torch's distributed checkpoint
(DCP) with its safetensors storage, and any mesh reads them. No file holds a pickle: DCP states
where a part belongs in the header of the file.
"""

import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackproof import tensorfile, tensorfolder
from stackproof.distributed.ranks import ONE_PROCESS, Ranks
from stackproof.distributed.tensors import is_divided, local_part, n_holders
from stackproof.spec.canonical import canonical_json, parse_strict, sha256_bytes
from stackproof.spec.errors import CheckpointError, IntegrityError
from stackproof.spec.files import create_durably, require_own, sync
from stackproof.tensorfolder import OLDER
from stackproof.train.checkpoint_folders import not_written, point, require_free, step_name
from stackproof.train.state import tensor_bytes

SCHEMA = "stackproof/checkpoint-sharded/1"
FILE = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")  # as DCP names them
PLACES = "DCP_SHARDING_INFO"  # the key of a header that states where each part begins
# One process is meant, where DCP supposes so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class ShardedSnapshot:
    """A state at one step, of which this rank holds some parts, ready to be written."""

    step: int
    tensors: dict[str, Tensor]
    document: bytes
    ranks: Ranks

    @property
    def n_bytes(self) -> int:
        """Bytes of the document, and of the parts of this rank: one that several ranks hold is
        divided among them.
        """
        parts = sum(local_part(t).nbytes // self._n_holders(t) for t in self.tensors.values())
        return parts + len(self.document)

    def _n_holders(self, tensor: Tensor) -> int:
        return n_holders(tensor) if is_divided(tensor) else self.ranks.sizes.world_size


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the parts of this rank in host memory, by DCP's stager."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    on_gpu = any(t.is_cuda for t in tensors.values())
    options = StagingOptions(
        use_pinned_memory=on_gpu,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=on_gpu,
    )
    return DefaultStager(options).stage(tensors)


# --- write ----------------------------------------------------------------------------------------


def write(root: Path, snapshot: ShardedSnapshot, judge: Callable[[Path], None]) -> Path:
    """Write `root/step-XXXXXXXX` from all ranks, each of which calls this; compare it with memory,
    `judge` it on every rank, and point `latest` at it. Returns the folder.

    Raises CheckpointError on a rank that fails, and RankLost, which names it, on the others.
    The earlier checkpoints and pointers are then unchanged, and the folder is gone, unless it was
    judged and only `latest` could not be moved.
    """
    ranks, final = snapshot.ranks, root / step_name(snapshot.step)
    # The files are read by all ranks, so that their folder has one name.
    temporary = root / f".writing-{final.name}-{ranks.from_main(os.getpid())}"
    n_bytes = sum(ranks.gathered(snapshot.n_bytes))
    try:
        with _together(snapshot, root), ExitStack() as stack:
            with _together(snapshot, root):
                if ranks.is_main:
                    _make(root, temporary, n_bytes)
            with _together(snapshot, root):
                _save(temporary, snapshot)
            with _together(snapshot, root):
                files = _written(temporary, snapshot)
            with _together(snapshot, root):
                if ranks.is_main:
                    _declare(temporary, snapshot, files)
                    stack.enter_context(tensorfolder.in_place(temporary, final))
            with _together(snapshot, root):
                judge(final)
            stack.close()
            if ranks.is_main:
                point(root, "latest", final)
    except Exception:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


@contextmanager
def _together(snapshot: ShardedSnapshot, root: Path) -> Iterator[None]:
    """A block that all ranks leave alike; errors of the disk become CheckpointError."""
    with snapshot.ranks.together():
        try:
            yield
        except (OSError, tensorfile.BadTensorFile) as e:
            raise not_written(root, snapshot.step, e) from e


def _make(root: Path, temporary: Path, n_bytes: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    require_own(root)
    require_free(root, n_bytes)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _save(folder: Path, snapshot: ShardedSnapshot) -> None:
    """Write and sync the file of this rank. Which rank writes a part that several hold is DCP's
    decision.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    group = snapshot.ranks.control
    try:
        dcp.save(
            snapshot.tensors, storage_writer=writer, process_group=group, no_dist=group is None
        )
    except CheckpointException as e:
        # An error of another rank is that of the block which all ranks leave together.
        if own := e.failures.get(snapshot.ranks.rank):
            raise own[0] from e


def _written(folder: Path, snapshot: ShardedSnapshot) -> dict[str, dict]:
    """What the manifest states of each file, by name, of all ranks. Each rank reads its file back
    and compares every part with memory. Raises CheckpointError naming what differs.
    """
    path = folder / f"shard-{snapshot.ranks.rank + 1:05}-model-00001-of-00001.safetensors"
    own = {}
    if path.is_file():
        sha256, checksums = tensorfile.digests(path)
        for name, checksum in checksums.items():
            if checksum != f"{zlib.crc32(tensor_bytes(snapshot.tensors[name])):08x}":
                raise tensorfolder.changed(path, f"tensor {name} is not what was written")
        own = {path.name: {"sha256": sha256, "bytes": path.stat().st_size, "crc32": checksums}}
    return {name: entry for part in snapshot.ranks.gathered(own) for name, entry in part.items()}


def _declare(folder: Path, snapshot: ShardedSnapshot, files: dict[str, dict]) -> None:
    """Write the document and the manifest."""
    create_durably(folder / "state.json", snapshot.document)
    document = {"sha256": sha256_bytes(snapshot.document), "bytes": len(snapshot.document)}
    manifest = {"schema": SCHEMA, "files": files | {"state.json": document}}
    create_durably(folder / "manifest.json", canonical_json(manifest))
    sync(folder)


# --- read -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a tensor in a file: where it begins in the whole, and its entry."""

    path: Path
    offset: tuple[int, ...]
    entry: tensorfile.Entry


def parts(folder: Path) -> dict[str, list[Part]]:
    """The parts of every tensor in the safetensors files of a folder, by name. Reads only headers.
    Raises CheckpointError if the parts of a tensor are not a whole one.
    """
    found: dict[str, list[Part]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = tensorfile.read_header(path)
            stated = header.metadata.get(PLACES)
            places = (
                None
                if stated is None
                else parse_strict(stated.encode("utf-8", "surrogatepass"), origin=str(path))
            )
            for name, entry in header.tensors.items():
                offset = _offset(places, name, len(entry.shape))
                found.setdefault(name, []).append(Part(path, offset, entry))
        except (OSError, tensorfile.BadTensorFile, IntegrityError) as e:
            raise CheckpointError(f"{path}: {e}", next_step=OLDER) from e
    for name, held in found.items():
        if not _is_whole(held) or len({part.entry.dtype for part in held}) != 1:
            raise CheckpointError(
                f"the parts of tensor {name} in {folder} are not a whole one",
                value=", ".join(f"{list(p.entry.shape)} at {list(p.offset)}" for p in held[:6]),
                next_step=OLDER,
            )
    return found


def _is_whole(held: list[Part]) -> bool:
    """Whether parts are disjoint and have as many elements as the tensor that they are of."""
    n_elements = sum(math.prod(part.entry.shape) for part in held)
    boxes = [
        tuple((first, first + n) for first, n in zip(part.offset, part.entry.shape, strict=True))
        for part in held
        if math.prod(part.entry.shape)
    ]
    overlap = any(
        all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))
        for one, other in combinations(boxes, 2)
    )
    return n_elements == math.prod(whole_shape(held)) and not overlap


def _offset(places: Any, name: str, n_dimensions: int) -> tuple[int, ...]:
    """Where a part begins by the header of its file; at 0 in a file without places."""
    if places is None:
        return (0,) * n_dimensions
    match places:
        case dict() if isinstance(place := places.get(name), dict):
            offset = place.get("saved_offsets")
            counts = isinstance(offset, list) and all(type(n) is int and n >= 0 for n in offset)
            if counts and len(offset) == n_dimensions:
                return tuple(offset)
    raise tensorfile.BadTensorFile(f"{PLACES} does not state where tensor {name} begins")


def whole_shape(held: list[Part]) -> tuple[int, ...]:
    """The shape of the tensor that parts are of."""
    ends = [[o + n for o, n in zip(p.offset, p.entry.shape, strict=True)] for p in held]
    return tuple(map(max, zip(*ends)))


def empty(
    folder: Path,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    like: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Uninitialised tensors with the names, shapes and types that a folder has, for the `wanted`
    names. If `like` has a tensor of that name and shape, device and division are those of it; else
    the tensor is whole and in host memory.
    """
    dtypes = {code: getattr(torch, name) for name, code in tensorfile.CODES.items()}
    made = {}
    for name, held in parts(folder).items():
        shape, dtype, own = whole_shape(held), dtypes[held[0].entry.dtype], (like or {}).get(name)
        if wanted(name):
            same = own is not None and tuple(own.shape) == shape
            made[name] = (
                torch.empty_like(own, dtype=dtype) if same else torch.empty(shape, dtype=dtype)
            )
    return made


def read(folder: Path, targets: Mapping[str, Tensor], ranks: Ranks = ONE_PROCESS) -> None:
    """Read tensors of a verified folder of either layout into those that `empty` made, of which
    each rank may hold parts. All ranks call this. Raises CheckpointError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader, group = HuggingFaceStorageReader(str(folder)), ranks.control
    with ranks.together():
        try:
            dcp.load(
                dict(targets), storage_reader=reader, process_group=group, no_dist=group is None
            )
        except CheckpointException as e:
            if own := e.failures.get(ranks.rank):
                raise CheckpointError(f"{folder} cannot be read: {own[0]}", next_step=OLDER) from e
