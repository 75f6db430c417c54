"""Rules that bind a record to what it names: its configuration, lock file, spec and plants."""

from collections.abc import Mapping
from typing import Any

from stackproof.spec.canonical import sha256_bytes, sha256_json
from stackproof.spec.gates import Gate
from stackproof.spec.records import Record
from tools.integrity.core import LOCK, Messages, Repo, each_gate, each_record, rule

TOUCHES_SINCE = (1, 5)  # version of the spec; records before it count no executions


@rule(
    "CONFIG-HASH",
    title="The hash of a configuration is that of the configuration",
    why="A hash that names another configuration lets two runs pass for one.",
    hint="supersede the record with a true one",
    over=each_record,
)
def config_hash(repo: Repo, record: Record) -> Messages:
    if (found := sha256_json(record.config)) != record.config_sha256:
        yield f"config_sha256 is {record.config_sha256[:12]}…, its configuration has {found[:12]}…"


@rule(
    "LOCK-AT-COMMIT",
    title="A record's lock file is that of its commit",
    why="Other versions of the libraries give other numbers.",
    hint="run again at the commit, in an environment of its lock file",
    over=each_record,
)
def lock_at_commit(repo: Repo, record: Record) -> Messages:
    if record.code.commit in repo.ancestors and not record.code.dirty:
        content = repo.in_history(LOCK).get(record.code.commit)
        found = None if content is None else sha256_bytes(content)
        if found != record.code.lock_sha256:
            yield f"lock_sha256 is {record.code.lock_sha256}, {LOCK} of its commit has {found}"


@rule(
    "CLEAN-DIFF",
    title="A record of committed code has no diff",
    why="Code that was clean has no changes whose hash could be stated.",
    hint="supersede the record with a true one",
    over=each_record,
)
def clean_diff(repo: Repo, record: Record) -> Messages:
    if not record.code.dirty and record.code.diff_sha256 is not None:
        yield "its code is stated as clean, and it states the hash of a diff"


@rule(
    "SPEC-OF-RELEASE",
    title="Gates, limits and spec of a record are those of the release that it names",
    why="A verdict under other limits, or of another check, is not one of the released gate.",
    hint="run again under a frozen version of the spec",
    over=each_record,
)
def spec_of_release(repo: Repo, record: Record) -> Messages:
    release = repo.releases.get(record.spec.version)
    if release is None:
        yield f"spec {record.spec.version} was never released"
        return
    if release["sha256"] != record.spec.sha256:
        yield f"the sha256 of spec {record.spec.version} is not the released one"
    for gate_id, fingerprint in _fingerprints(record):
        if release["gates"].get(gate_id, {}).get("fingerprint") != fingerprint:
            yield f"gate {gate_id} has a fingerprint that release {record.spec.version} lacks"
    for result in record.gates:
        limits = _limits(release["gates"].get(result.id))
        if result.verdict != "not_run" and dict(result.limits) != limits:
            yield f"the limits of {result.id} are not those of release {record.spec.version}"


def _fingerprints(record: Record) -> list[tuple[str, str]]:
    """Gates and fingerprints of all results and kills, each pair once."""
    stated = [(g.id, g.fingerprint) for g in record.gates]
    return list(dict.fromkeys(stated + [(k.gate, k.fingerprint) for k in record.kills]))


def _limits(frozen: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: limit["value"] for name, limit in (frozen or {}).get("limits", {}).items()}


@rule(
    "KILL-TOUCHED",
    title="The planted line of a kill has run",
    why="A gate that is red while its plant is not executed is red for another reason.",
    hint="stack gates prove the gate, then stack evidence add DIR",
    over=each_record,
)
def kill_touched(repo: Repo, record: Record) -> Messages:
    version = tuple(int(part) for part in record.spec.version.split(".")[:2] if part.isdigit())
    counted = version >= TOUCHES_SINCE
    for kill in record.kills:
        if kill.outcome == "killed" and not kill.touches and (counted or kill.touches == 0):
            yield f"{kill.plant} is killed, and its line ran {kill.touches or 'no'} times"


@rule(
    "PLANT-AT-PROOF",
    title="A kill is of the plant as it is now",
    why="A plant that was changed after its proof, or emptied, was never caught in this form.",
    hint="stack gates prove the gate, then stack evidence add DIR",
    over=each_gate,
)
def plant_at_proof(repo: Repo, gate: Gate) -> Messages:
    proven = repo.survey.coverage.newest_plants(gate.id)
    for name in gate.plants:
        plant = repo.plants.get(name)
        if plant is not None and name in proven and proven[name] != plant.sha256:
            yield f"gate {gate.id}: its kill of {name} is of another form of the plant"
