"""Rules about the spec, its gates, checks, plants and tests."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stackproof.museum.plant import Plant
from stackproof.spec.errors import IntegrityError, StackproofError
from stackproof.spec.failures import Failure, answering_gates
from stackproof.spec.fingerprint import check_fingerprint
from stackproof.spec.gates import Limit, normative_fields
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import read_record
from stackproof.spec.registry import read_registry
from stackproof.spec.releases import FILE as RELEASES
from stackproof.spec.releases import frozen_release, read_releases, release_text
from tools.integrity.core import RULES, Repo, git_blob_id, rule
from tools.integrity.former_fingerprint import first_form
from tools.site_pages.exhibits import source_of

Found = Iterator[tuple[str, int, str]]
CARRIED = "spec/carried.jsonl"


@rule(
    "SCHEMA",
    title="Spec, records, ledger and registry are valid and strict",
    why="A duplicate key, NaN or unknown field lets a file say two things at once.",
    hint="restore the file from git or mend the named field",
)
def schema(repo: Repo) -> Found:
    readers = {
        "spec": lambda: repo.spec,
        "spec/failures": lambda: repo.catalogue,
        "evidence/ledger.jsonl": lambda: Ledger(repo.root / "evidence").entries(),
        "evidence/archive.jsonl": lambda: repo.ledger.archive.lines,
        "evidence/registry.toml": lambda: read_registry(repo.root / "evidence" / "registry.toml"),
    }
    for path in sorted((repo.root / "evidence").glob("*/metadata.json")):
        readers[path.relative_to(repo.root).as_posix()] = lambda path=path: read_record(path)
    for path, read in readers.items():
        try:
            read()
        except StackproofError as e:
            yield path, 0, e.what


@rule(
    "SPEC-EMPTY",
    title="The spec holds gates",
    why="An empty scope is always green.",
    hint="spec/gates/*.toml must define gates",
)
def spec_empty(repo: Repo) -> Found:
    if not repo.spec.gates:
        yield "spec/gates", 0, "there is no gate at all"


@rule(
    "ID-UNIQUE",
    title="Ids are unique, also without regard to case",
    why="Two things under one name let evidence for one discharge the other.",
    hint="choose another id; ids are never reused",
)
def id_unique(repo: Repo) -> Found:
    groups = {
        "spec/gates": list(repo.spec.gates),
        "evidence/ledger.jsonl": [e.record for e in repo.entries],
        "evidence/registry.toml": [m.id for m in repo.registry],
        "docs/adr": [p.name[:4] for p in (repo.root / "docs" / "adr").glob("[0-9]*.md")],
    }
    for path, ids in groups.items():
        for name, count in Counter(i.casefold() for i in ids).items():
            if count > 1:
                yield path, 0, f"the id {name} is used {count} times"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@rule(
    "SPEC-NOBUMP",
    title="A change of the spec comes with a new version",
    why=(
        "Evidence binds to fingerprints; a silent change would leave old evidence standing for a "
        "new promise."
    ),
    hint="raise spec/spec.toml's version and run python tools/freeze_spec.py",
)
def spec_nobump(repo: Repo) -> Found:
    spec = repo.spec
    frozen = read_releases(repo.root).get(spec.version)
    if frozen is None:
        yield RELEASES, 0, f"version {spec.version} was never frozen"
        return
    now = frozen_release(spec)["gates"]
    for gate_id in sorted(now.keys() | frozen["gates"].keys()):
        if gate_id not in frozen["gates"] or gate_id not in now:
            yield (
                "spec/spec.toml",
                0,
                (
                    f"gate {gate_id} was {'added' if gate_id in now else 'removed'} without a new "
                    "version"
                ),
            )
        elif frozen["gates"][gate_id]["fingerprint"] not in spec.fingerprints(gate_id):
            yield (
                f"spec/gates/{gate_id.split('.')[0]}.toml",
                0,
                f"gate {gate_id} or its check differs from frozen version {spec.version}",
            )


@rule(
    "SPEC-CHANGELOG",
    title="The current version is the newest and has a changelog entry",
    why="A version nobody described cannot be reviewed.",
    hint="add a section to spec/CHANGELOG.md",
)
def spec_changelog(repo: Repo) -> Found:
    version = repo.spec.version
    path = repo.root / "spec" / "CHANGELOG.md"
    if not path.is_file() or not re.search(
        rf"^## {re.escape(version)}\b", path.read_text("utf-8"), re.M
    ):
        yield "spec/CHANGELOG.md", 0, f"there is no section for version {version}"
    for frozen in read_releases(repo.root):
        if _number(frozen) > _number(version):
            yield "spec/spec.toml", 0, f"version {version} is older than the frozen {frozen}"


@rule(
    "GOALPOST",
    title="A limit is loosened only by a new version that says so",
    why="A threshold moved after the run turns a failure into a success.",
    hint=(
        "name the gate in the new version's section of spec/CHANGELOG.md; its evidence is re-opened"
    ),
)
def goalpost(repo: Repo) -> Found:
    spec, changelog = repo.spec, repo.root / "spec" / "CHANGELOG.md"
    text = changelog.read_text("utf-8") if changelog.is_file() else ""
    section = re.split(r"^## ", text, flags=re.M)
    current = next((s for s in section if s.startswith(spec.version)), "")
    for release in reversed(read_releases(repo.root).values()):
        excused = release["version"] != spec.version
        for gate_id, frozen in release["gates"].items():
            gate = spec.gates.get(gate_id)
            for name, old in frozen["limits"].items() if gate else ():
                limit = gate.limits.get(name)
                before = Limit(**old, why="as it was frozen")
                if (limit is None or limit.looser_than(before)) and not (
                    excused and gate_id in current
                ):
                    now = "gone" if limit is None else f"{limit.value:g}"
                    yield (
                        f"spec/gates/{gate.subsystem}.toml",
                        0,
                        f"{gate_id}.{name}: {old['value']:g} in {release['version']}, now {now}",
                    )
        if release["version"] != spec.version:
            break


@rule(
    "RELEASE-FROZEN",
    title="A frozen release never changes",
    why="It is the memory of what was promised.",
    hint="git checkout spec/releases.jsonl; make a new version instead",
)
def release_frozen(repo: Repo) -> Found:
    try:
        releases = read_releases(repo.root)
    except IntegrityError as e:
        yield RELEASES, 0, e.what
        return
    if commit := repo.rewritten(RELEASES):
        yield RELEASES, 0, f"lines committed in {commit[:10]} were changed or removed"
    for version, blob in _single_files(repo):
        text = release_text(releases[version]) if version in releases else b""
        if blob != git_blob_id(text, len(blob)):
            yield RELEASES, 0, f"release {version} is not the one that was committed as a file"


def _single_files(repo: Repo) -> Iterator[tuple[str, str]]:
    """(version, git blob id) of every spec/releases/<version>.json that history holds."""
    options = ("--raw", "--no-abbrev", "--no-renames", "--format=", "--diff-filter=AM")
    for line in (repo.git("log", *options, "--", "spec/releases") or "").splitlines():
        fields, path = line.split("\t")
        yield Path(path).stem, fields.split()[3]


def _kills(repo: Repo, gate_id: str) -> list:
    return [k for r in repo.records.values() for k in r.kills if k.gate == gate_id]


@rule(
    "GATE-KILLED",
    title="Every gate has been seen red on its plants and green on the control",
    why="A gate that never fired is not evidence of anything.",
    hint="stack gates prove, then stack evidence add DIR",
)
def gate_killed(repo: Repo) -> Found:
    for gate_id, state in repo.states.items():
        current = repo.spec.fingerprints(gate_id)
        kills = _kills(repo, gate_id)
        if state.state == "unproven" and not (
            kills and all(k.fingerprint not in current for k in kills)
        ):
            yield (
                f"spec/gates/{gate_id.split('.')[0]}.toml",
                0,
                f"gate {gate_id} is unproven: {state.reason}",
            )


@rule(
    "STALE-KILL",
    title="Kills are of the gate as it is now",
    why="A check that changed after its proof is unproven.",
    hint="stack gates prove at the current commit, then stack evidence add DIR",
)
def stale_kill(repo: Repo) -> Found:
    for gate_id in repo.spec.gates:
        current = repo.spec.fingerprints(gate_id)
        newest = {k.plant: k for k in _kills(repo, gate_id)}
        stale = sorted(p for p, k in newest.items() if k.fingerprint not in current)
        if stale:
            yield (
                f"spec/gates/{gate_id.split('.')[0]}.toml",
                0,
                f"gate {gate_id}: the kill of {', '.join(stale)} is of an older fingerprint",
            )


@rule(
    "GATE-FAILED",
    title="No gate's latest accepted run is red",
    why="A red result in the ledger is a known defect.",
    hint="mend the cause and add a new run, or waive it with reason and expiry",
)
def gate_failed(repo: Repo) -> Found:
    for gate_id, state in repo.states.items():
        if state.state == "failed":
            yield f"spec/gates/{gate_id.split('.')[0]}.toml", 0, f"gate {gate_id}: {state.reason}"


@rule(
    "PLANT-EXISTS",
    title="Gates and plants name each other",
    why="A gate without its plant cannot be falsified; a plant without its gate proves nothing.",
    hint="add the plant to stack/museum or the id to the gate's plants",
)
def plant_exists(repo: Repo) -> Found:
    for gate in repo.spec.gates.values():
        if not gate.plants:
            yield f"spec/gates/{gate.subsystem}.toml", 0, f"gate {gate.id} names no plant"
        for plant_id in gate.plants:
            if plant_id not in repo.plants:
                yield (
                    f"spec/gates/{gate.subsystem}.toml",
                    0,
                    f"gate {gate.id} names the plant {plant_id}, which is not in the museum",
                )
    for exhibit in repo.plants.values():
        gate, plant = repo.spec.gates.get(exhibit.gate), exhibit.plant
        if gate is None or plant.id not in gate.plants:
            yield (
                exhibit.path,
                exhibit.line,
                f"plant {plant.id} is for {plant.gate}, which does not list it",
            )
        if not plant.story or not plant.sources:
            yield exhibit.path, exhibit.line, f"plant {plant.id} lacks its story or its sources"
        if plant.function and not exhibit.source:
            yield (
                exhibit.path,
                exhibit.line,
                f"plant {plant.id} names {plant.function}, which does not exist",
            )
        for target, olds in _edited(plant):
            _, text = source_of(repo.root, target)
            if missing := [old for old in olds if text.count(old) != 1]:
                yield (
                    exhibit.path,
                    exhibit.line,
                    (
                        f"plant {plant.id} edits {target}, where its old text {missing[0]!r} does "
                        "not stand once"
                    ),
                )


def _edited(plant: Plant) -> Iterator[tuple[str, list[str]]]:
    """Every function that a plant edits, with the old texts of the edits."""
    for target in dict.fromkeys(e.target for e in plant.edits):
        yield target, [e.old for e in plant.edits if e.target == target]


@rule(
    "CHECK-EXISTS",
    title="Every gate's check exists and is bound to it",
    why="A gate whose check is missing is never asked.",
    hint="define the function in contracts/ and decorate it with @decides",
)
def check_exists(repo: Repo) -> Found:
    for gate in repo.spec.gates.values():
        module, name = gate.check.split(":")
        path = module.replace(".", "/") + ".py"
        if name not in repo.python_functions(path):
            yield (
                f"spec/gates/{gate.subsystem}.toml",
                0,
                f"gate {gate.id}: {path} defines no {name}",
            )
        elif f'@decides("{gate.id}")' not in repo.text(path):
            yield (
                path,
                repo.python_functions(path)[name],
                f"{name} is not decorated with @decides({gate.id!r})",
            )


@rule(
    "TEST-EXISTS",
    title="Every cited test exists",
    why="A test that is cited and absent is a promise nobody keeps.",
    hint="write the test or correct the citation",
)
def test_exists(repo: Repo) -> Found:
    for gate in repo.spec.gates.values():
        if not gate.tests:
            yield f"spec/gates/{gate.subsystem}.toml", 0, f"gate {gate.id} cites no test"
        for test in (*gate.tests, *([gate.rates.measured_by] if gate.rates else ())):
            path, _, name = test.partition("::")
            if name not in repo.python_functions(path):
                yield (
                    f"spec/gates/{gate.subsystem}.toml",
                    0,
                    f"gate {gate.id} cites {test}, which does not exist",
                )


@rule(
    "RATES-STATED",
    title="Every gate states how often it is wrong, or why chance has no say in it",
    why=(
        "A gate that decides on noise and does not say how often it errs cannot be weighed: its "
        "red may be luck, and its green blindness."
    ),
    hint=(
        "measure `rates` in tests/contracts/test_rates.py, or list the gate under a reason in "
        "spec/chance.toml"
    ),
)
def rates_stated(repo: Repo) -> Found:
    for gate in repo.spec.gates.values():
        if gate.rates is None and gate.id not in repo.spec.certain:
            yield (
                f"spec/gates/{gate.subsystem}.toml",
                0,
                f"gate {gate.id} states no rates, and spec/chance.toml does not say why",
            )
        if gate.rates is not None and gate.id in repo.spec.certain:
            yield "spec/chance.toml", 0, f"gate {gate.id} states rates, so it is not beyond chance"
        if gate.rates is not None and gate.rates.power <= gate.rates.false_alarm:
            yield (
                f"spec/gates/{gate.subsystem}.toml",
                0,
                f"gate {gate.id} is red on its effect no more often than on a clean run",
            )
    for gate_id in repo.spec.certain:
        if gate_id not in repo.spec.gates:
            yield "spec/chance.toml", 0, f"{gate_id} is no gate"


@rule(
    "FAILURE-PLANTED",
    title="Every documented failure that can happen here has been planted",
    why=(
        "A failure that is known and never planted is the next one nobody sees. One that cannot "
        "happen yet is counted as awaiting."
    ),
    hint=(
        "write the plant, or correct what spec/failures names; a capability that is built awaits "
        "nothing"
    ),
)
def failure_planted(repo: Repo) -> Found:
    for failure in repo.catalogue.failures.values():
        if repo.catalogue.awaits(failure):
            continue
        path = f"spec/failures/{failure.subsystem}.toml"
        built = f", and {failure.awaiting} is built" if failure.awaiting else ""
        if not (failure.plants or failure.rules or failure.tests):
            yield path, 0, f"{failure.id} {failure.name}: nothing stands for it{built}"
        for text in _loose_ends(repo, failure):
            yield path, 0, f"{failure.id} {failure.name}: {text}{built}"


def _loose_ends(repo: Repo, failure: Failure) -> Iterator[str]:
    """What a failure names and the repository does not have."""
    gates = answering_gates(repo.spec, failure)
    yield from (
        f"names the plant {p}, which is not in the museum"
        for p in failure.plants
        if p not in repo.plants
    )
    yield from (f"names the rule {r}, which there is not" for r in failure.rules if r not in RULES)
    for test in failure.tests:
        path, _, name = test.partition("::")
        if name not in repo.python_functions(path):
            yield f"names the test {test}, which there is not"
    early = failure.plants and failure.latency == "before step 1"
    if early and not any(repo.spec.gates[g].moment == "preflight" for g in gates):
        yield "says before step 1, and no gate of its plants looks there"


@rule(
    "GATE-CARRIED",
    title="A gate is carried over only if both its fingerprints are those of the commit named",
    why=(
        "The table lets old evidence stand for a gate in a new form; one false line would let it "
        "stand for any other gate."
    ),
    hint="restore spec/carried.jsonl from git; a gate that changed is proven again instead",
)
def gate_carried(repo: Repo) -> Found:
    for commit in sorted({row.commit for row in repo.spec.carried}):
        if commit not in repo.ancestors:
            if repo.lacks_history:
                repo.not_verified.append(
                    f"GATE-CARRIED: commit {commit[:12]} is not in this history"
                )
            else:
                yield CARRIED, 0, f"commit {commit} is no ancestor of this one"
            continue
        with repo.tree_at(commit, "spec", "contracts") as root:
            yield from _carried_at(repo, commit, root)


def _carried_at(repo: Repo, commit: str, root: Path) -> Found:
    """Rows of a commit whose fingerprints are not what its files give."""
    entries = [
        e
        for path in sorted((root / "spec" / "gates").glob("*.toml"))
        for e in tomllib.loads(path.read_text("utf-8")).get("gate", [])
    ]
    gates = {entry["id"]: entry for entry in entries}
    for number, row in enumerate(repo.spec.carried, start=1):
        if row.commit != commit:
            continue
        if (gate := gates.get(row.gate)) is None:
            yield CARRIED, number, f"gate {row.gate} is not in the spec of commit {commit[:12]}"
            continue
        fields, check = normative_fields(gate), gate["check"]
        if first_form(fields, check, root) != row.old:
            yield (
                CARRIED,
                number,
                f"the old fingerprint of {row.gate} is not the one at commit {commit[:12]}",
            )
        if check_fingerprint(fields, check, root) != row.new:
            yield (
                CARRIED,
                number,
                f"the new fingerprint of {row.gate} is not the one at commit {commit[:12]}",
            )
