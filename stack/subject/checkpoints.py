"""How a run saves and restores."""

import hashlib
import json
import mmap
import struct
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackproof import tensorfile
from stackproof.contracts.subject import Checkpoints, SavedCheckpoint
from stackproof.distributed.ranks import Ranks
from stackproof.distributed.tensors import local_part, offset_of_part
from stackproof.spec.files import FileRefused, open_regular, read_bytes, read_text
from stackproof.subject.run import RunParts
from stackproof.subject.training import RunTrainee
from stackproof.tensorfile import MAX_HEADER_BYTES
from stackproof.train import checkpoint
from stackproof.train.state import TrainState, named_tensors, tensor_bytes


class RunCheckpoints(RunParts, Checkpoints):
    """By the run's own writer and loader."""

    def load_step(self, root: Path) -> int:
        return checkpoint.load(checkpoint.find(root)).state["step"]

    def save(self, trainee: RunTrainee, root: Path) -> None:
        document = checkpoint.state_document(
            trainee.state,
            tokenizer_sha256=self.dataset.tokenizer.sha256,
            vocab_size=self.vocab_size,
            gates={},
            record="preflight-19700101T000000Z-00000000",
        )
        checkpoint.save(root, trainee.state, document)

    def resume(self, root: Path) -> RunTrainee:
        state = self.build()
        with torch.no_grad():
            checkpoint.restore(state, checkpoint.load(checkpoint.find(root)))
        return RunTrainee(state)


FILES = ("model.safetensors", "state.safetensors", "state.json", "manifest.json")
REQUIRED_STATE = (
    "step cursor curriculum tokens_seen scaler stopper gates config config_sha256 tokenizer_sha256"
).split()
# Where a part begins in its tensor stands below this key of a header. It stands here again, since
# the gate shares nothing with the loader.
PLACES = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class WrittenCheckpoint(SavedCheckpoint):
    """A step folder, and the state that it was captured from. It is read without the loader.
    `published` is whether `latest` may name it, as at a resume.

    Checksums are crc32, which detect accidents; the sha256 of the manifest also detect intent.
    """

    folder: Path
    step: int
    live_tied: bool
    live_checksums: Mapping[str, int]
    published: bool = False

    def read(self) -> SavedCheckpoint:
        """This folder, which is read when the gate looks at it."""
        return self

    @property
    def reloaded_checksums(self) -> Mapping[str, int]:
        return {n: crc for _, crcs in self._tensor_files.values() for n, crc in crcs.items()}

    @property
    def tied(self) -> tuple[bool, bool]:
        """A tied head has no tensor of its own in the file."""
        return self.live_tied, "head.weight" not in self.reloaded_checksums

    @cached_property
    def format_problems(self) -> Sequence[str]:
        sha256 = {file: digest for file, (digest, _) in self._tensor_files.items()}
        return format_problems(self, FILES, sha256, self.reloaded_checksums)

    @cached_property
    def _tensor_files(self) -> dict[str, tuple[str, dict[str, int]]]:
        """(sha256, crc32 of every tensor by name) of each tensor file that is there."""
        paths = [self.folder / file for file in FILES[:2]]
        return {path.name: _contents(path) for path in paths if path.is_file()}


def format_problems(
    saved: "WrittenCheckpoint | ReadShards",
    files: Sequence[str],
    sha256: dict[str, str],
    tensors: Collection[str],
) -> list[str]:
    """What is wrong in the files of a step folder beside the tensors. `sha256` are those of its
    tensor files, `tensors` the names in them.
    """
    folder = saved.folder
    names = {path.name for path in folder.iterdir()}
    if missing := [f for f in files if f not in names]:
        return [f"{folder.name} lacks {', '.join(missing)}"]
    document = read_bytes(folder / "state.json")
    state = json.loads(document)
    manifest = json.loads(read_bytes(folder / "manifest.json"))["files"]
    sha256 |= {"state.json": hashlib.sha256(document).hexdigest()}
    bad = [f for f in sha256 if manifest.get(f, {}).get("sha256") != sha256[f]]
    absent = [key for key in REQUIRED_STATE if key not in state]
    latest = folder.parent / "latest"
    early = not saved.published and latest.is_file()
    early = early and read_text(latest).strip() == folder.name
    problems = {
        "latest names it before its verdict": early,
        f"undeclared files: {', '.join(sorted(names - set(files)))}": names - set(files),
        f"state.json lacks {', '.join(absent)}": absent,
        "state.safetensors lacks the random state": "rng.cpu" not in tensors,
        f"the manifest does not describe {', '.join(bad)}": bad,
        f"state.json has step {state.get('step')}, saved was {saved.step}": (
            state.get("step") != saved.step
        ),
    }
    return [f"{folder.name}: {text}" for text, found in problems.items() if found]


def _contents(path: Path) -> tuple[str, dict[str, int]]:
    """sha256 of a file, and crc32 of every tensor's bytes in it, read with nothing but the format's
    definition. Raises FileRefused for a header that is larger than any that is written.
    """
    with _opened(path) as view:
        crcs = {}
        for name, (start, stop) in {n: e["data_offsets"] for n, e in _entries(path, view)}.items():
            with view[start:stop] as body:
                crcs[name] = zlib.crc32(body)
        return hashlib.sha256(view).hexdigest(), crcs


@contextmanager
def _opened(path: Path) -> Iterator[memoryview]:
    with (
        open_regular(path) as f,
        mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view


def _entries(path: Path, view: memoryview) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tensors of a file: name, and entry of its header with offsets in the file. `place` is
    where a part begins in its tensor. Raises FileRefused.
    """
    (length,) = struct.unpack("<Q", view[:8])
    if length > MAX_HEADER_BYTES:
        raise FileRefused(path, f"claims a header of {length} bytes")
    header = json.loads(bytes(view[8 : 8 + length]))
    places = json.loads(header.get("__metadata__", {}).get(PLACES, "{}"))
    for name, entry in header.items():
        if name != "__metadata__":
            span = [8 + length + offset for offset in entry["data_offsets"]]
            place = places.get(name, {}).get("saved_offsets", [0] * len(entry["shape"]))
            yield name, entry | {"data_offsets": span, "place": place}


# --- sharded --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartInMemory:
    """A part of a tensor that a rank holds: where it begins in the whole, its shape, and the crc32
    of its bytes.
    """

    tensor: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int

    @property
    def name(self) -> str:
        """A name that two ranks give to the same part."""
        return f"{self.tensor}{list(self.offset)}+{list(self.shape)}"


def parts_in_memory(state: TrainState) -> list[PartInMemory]:
    """Every part that this rank holds and a checkpoint must hold, by its tensor's name there."""
    return [
        PartInMemory(
            name.removeprefix("weights."),
            offset_of_part(tensor),
            tuple(local_part(tensor).shape),
            zlib.crc32(tensor_bytes(tensor)),
        )
        for name, tensor in named_tensors(state)
        if local_part(tensor).numel()
    ]


@dataclass(frozen=True)
class WrittenShards:
    """A step folder that all ranks have written, and the parts that this one held. `published` as
    in WrittenCheckpoint.
    """

    folder: Path
    step: int
    live_tied: bool
    held: Sequence[PartInMemory]
    ranks: Ranks
    published: bool = False

    def read(self) -> "ReadShards":
        """What all ranks have found in the files. Each reads the bytes of the parts that it held,
        also where other ranks have written them, and hashes its share of the files. All call this.
        """
        paths = sorted(self.folder.glob("*.safetensors"))
        own = {path.name: _contents(path)[0] for path in paths[self.ranks.rank :: self._n]}
        names, reloaded = _reloaded(paths, self.held)
        live = {part.name: part.crc32 for part in self.held}
        found = self.ranks.gathered((live, reloaded, own))
        return ReadShards(self.folder, self.step, self.live_tied, found, names, self.published)

    @property
    def _n(self) -> int:
        return self.ranks.sizes.world_size


def _reloaded(
    paths: Sequence[Path], held: Sequence[PartInMemory]
) -> tuple[list[str], dict[str, int | None]]:
    """The names of the tensors in files, and the crc32 of each held part as it is in them."""
    with ExitStack() as stack:
        stored = defaultdict(list)
        for path in paths:
            view = stack.enter_context(_opened(path))
            for name, entry in _entries(path, view):
                stored[name].append((view, entry))
        return sorted(stored), {p.name: _stored_crc32(p, stored.get(p.tensor, ())) for p in held}


def _stored_crc32(part: PartInMemory, stored: Sequence[tuple[memoryview, dict]]) -> int | None:
    """crc32 of the bytes of a part as they are in the files; None if they are not all there."""
    if not stored:
        return None
    size = tensorfile.DTYPES[stored[0][1]["dtype"]][0]
    found = np.zeros((*part.shape, size), np.uint8)
    n_found = 0
    for view, entry in stored:
        start, stop = entry["data_offsets"]
        held = np.frombuffer(view, np.uint8, stop - start, start).reshape(*entry["shape"], size)
        # the overlap of both, in the coordinates of the whole tensor
        box = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(part.offset, part.shape, entry["place"], entry["shape"])
        ]
        if any(low >= high for low, high in box):
            continue
        inside = tuple(slice(low - a, high - a) for (low, high), a in zip(box, part.offset))
        there = tuple(slice(low - b, high - b) for (low, high), b in zip(box, entry["place"]))
        found[inside] = held[there]
        n_found += held[there].size
    return zlib.crc32(found) if n_found == found.size else None


@dataclass(frozen=True)
class ReadShards(SavedCheckpoint):
    """What the ranks of a run have found in a step folder: of each rank the crc32 of the parts that
    it held, by name, those of the same parts in the files, and the sha256 of its share of files.
    """

    folder: Path
    step: int
    live_tied: bool
    found: Sequence[tuple[Mapping[str, int], Mapping[str, int | None], Mapping[str, str]]]
    tensors: Sequence[str]
    published: bool

    @property
    def live_checksums(self) -> Mapping[str, int]:
        return {name: crc for live, _, _ in reversed(self.found) for name, crc in live.items()}

    @property
    def replica_checksums(self) -> Mapping[str, int]:
        """For each part the checksum of a rank that has another one, if there is one."""
        first, other = self.live_checksums, dict(self.live_checksums)
        for live, _, _ in self.found:
            other |= {name: crc for name, crc in live.items() if crc != first[name]}
        return other

    @property
    def reloaded_checksums(self) -> Mapping[str, int | None]:
        return {name: crc for _, stored, _ in self.found for name, crc in stored.items()}

    @property
    def tied(self) -> tuple[bool, bool]:
        """A tied head has no tensor of its own in the files."""
        return self.live_tied, "head.weight" not in self.tensors

    @cached_property
    def format_problems(self) -> Sequence[str]:
        sha256 = {file: digest for _, _, own in self.found for file, digest in own.items()}
        declared = json.loads(read_bytes(self.folder / "manifest.json"))["files"]
        return format_problems(self, (*declared, "manifest.json"), sha256, self.tensors)
