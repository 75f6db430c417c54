"""Facts about the code and the machine, read at run time."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from stackproof.spec import IN_CHECKOUT, ROOT
from stackproof.spec.archive import History, blob_id
from stackproof.spec.canonical import sha256_file, sha256_json
from stackproof.spec.files import open_regular
from stackproof.spec.records import Code, Scalar

# Paths that can change a computed number.
# Uncommitted changes elsewhere (documents, tests, evidence) do not make a run dirty.
CODE_PATHS = ("spec", "contracts", "stack", "pyproject.toml", "constraints.txt")
PACKAGES = "stackproof torch triton numpy safetensors tokenizers pydantic".split()


def code_state() -> Code:
    """Commit of the checkout that this package runs from; `unknown` if git does not read it, and
    for an installed wheel. `dirty` is false only for the code of a wheel, or for a checkout in
    which every file of the code is, by its hash, that of the commit, and no other file is beside
    them.
    """
    lock = ROOT / "constraints.txt"
    lock_sha256 = sha256_file(lock) if lock.is_file() else None
    history = History(ROOT)
    if history.git("ls-files", "--error-unmatch", "spec/__init__.py") is None:
        return Code(commit="unknown", dirty=IN_CHECKOUT, lock_sha256=lock_sha256)
    commit = (history.git("rev-parse", "HEAD") or b"unknown").decode().strip()
    committed = history.files("HEAD", *CODE_PATHS)
    changed = _differing(committed)
    return Code(
        commit=commit,
        dirty=bool(changed) or not committed or commit == "unknown",
        diff_sha256=sha256_json(changed) if changed and committed else None,
        lock_sha256=lock_sha256,
    )


def _differing(committed: Mapping[str, str]) -> dict[str, str | None]:
    """The files of the code that are not those of a commit, given by path and git blob id: each
    with its own id, None for one that is gone. Git's index and its flags are not read.
    """
    found = {path: _blob_id(ROOT / path, len(blob)) for path, blob in committed.items()}
    changed = {path: blob for path, blob in found.items() if blob != committed[path]}
    length = len(next(iter(committed.values()), 40 * "0"))
    beside = {path: _blob_id(ROOT / path, length) for path in _files() - committed.keys()}
    return dict(sorted((changed | beside).items()))


def _files() -> set[str]:
    """The files below the paths of the code, relative to the root, and links to folders; without
    what is hidden, and without `__pycache__`.
    """
    found = set()
    for path in CODE_PATHS:
        for folder, folders, names in os.walk(ROOT / path):
            folders[:] = [n for n in folders if n != "__pycache__" and not n.startswith(".")]
            links = [n for n in folders if os.path.islink(os.path.join(folder, n))]
            kept = [n for n in names if not n.startswith(".")]
            found |= {os.path.relpath(os.path.join(folder, n), ROOT) for n in (*kept, *links)}
    return {Path(path).as_posix() for path in found}


def _blob_id(path: Path, length: int) -> str | None:
    """The git blob id of a regular file, None for anything else."""
    try:
        if path.is_symlink():
            return None
        with open_regular(path) as f:
            return blob_id(f, os.fstat(f.fileno()).st_size, length)
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def environment(device: str = "cpu", **extra: Scalar) -> dict[str, Scalar]:
    """Versions, machine, threads and determinism flags. Those of torch are included only if torch
    is imported.
    """
    facts: dict[str, Scalar] = {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "world_size": 1,
        "contracts_level": os.environ.get("STACK_CONTRACTS", "standard"),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    if torch := sys.modules.get("torch"):
        facts["threads"] = torch.get_num_threads()
        facts["deterministic_algorithms"] = torch.are_deterministic_algorithms_enabled()
        facts["cuda"] = torch.version.cuda
        if device.startswith("cuda"):
            properties = torch.cuda.get_device_properties(device)
            facts |= {
                "device_name": properties.name,
                "device_memory_bytes": properties.total_memory,
                "device_uuid": str(properties.uuid),
            }
            facts["driver"] = _nvidia_driver()
    return facts | extra


def _nvidia_driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
