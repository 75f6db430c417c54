"""A step folder on its way to the disk: written, hashed, put in its place
and compared with memory.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stackproof import tensorfile
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.errors import CheckpointError


@dataclass(frozen=True)
class Content:
    """What a step folder is to hold, as it is in memory: the tensors of each file, their metadata,
    and the bytes of state.json.
    """

    schema: str
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]
    document: bytes


def write(folder: Path, content: Content) -> bytes:
    """Write and sync the files, then the manifest, then the folder. Returns the manifest.

    Hashing and syncing follow the writing in threads, one each for a file.
    Raises OSError, BadTensorFile.
    """
    with ExitStack() as files_open, ThreadPoolExecutor(2 * len(content.tensors)) as pool:
        groups = sorted(
            content.tensors.items(), key=lambda item: -sum(t.nbytes for t in item[1].values())
        )
        # All room first: a reservation blocks while another file is being synced.
        created = {
            n: files_open.enter_context(tensorfile.created(folder / n, tensors))
            for n, tensors in groups
        }
        written = {
            n: tensorfile.write_hashed(created[n], tensors, content.metadata, pool)
            for n, tensors in groups
        }
        _write_and_sync(folder / "state.json", content.document)
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
    _write_and_sync(folder / "manifest.json", manifest)
    tensorfile.sync(folder)
    return manifest


@contextmanager
def in_place(temporary: Path, final: Path) -> Iterator[None]:
    """Rename a written folder to `final` for a block that proves it.
    If the block fails, `final` is again what it was before.

    An earlier folder of that name is moved aside first and deleted last, so that a kill at any
    point leaves it or its successor.
    """
    replaced = final.with_name(f".replaced-{final.name}-{os.getpid()}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
        tensorfile.sync(final.parent)
        yield
    except Exception:
        shutil.rmtree(final, ignore_errors=True)
        if replaced.exists():
            os.replace(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def compare(folder: Path, content: Content, manifest: bytes) -> None:
    """Open the files of a folder again and compare every byte with memory.
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
            raise _changed(path, str(e)) from e
    for name, written in (("state.json", content.document), ("manifest.json", manifest)):
        if (folder / name).read_bytes() != written:
            raise _changed(folder / name, "it is not what was written")


def _changed(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was written and read back otherwise: {what}",
        allowed=(
            "the bytes that are in memory, which nothing may change while a checkpoint is written"
        ),
        next_step="check the disk and the memory of this machine; earlier checkpoints are intact",
    )


def _write_and_sync(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
