"""Released versions of the spec: `spec/releases.jsonl`, append-only, one line per release.

A line holds the version, a JSON merge patch (RFC 7396) from the previous release, and the sha256 of
the text of the whole release. Reading reconstructs every release and compares its hash.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from stackproof.spec import ROOT
from stackproof.spec.canonical import parse_strict, sha256_bytes, sha256_json
from stackproof.spec.errors import IntegrityError
from stackproof.spec.failures import load_catalogue
from stackproof.spec.files import read_bytes
from stackproof.spec.gates import Frozen, Spec
from stackproof.spec.records import HEX64
from stackproof.spec.tables import validated

FILE = "spec/releases.jsonl"


class ReleaseLine(Frozen):
    """One line of the file. `patch` holds what changed; null removes a key."""

    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    sha256: str = Field(pattern=HEX64)
    patch: dict[str, Any]


def frozen_release(spec: Spec) -> dict:
    """The release of a spec: its hash, the fingerprint and limits of each gate, and the hashes of
    what is stated beside them.
    """
    return {
        "version": spec.version,
        "sha256": spec.sha256,
        "tables": _tables(spec),
        "gates": {
            gate_id: {
                "fingerprint": spec.fingerprint(gate_id),
                "limits": gate.normative()["limits"],
            }
            for gate_id, gate in sorted(spec.gates.items())
        },
    }


def _tables(spec: Spec) -> dict[str, str]:
    """Hashes of the scope, of the gates that chance cannot turn red with the reasons, and of the
    documented failures without what covers them.
    """
    covering = {"plants", "rules", "tests", "sources", "awaiting", "no_gate"}
    failures = load_catalogue(spec.root).failures.values()
    stated = {f.id: f.model_dump(mode="json", exclude=covering) for f in failures}
    tables = {"scope": spec.scope, "chance": spec.certain, "failures": stated}
    return {name: sha256_json(table) for name, table in tables.items()}


def release_text(release: dict) -> bytes:
    """The text of a release, of which its line holds the sha256."""
    return (json.dumps(release, indent=1, sort_keys=True) + "\n").encode()


def read_releases(root: Path = ROOT) -> dict[str, dict]:
    """Releases by version, oldest first; empty if the file is missing.

    Raises IntegrityError naming the first line that cannot be read or reconstructed.
    """
    path = root / FILE
    return parse_releases(read_bytes(path) if path.is_file() else b"", origin=FILE)


def parse_releases(data: bytes, *, origin: str) -> dict[str, dict]:
    """`read_releases` for the bytes of a file."""
    release: dict = {}
    found: dict[str, dict] = {}
    for number, text in enumerate(data.removesuffix(b"\n").split(b"\n") if data else (), start=1):
        where = f"{origin}:{number}"
        line = validated(ReleaseLine, parse_strict(text, origin=where), origin=where)
        release = merge(release, line.patch) | {"version": line.version}
        if sha256_bytes(release_text(release)) != line.sha256:
            raise IntegrityError(
                f"{where}: release {line.version} is not what was released",
                value=f"sha256 {sha256_bytes(release_text(release))[:12]}…",
                allowed=f"{line.sha256[:12]}…",
                next_step=f"git checkout {FILE}",
            )
        if line.version in found:
            raise IntegrityError(f"{where}: version {line.version} is released twice")
        found[line.version] = release
    return found


def release_line(previous: dict, release: dict) -> bytes:
    """The line of a release, given the previous release; an empty one for the first."""
    patch = changes(previous, release)
    assert release_text(merge(previous, patch)) == release_text(release)
    patch.pop("version")
    line = ReleaseLine(
        version=release["version"], sha256=sha256_bytes(release_text(release)), patch=patch
    )
    return json.dumps(line.model_dump(), sort_keys=True, separators=(",", ":")).encode() + b"\n"


def merge(old: dict, patch: dict) -> dict:
    """Apply a JSON merge patch (RFC 7396)."""
    merged = dict(old)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = merge(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def changes(old: dict, new: dict) -> dict:
    """The JSON merge patch from `old` to `new`; neither may contain null."""
    patch: dict = dict.fromkeys(old.keys() - new.keys())
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            if inner := changes(before, value):
                patch[key] = inner
        elif json.dumps(before) != json.dumps(value):  # 1 == 1.0, but their texts differ
            patch[key] = value
    return patch
