"""How a run saves and restores."""

import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from stackproof.contracts.subject import Checkpoints, SavedCheckpoint
from stackproof.spec.files import FileRefused, open_regular, read_bytes, read_text
from stackproof.subject.run import RunParts
from stackproof.subject.training import RunTrainee
from stackproof.tensorfile import MAX_HEADER_BYTES
from stackproof.train import checkpoint


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

    @property
    def reloaded_checksums(self) -> Mapping[str, int]:
        return {n: crc for _, crcs in self._tensor_files.values() for n, crc in crcs.items()}

    @property
    def tied(self) -> tuple[bool, bool]:
        """A tied head has no tensor of its own in the file."""
        return self.live_tied, "head.weight" not in self.reloaded_checksums

    @cached_property
    def format_problems(self) -> Sequence[str]:
        names = {path.name for path in self.folder.iterdir()}
        if missing := [f for f in FILES if f not in names]:
            return [f"{self.folder.name} lacks {', '.join(missing)}"]
        document = read_bytes(self.folder / "state.json")
        state = json.loads(document)
        manifest = json.loads(read_bytes(self.folder / "manifest.json"))["files"]
        sha256 = {file: digest for file, (digest, _) in self._tensor_files.items()}
        sha256["state.json"] = hashlib.sha256(document).hexdigest()
        bad = [f for f in sha256 if manifest.get(f, {}).get("sha256") != sha256[f]]
        absent = [key for key in REQUIRED_STATE if key not in state]
        latest = self.folder.parent / "latest"
        early = not self.published and latest.is_file()
        early = early and read_text(latest).strip() == self.folder.name
        problems = {
            "latest names it before its verdict": early,
            f"undeclared files: {', '.join(sorted(names - set(FILES)))}": names - set(FILES),
            f"state.json lacks {', '.join(absent)}": absent,
            "state.safetensors lacks the random state": "rng.cpu" not in self.reloaded_checksums,
            f"the manifest does not describe {', '.join(bad)}": bad,
            f"state.json has step {state.get('step')}, saved was {self.step}": (
                state.get("step") != self.step
            ),
        }
        return [f"{self.folder.name}: {text}" for text, found in problems.items() if found]

    @cached_property
    def _tensor_files(self) -> dict[str, tuple[str, dict[str, int]]]:
        """(sha256, crc32 of every tensor by name) of each tensor file that is there."""
        paths = [self.folder / file for file in FILES[:2]]
        return {path.name: _contents(path) for path in paths if path.is_file()}


def _contents(path: Path) -> tuple[str, dict[str, int]]:
    """sha256 of a file, and crc32 of every tensor's bytes in it, read with nothing but the format's
    definition. Raises FileRefused for a header that is larger than any that is written.
    """
    with (
        open_regular(path) as f,
        mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        (length,) = struct.unpack("<Q", view[:8])
        if length > MAX_HEADER_BYTES:
            raise FileRefused(path, f"claims a header of {length} bytes")
        header = json.loads(bytes(view[8 : 8 + length]))
        spans = {n: e["data_offsets"] for n, e in header.items() if n != "__metadata__"}
        crcs = {}
        for name, (start, stop) in spans.items():
            with view[8 + length + start : 8 + length + stop] as body:
                crcs[name] = zlib.crc32(body)
        return hashlib.sha256(view).hexdigest(), crcs
