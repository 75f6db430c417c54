"""Rules about the spec, its gates, checks, plants and tests."""

import io
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

from stackproof.spec.archive import blob_id
from stackproof.spec.errors import IntegrityError, StackproofError
from stackproof.spec.failures import Failure, answering_gates
from stackproof.spec.fingerprint import check_fingerprint
from stackproof.spec.gates import Gate, Limit, normative_fields
from stackproof.spec.records import read_record
from stackproof.spec.releases import FILE as RELEASES
from stackproof.spec.releases import release_text
from tools.exhibits import Exhibit, edits_by_target, source_of
from tools.integrity.core import (
    LEDGER,
    REGISTRY,
    RULES,
    At,
    Messages,
    Repo,
    at,
    each_gate,
    gate_file,
    rule,
)
from tools.integrity.former_fingerprint import first_form

CARRIED, CHANGELOG, CHANCE = "spec/carried.jsonl", "spec/CHANGELOG.md", "spec/chance.toml"


@rule(
    "SCHEMA",
    title="Spec, records, ledger and registry are valid and strict",
    why="A duplicate key, NaN or unknown field gives a file two meanings.",
    hint="restore the file from git or fix the named field",
)
def schema(repo: Repo) -> Messages:
    readers = {
        "spec": lambda: repo.spec,
        "spec/failures": lambda: repo.catalogue,
        LEDGER: lambda: repo.entries,
        "evidence/archive.jsonl": lambda: repo.ledger.archive.lines,
        REGISTRY: lambda: repo.registry,
    }
    for path in sorted((repo.root / "evidence").glob("*/metadata.json")):
        if path.parent.name not in repo.valid_records():
            readers[path.relative_to(repo.root).as_posix()] = lambda path=path: read_record(path)
    for path, read in readers.items():
        try:
            read()
        except StackproofError as e:
            yield At(e.what, path=path)


@rule(
    "SPEC-EMPTY",
    title="The spec holds gates",
    why="An empty scope is always green.",
    hint="spec/gates/*.toml must define gates",
    over=at("spec/gates"),
)
def spec_empty(repo: Repo) -> Messages:
    if not repo.spec.gates:
        yield "defines no gate"


@rule(
    "ID-UNIQUE",
    title="Ids are unique, also without regard to case",
    why="Two things under one name let evidence for one discharge the other.",
    hint="choose another id; ids are never reused",
)
def id_unique(repo: Repo) -> Messages:
    groups = {
        "stack/museum/plants": list(repo.plants),
        "spec/gates": list(repo.spec.gates),
        LEDGER: [e.record for e in repo.entries],
        REGISTRY: [m.id for m in repo.registry],
        "docs/adr": [p.name[:4] for p in repo.decisions],
    }
    for path, ids in groups.items():
        for name, count in Counter(normalize("NFKC", i).casefold() for i in ids).items():
            if count > 1:
                yield At(f"the id {name} is used {count} times", path=path)


@rule(
    "SPEC-NOBUMP",
    title="A change of the spec comes with a new version",
    why="Evidence binds to fingerprints, so a changed gate needs a new version and new evidence.",
    hint="raise spec/spec.toml's version and run python tools/freeze_spec.py",
)
def spec_nobump(repo: Repo) -> Messages:
    version = repo.spec.version
    release = repo.releases.get(version)
    if release is None:
        yield At(f"version {version} was never frozen", path=RELEASES)
        return
    present = repo.present_release
    for name, sha256 in release.get("tables", {}).items():  # since 2.12.0
        if present["tables"].get(name) != sha256:
            yield At(f"the {name} changed without a new version", path="spec/spec.toml")
    now, frozen = present["gates"], release["gates"]
    for gate_id in sorted(now.keys() ^ frozen.keys()):
        change = "added" if gate_id in now else "removed"
        yield At(f"gate {gate_id} was {change} without a new version", path="spec/spec.toml")
    for gate_id in now.keys() & frozen.keys():
        if frozen[gate_id]["fingerprint"] not in repo.spec.fingerprints(gate_id):
            message = f"gate {gate_id} or its check differs from frozen version {version}"
            yield At(message, path=gate_file(gate_id))


@rule(
    "SPEC-CHANGELOG",
    title="The current version is the newest, and its changelog entry names what it changes",
    why="A version without a description cannot be reviewed.",
    hint="add a section to spec/CHANGELOG.md",
)
def spec_changelog(repo: Repo) -> Messages:
    version = repo.spec.version
    number = lambda text: tuple(int(part) for part in text.split("."))  # noqa: E731
    if not re.search(rf"^## {re.escape(version)}\b", repo.text(CHANGELOG), re.M):
        yield At(f"there is no section for version {version}", path=CHANGELOG)
    for frozen in repo.releases:
        if number(frozen) > number(version):
            message = f"version {version} is older than the frozen {frozen}"
            yield At(message, path="spec/spec.toml")
    for gate_id in _unnamed(repo, _section(repo, version)):
        message = f"the section of {version} does not name {gate_id}, which it changes"
        yield At(message, path=CHANGELOG)


def _section(repo: Repo, version: str) -> str:
    """The section of the changelog about a version; empty without one."""
    sections = re.split(r"^## ", repo.text(CHANGELOG), flags=re.M)
    return next((s for s in sections if s.split()[:1] == [version]), "")


def _unnamed(repo: Repo, section: str) -> list[str]:
    """Gates that differ from the release before the present version and are not in its section."""
    former = [r for r in repo.releases.values() if r["version"] != repo.spec.version]
    if not former:
        return []
    then, now = former[-1]["gates"], repo.present_release["gates"]
    changed = [gate for gate in then.keys() | now.keys() if then.get(gate) != now.get(gate)]
    return sorted(gate for gate in changed if not _names(section, gate))


def _names(section: str, gate_id: str) -> bool:
    """Whether a section names a gate, and not only one whose id contains it."""
    return bool(re.search(rf"(?<![\w.-]){re.escape(gate_id)}(?![\w-]|\.\w)", section))


@rule(
    "GATE-TOMBSTONE",
    title="A gate of an earlier release is there, or names its successors",
    why="A gate that vanishes takes the failures that it detected out of sight.",
    hint="add the id with its successors to spec/tombstones.toml",
    over=at("spec/tombstones.toml"),
)
def gate_tombstone(repo: Repo) -> Messages:
    released = {gate for release in repo.releases.values() for gate in release["gates"]}
    for gate_id in sorted(released - repo.spec.gates.keys() - repo.spec.tombstones.keys()):
        yield f"gate {gate_id} was released and is gone without a successor"


@rule(
    "GOALPOST",
    title="A limit is loosened only by a new version whose changelog names the gate",
    why="A threshold moved after the run turns a failure into a success.",
    hint="name the gate in the new version's section of spec/CHANGELOG.md, and prove it again",
)
def goalpost(repo: Repo) -> Messages:
    version = repo.spec.version
    current = _section(repo, version)
    for release in reversed(repo.releases.values()):
        is_former = release["version"] != version
        for gate_id, frozen in release["gates"].items():
            if gate_id in repo.spec.gates and not (is_former and _names(current, gate_id)):
                for name, old, now in _loosened(repo.spec.gates[gate_id], frozen["limits"]):
                    text = f"{gate_id}.{name}: {old} in {release['version']}, now {now}"
                    yield At(text, path=gate_file(gate_id))
        if is_former:
            break


def _loosened(gate: Gate, frozen: dict[str, dict]) -> Iterator[tuple[str, str, str]]:
    """(name, frozen limit, present limit) of each limit that is looser than it was."""
    for name, fields in frozen.items():
        limit, old = gate.limits.get(name), Limit(**fields, why="as it was frozen")
        if limit is None or limit.looser_than(old):
            yield name, _stated(old), "gone" if limit is None else _stated(limit)


def _stated(limit: Limit) -> str:
    return f"{limit.direction} {limit.value:g} {limit.unit}"


@rule(
    "RELEASE-FROZEN",
    title="A frozen release never changes",
    why="Evidence of a version stands on its frozen gates and limits.",
    hint="git checkout spec/releases.jsonl; make a new version instead",
    over=at(RELEASES),
)
def release_frozen(repo: Repo) -> Messages:
    try:
        releases = repo.releases
    except IntegrityError as e:
        yield e.what
        return
    yield from repo.rewritten(RELEASES)
    for version, blob in _single_files(repo):
        text = release_text(releases[version]) if version in releases else b""
        if blob != blob_id(io.BytesIO(text), len(text), len(blob)):
            yield f"release {version} is not the one that was committed as a file"


def _single_files(repo: Repo) -> Iterator[tuple[str, str]]:
    """(version, git blob id) of every spec/releases/<version>.json in history."""
    options = ("--raw", "--no-abbrev", "--no-renames", "--format=", "--diff-filter=AM")
    for line in (repo.git("log", *options, "--", "spec/releases") or "").splitlines():
        fields, path = line.split("\t")
        yield Path(path).stem, fields.split()[3]


@rule(
    "GATE-KILLED",
    title="Every gate has been seen red on its plants and green on the control",
    why="A gate that never fired is not evidence of anything.",
    hint="stack gates prove, then stack evidence add DIR",
    over=each_gate,
)
def gate_killed(repo: Repo, gate: Gate) -> Messages:
    state, current = repo.states[gate.id], repo.spec.fingerprints(gate.id)
    kills = repo.survey.coverage.newest_kills(gate.id).values()
    only_stale = kills and not any(fingerprint in current for fingerprint in kills)
    if state.state == "unproven" and not only_stale:
        yield f"gate {gate.id} is unproven: {state.reason}"


@rule(
    "STALE-KILL",
    title="Kills are of the gate as it is now",
    why="A check that changed after its proof is unproven.",
    hint="stack gates prove at the current commit, then stack evidence add DIR",
    over=each_gate,
)
def stale_kill(repo: Repo, gate: Gate) -> Messages:
    newest = repo.survey.coverage.newest_kills(gate.id)
    current = repo.spec.fingerprints(gate.id)
    if stale := sorted(p for p, fingerprint in newest.items() if fingerprint not in current):
        yield f"gate {gate.id}: the kill of {', '.join(stale)} is of an older fingerprint"


@rule(
    "GATE-FAILED",
    title="No gate's latest accepted run is red",
    why="A red result in the ledger is a known defect.",
    hint="fix the cause and add a new run, or waive it with reason and expiry",
    over=each_gate,
)
def gate_failed(repo: Repo, gate: Gate) -> Messages:
    if repo.states[gate.id].state == "failed":
        yield f"gate {gate.id}: {repo.states[gate.id].reason}"


@rule(
    "PLANT-EXISTS",
    title="Gates and plants name each other",
    why="A gate without its plant cannot be falsified; a plant without its gate proves nothing.",
    hint="add the plant to stack/museum or the id to the gate's plants",
)
def plant_exists(repo: Repo) -> Messages:
    for gate in repo.spec.gates.values():
        if not gate.plants:
            yield At(f"gate {gate.id} names no plant", path=gate_file(gate.id))
        for plant in (p for p in gate.plants if p not in repo.plants):
            message = f"gate {gate.id} names the plant {plant}, which is not in the museum"
            yield At(message, path=gate_file(gate.id))
    for plant in repo.plants.values():
        for message in _plant_problems(repo, plant):
            yield At(f"plant {plant.id} {message}", plant.line, plant.path)


def _plant_problems(repo: Repo, plant: Exhibit) -> Iterator[str]:
    gate = repo.spec.gates.get(plant.gate)
    if gate is None or plant.id not in gate.plants:
        yield f"is for {plant.gate}, which does not list it"
    if not plant.story or not plant.sources:
        yield "lacks its story or its sources"
    if plant.function and not plant.source:
        yield f"names {plant.function}, which does not exist"
    for target, edits in edits_by_target(plant).items():
        text = source_of(repo.root, target)[1]
        if missing := [e.old for e in edits if text.count(e.old) != 1]:
            yield f"edits {target}, where its old text {missing[0]!r} does not stand once"


@rule(
    "CHECK-EXISTS",
    title="Every gate's check exists and is bound to it",
    why="A gate whose check is missing is never evaluated.",
    hint="define the function in contracts/ and decorate it with @decides",
    over=each_gate,
)
def check_exists(repo: Repo, gate: Gate) -> Messages:
    path, name = source_of(repo.root, gate.check)[0], gate.check.partition(":")[2]
    check = repo.python_functions(path).get(name)
    if check is None:
        yield f"gate {gate.id}: {path} defines no {name}"
    elif f'@decides("{gate.id}")' not in check.text:
        yield At(f"{name} is not decorated with @decides({gate.id!r})", check.line, path)


@rule(
    "TEST-EXISTS",
    title="Every cited test exists, is run, and asserts something",
    why="A citation of a missing, skipped or emptied test claims a proof that nothing gives.",
    hint="write the test or correct the citation",
    over=each_gate,
)
def test_exists(repo: Repo, gate: Gate) -> Messages:
    if not gate.tests:
        yield f"gate {gate.id} cites no test"
    for test in (*gate.tests, *([gate.rates.measured_by] if gate.rates else ())):
        if repo.missing_test(test):
            yield f"gate {gate.id} cites {test}, which does not exist"
        elif reason := repo.proves_nothing(test):
            yield f"gate {gate.id} cites {test}, which {reason}"


@rule(
    "RATES-STATED",
    title="Every gate states its error rates, or why it is not statistical",
    why="The verdict of a gate that decides on noise is weighed by its error rates.",
    hint="measure `rates` in tests/contracts/test_rates.py, or list the gate under a reason in "
    "spec/chance.toml",
)
def rates_stated(repo: Repo) -> Messages:
    certain = repo.spec.certain
    for gate in repo.spec.gates.values():
        path = gate_file(gate.id)
        if gate.rates is None:
            if gate.id not in certain:
                text = f"gate {gate.id} states no rates, and spec/chance.toml gives no reason"
                yield At(text, path=path)
            continue
        if gate.id in certain:
            yield At(f"gate {gate.id} states rates, so it is not beyond chance", path=CHANCE)
        if gate.rates.power <= gate.rates.false_alarm:
            text = f"gate {gate.id} is red on its effect no more often than on a clean run"
            yield At(text, path=path)
    for gate_id in (g for g in certain if g not in repo.spec.gates):
        yield At(f"{gate_id} is no gate", path=CHANCE)


@rule(
    "FAILURE-PLANTED",
    title="Every documented failure that can happen here has been planted",
    why="A known failure without a plant is found by no gate. A failure of a part that is not "
    "built counts as awaiting.",
    hint="write the plant, or correct what spec/failures names; a capability that is built awaits "
    "nothing",
)
def failure_planted(repo: Repo) -> Messages:
    for failure in repo.catalogue.failures.values():
        if not repo.catalogue.awaits(failure):
            built = f", and {failure.awaiting} is built" if failure.awaiting else ""
            for text in _loose_ends(repo, failure):
                message = f"{failure.id} {failure.name}: {text}{built}"
                yield At(message, path=f"spec/failures/{failure.subsystem}.toml")


def _loose_ends(repo: Repo, failure: Failure) -> Iterator[str]:
    """References of a failure that the repository lacks."""
    if not (failure.plants or failure.rules or failure.tests):
        yield "nothing stands for it"
    for plant in (p for p in failure.plants if p not in repo.plants):
        yield f"names the plant {plant}, which is not in the museum"
    for code in (code for code in failure.rules if code not in RULES):
        yield f"names the rule {code}, which does not exist"
    for test in filter(repo.missing_test, failure.tests):
        yield f"names the test {test}, which does not exist"
    moments = {repo.spec.gates[g].moment for g in answering_gates(repo.spec, failure)}
    if failure.plants and failure.latency == "before step 1" and "preflight" not in moments:
        yield "says before step 1, and no gate of its plants looks there"


@rule(
    "GATE-CARRIED",
    title="A gate is carried over only if both its fingerprints are those of the commit named",
    why="A false line of the table would let the evidence of one gate stand for another.",
    hint="restore spec/carried.jsonl from git; a gate that changed is proven again instead",
    over=at(CARRIED),
)
def gate_carried(repo: Repo) -> Messages:
    for commit in sorted({row.commit for row in repo.spec.carried}):
        if commit in repo.ancestors:
            with repo.tree_at(commit, "spec", "contracts") as root:
                yield from _carried_at(repo, commit, root)
        elif repo.history.complete:
            yield f"commit {commit} is no ancestor of this one"
        else:
            message = f"GATE-CARRIED: commit {commit[:12]} is not in this history"
            repo.not_verified.append(message)


def _carried_at(repo: Repo, commit: str, root: Path) -> Messages:
    """Rows of a commit whose fingerprints differ from those of its files."""
    files = sorted((root / "spec" / "gates").glob("*.toml"))
    entries = [e for f in files for e in tomllib.loads(f.read_text("utf-8")).get("gate", [])]
    gates = {entry["id"]: entry for entry in entries}
    for number, row in enumerate(repo.spec.carried, start=1):
        if row.commit != commit:
            continue
        if (gate := gates.get(row.gate)) is None:
            yield At(f"gate {row.gate} is not in the spec of commit {commit[:12]}", number)
            continue
        fields, check = normative_fields(gate), gate["check"]
        pairs = {
            "old": (row.old, first_form(fields, check, root)),
            "new": (row.new, check_fingerprint(fields, check, root)),
        }
        for name in (name for name, (stated, actual) in pairs.items() if stated != actual):
            text = f"the {name} fingerprint of {row.gate} is not the one at commit {commit[:12]}"
            yield At(text, number)
