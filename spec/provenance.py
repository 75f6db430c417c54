"""Facts about the code and the machine, read at run time."""

import os
import platform
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

from stackproof.spec import IN_CHECKOUT, ROOT
from stackproof.spec.canonical import sha256_bytes, sha256_file
from stackproof.spec.git import run_git
from stackproof.spec.records import Code, Scalar

# Paths that can change a computed number.
# Uncommitted changes elsewhere (documents, tests, evidence) do not make a run dirty.
CODE_PATHS = ("spec", "contracts", "stack", "pyproject.toml", "constraints.txt")
PACKAGES = "stackproof torch triton numpy safetensors tokenizers pydantic".split()


def code_state() -> Code:
    """Commit of the checkout that this package runs from; `unknown` if git does not read it, and
    for an installed wheel. `dirty` is false only for the code of a wheel or for a checkout that git
    found clean.
    """
    lock, git = ROOT / "constraints.txt", partial(run_git, ROOT)
    lock_sha256 = sha256_file(lock) if lock.is_file() else None
    if git("ls-files", "--error-unmatch", "spec/__init__.py") is None:
        return Code(commit="unknown", dirty=IN_CHECKOUT, lock_sha256=lock_sha256)
    status = git("status", "--porcelain", "--untracked-files=all", "--", *CODE_PATHS)
    commit = git("rev-parse", "HEAD")
    diff = git("diff", "HEAD", "--", *CODE_PATHS) if status else None
    return Code(
        commit=(commit or b"unknown").decode().strip(),
        dirty=status != b"" or commit is None,
        diff_sha256=None if status is None or diff is None else sha256_bytes(diff + status),
        lock_sha256=lock_sha256,
    )


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
