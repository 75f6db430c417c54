"""Durable folders of tensor files: written, hashed, moved into place and compared with memory."""

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import Tensor

from stackproof import tensorfile
from stackproof.spec.canonical import canonical_json, sha256_bytes, sha256_file
from stackproof.spec.errors import CheckpointError
from stackproof.spec.files import create_durably, holds, sync
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64

OLDER = "stack train --resume DIR --at STEP takes an older step folder"


class Declared(Frozen):
    """What a manifest states of a file: sha256, size, and the CRC-32 of each tensor. Former
    versions have `tensors` instead, which nothing reads.
    """

    sha256: str = Field(pattern=HEX64)
    bytes: int = Field(ge=0)
    crc32: dict[str, str] = {}
    tensors: dict[str, str] = {}


@dataclass(frozen=True)
class Content:
    """Content of a folder as it is in memory: the tensors of each file, their metadata,
    and the bytes of state.json.
    """

    schema: str
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]
    document: bytes


def write(folder: Path, content: Content) -> bytes:
    """Write and sync the files, then the manifest, then the folder. Returns the manifest.

    Each file is hashed and synced by threads of its own, behind the writing.
    Raises OSError, BadTensorFile.
    """
    with ExitStack() as files_open, ThreadPoolExecutor(2 * len(content.tensors)) as pool:
        groups = sorted(
            content.tensors.items(), key=lambda item: -sum(t.nbytes for t in item[1].values())
        )
        # Reserve the space of all files first: a reservation blocks while
        # another file is being synced.
        created = {
            n: files_open.enter_context(tensorfile.created(folder / n, tensors))
            for n, tensors in groups
        }
        written = {
            n: tensorfile.write_hashed(created[n], tensors, content.metadata, pool)
            for n, tensors in groups
        }
        create_durably(folder / "state.json", content.document)
    files: dict[str, dict] = {
        "state.json": {"sha256": sha256_bytes(content.document), "bytes": len(content.document)}
    }
    for name, file in written.items():
        file.synced.result()
        files[name] = {
            "sha256": file.sha256.result(),
            "bytes": (folder / name).stat().st_size,
            "crc32": file.crc32,
        }
    manifest = canonical_json({"schema": content.schema, "files": files})
    create_durably(folder / "manifest.json", manifest)
    sync(folder)
    return manifest


@contextmanager
def in_place(temporary: Path, final: Path) -> Iterator[None]:
    """Rename a written folder to `final` for a block that verifies it.
    If the block fails, restore what was there before.

    An earlier folder of that name is moved aside first and deleted last, so a kill at any point
    leaves it or its successor.
    """
    replaced = final.with_name(f".replaced-{final.name}-{os.getpid()}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
        sync(final.parent)
        yield
    except Exception:
        shutil.rmtree(final, ignore_errors=True)
        if replaced.exists():
            os.replace(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def compare(folder: Path, content: Content, manifest: bytes) -> None:
    """Read the files of a folder back and compare every byte with memory.
    Raises CheckpointError naming what differs.
    """
    with ThreadPoolExecutor(len(content.tensors)) as pool:
        compared = {
            folder / n: pool.submit(tensorfile.require_equal, folder / n, tensors, content.metadata)
            for n, tensors in content.tensors.items()
        }
    for path, future in compared.items():
        try:
            future.result()
        except tensorfile.BadTensorFile as e:
            raise changed(path, str(e)) from e
    for name, written in (("state.json", content.document), ("manifest.json", manifest)):
        if not holds(folder / name, written):
            raise changed(folder / name, "it is not what was written")


def verify(folder: Path, files: Mapping[str, Declared], *, by_tensor: bool) -> None:
    """Compare every file with the manifest's size, sha256 and, with `by_tensor`,
    the CRC-32 of each tensor.

    Raises CheckpointError naming the file and what differs.
    """
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        verified = [
            pool.submit(verify_file, folder / name, entry, by_tensor=by_tensor)
            for name, entry in files.items()
        ]
    for file in verified:
        file.result()


def verify_file(path: Path, entry: Declared, *, by_tensor: bool) -> None:
    """`verify` of one file."""
    older = {"next_step": OLDER}
    damaged = CheckpointError(
        f"{path} is damaged",
        allowed=f"sha256 {entry.sha256[:12]}…, {entry.bytes} bytes",
        **older,
    )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", **older)
    if path.stat().st_size != entry.bytes:
        raise CheckpointError(
            f"{path} is truncated or padded",
            value=f"{path.stat().st_size} bytes",
            allowed=f"{entry.bytes} bytes",
            **older,
        )
    try:
        sha256, checksums = (
            tensorfile.digests(path) if path.suffix == ".safetensors" else (sha256_file(path), {})
        )
    except (OSError, tensorfile.BadTensorFile) as e:
        raise CheckpointError(f"{path}: {e}", **older) from e
    declared = entry.crc32 if by_tensor else checksums
    if wrong := sorted(
        n for n in checksums.keys() | declared.keys() if checksums.get(n) != declared.get(n)
    ):
        raise CheckpointError(
            f"{path}: tensor {wrong[0]} does not match its checksum",
            value=f"{len(wrong)} tensor(s) differ",
            allowed="bytes as they were written",
            **older,
        ) from damaged
    if sha256 != entry.sha256:
        raise damaged


def changed(path: Path, what: str) -> CheckpointError:
    """The error of a file that is not, when it is read, what was written."""
    return CheckpointError(
        f"{path} was written and read back otherwise: {what}",
        allowed="the bytes in memory, which nothing may change while a checkpoint is written",
        next_step="check the disk and the memory of this machine; earlier checkpoints are intact",
    )
