"""The result of a comparison of all kernels on this machine, in the user's cache."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stackproof.kernels.table import Operation
from stackproof.spec.files import read_bytes, write_atomically

FILE = "kernels.json"
PACKAGES = ("torch", "triton", "stackproof")


def versions() -> dict[str, str]:
    """Installed versions that affect the speed of a kernel."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def hashes(op: Operation) -> dict[str, str]:
    """Hash of the source of every kernel of an operation."""
    return {name: kernel.sha256 for name, kernel in op.kernels.items()}


class Measurement(BaseModel):
    """The comparison on one device. `winners` is precision -> operation -> kernel; `sha256`
    operation -> kernel -> source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    made_at: str
    versions: dict[str, str]
    sha256: dict[str, dict[str, str]]
    winners: dict[str, dict[str, str]]
    rows: list[dict[str, Any]] = []

    def why_stale(self, op: Operation, device: str) -> str:
        """Why the winner for an operation is no longer valid on `device`; empty if it is valid."""
        if self.device != device:
            return f"it was made on {self.device}, this is {device}"
        now = versions()
        if changed := [n for n in PACKAGES if self.versions.get(n) != now[n]]:
            return f"{changed[0]} was {self.versions.get(changed[0])}, now {now[changed[0]]}"
        return (
            ""
            if self.sha256.get(op.name) == hashes(op)
            else f"the source of a kernel of {op.name} has changed"
        )


class _File(BaseModel):
    schema_: Literal["stackproof.kernels/1"] = Field("stackproof.kernels/1", alias="schema")
    devices: dict[str, Measurement] = {}


def _read(path: Path) -> _File:
    """The content of the file; without comparisons if it is missing or unreadable."""
    try:
        return _File.model_validate_json(read_bytes(path))
    except (OSError, ValidationError):
        return _File()


def read(folder: Path, device: str) -> Measurement | None:
    """The comparison on `device`; None if it is missing or unreadable."""
    return _read(folder / FILE).devices.get(device)


def write(folder: Path, found: Measurement) -> Path:
    """Write a comparison to the cache; it replaces an earlier one on the same device. Returns the
    file.
    """
    path = folder / FILE
    document = _File(devices=_read(path).devices | {found.device: found})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, document.model_dump_json(by_alias=True, indent=1).encode() + b"\n")
    return path
