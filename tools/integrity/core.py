"""Rules of the repository, the loop that runs them, and the checkout as they read it."""

import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stackproof.config.load import recorded_config
from stackproof.spec import findings
from stackproof.spec.archive import History
from stackproof.spec.coverage import Coverage, GateState
from stackproof.spec.errors import IntegrityError, NoHistory, StackproofError
from stackproof.spec.failures import Catalogue, load_catalogue
from stackproof.spec.gates import Spec, load_spec
from stackproof.spec.ledger import Entry, Ledger, Records
from stackproof.spec.records import Record, Series
from stackproof.spec.registry import Release, read_registry
from stackproof.spec.releases import frozen_release, read_releases
from stackproof.spec.series import parse_series
from tools.exhibits import Exhibit, read_exhibits
from tools.integrity.glance import Glance, glance_at
from tools.source import Definition, definitions, proves_nothing

LEDGER, REGISTRY = "evidence/ledger.jsonl", "evidence/registry.toml"
LOG = "metrics.jsonl"  # of the steps of a run
LOCK = "constraints.txt"  # versions of the libraries
SOURCES = ("spec/", "contracts/", "stack/", "tools/")


@dataclass(frozen=True)
class Finding:
    """A violated rule, with the place and the next step."""

    code: str
    path: str
    line: int
    message: str
    hint: str


@dataclass(frozen=True)
class At:
    """A message of a rule about another place than the first line of its subject's file."""

    message: str
    line: int = 0
    path: str = ""


Messages = Iterator[str | At]
Scope = Callable[["Repo"], Iterable[tuple[str, tuple]]]


@dataclass(frozen=True)
class Rule:
    """A named check of the repository. `scope` gives (path, arguments) of each subject;
    `look(repo, *arguments)` yields a message for each violation.
    """

    code: str
    title: str
    why: str
    hint: str
    look: Callable[..., Messages]
    scope: Scope


RULES: dict[str, Rule] = {}


def whole(repo: "Repo") -> Iterable[tuple[str, tuple]]:
    """The repository as the one subject of a rule."""
    return [("", ())]


def rule(code: str, *, title: str, why: str, hint: str, over: Scope = whole) -> Callable:
    """Register a generator as a rule. Raises ValueError if the code is taken."""

    def register(look: Callable) -> Callable:
        if code in RULES:
            raise ValueError(f"rule {code} is defined twice")
        RULES[code] = Rule(code, title, why, hint, look, over)
        return look

    return register


def findings_in(repo: "Repo") -> list[Finding]:
    """The findings of all rules, ordered by rule and place, each once. A rule that cannot read its
    subject or crashes is a finding too.

    The rules about one record look at it together, while it is read: each record is read once, and
    none is kept.
    """
    found: set[Finding] = set()
    of_records = [r for r in RULES.values() if r.scope is each_record]

    def look_at(record: Record) -> None:
        subject = [(repo.record_file(record.id), (record,))]
        for each in of_records:
            found.update(_findings(repo, each, lambda repo: subject))

    repo.look_at = look_at
    for each in RULES.values():
        if each.scope is not each_record:
            found.update(_findings(repo, each, each.scope))
    try:
        repo.survey  # noqa: B018
    except StackproofError as e:
        text = f"the records could not be read: {e.what}"
        found.add(Finding("SCHEMA", "", 0, text, "repair what SCHEMA names first"))
    return sorted(found, key=lambda f: (f.code, f.path, f.line, f.message))


def _findings(repo: "Repo", each: Rule, scope: Scope) -> set[Finding]:
    """The findings of one rule about its subjects."""
    try:
        return {
            Finding(each.code, at.path or path, at.line, at.message, each.hint)
            for path, arguments in scope(repo)
            for message in each.look(repo, *arguments)
            for at in [message if isinstance(message, At) else At(message)]
        }
    except StackproofError as e:
        text = f"{each.code} could not look: {e.what}"
        return {Finding("SCHEMA", "", 0, text, "repair what SCHEMA names first")}
    except Exception as e:
        text = f"rule {each.code} crashed: {type(e).__name__}: {e}"
        return {Finding("INTERNAL", "tools", 0, text, "this is a bug of the checker")}


def at(path: str) -> Scope:
    """The scope of a rule about one file."""
    return lambda repo: [(path, ())]


def each_record(repo: "Repo") -> Iterable[tuple[str, tuple[Record]]]:
    """Records that no later one supersedes. Rules of this scope look while a record is read."""
    return ((repo.record_file(r.id), (r,)) for r in repo.records.values())


def each_gate(repo: "Repo") -> Iterable[tuple[str, tuple]]:
    return ((gate_file(gate_id), (gate,)) for gate_id, gate in repo.spec.gates.items())


def each_release(repo: "Repo") -> Iterable[tuple[str, tuple[Release]]]:
    return ((REGISTRY, (model,)) for model in repo.registry)


def each_page(repo: "Repo") -> Iterable[tuple[str, tuple[str]]]:
    """Hand-written Markdown files with their text."""
    return ((path, (path, repo.text(path))) for path in repo.markdown)


def gate_file(gate_id: str) -> str:
    return f"spec/gates/{gate_id.partition('.')[0]}.toml"


def number(record: Record, name: str) -> float | None:
    """A metric as a number; None if the record lacks it."""
    metric = record.metrics.get(name)
    return float(metric.value) if metric is not None else None


def stated_count(record: Record, name: str, default: int) -> int:
    """A fact of the environment as a whole number; else the default."""
    value = record.environment.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


class Checkout:
    """Files and history of a repository. `signers` is the file of those who may pin its ledger;
    None: its own.
    """

    def __init__(self, root: Path, signers: Path | None = None):
        self.root, self.signers = root.resolve(), signers
        self.history = History(self.root)
        self.not_verified: list[str] = []  # facts that need a history which the checkout lacks

    def git(self, *arguments: str) -> str | None:
        """Output of a git command; None if it failed."""
        done = self.history.git(*arguments)
        return None if done is None else done.decode("utf-8", errors="replace")

    @contextmanager
    def tree_at(self, commit: str, *paths: str) -> Iterator[Path]:
        """A temporary folder with files as a commit holds them.
        Raises IntegrityError if git cannot read them.
        """
        files = self.history.files(commit, *paths)
        with tempfile.TemporaryDirectory(prefix="stackproof-commit-") as name:
            folder = Path(name).resolve()
            for path, data in zip(files, self.history.read(list(files.values()))):
                target = folder / path
                if data is None or ".." in target.parts:
                    files = {}
                    break
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            if not files:
                raise IntegrityError(f"commit {commit[:12]} cannot be read", value=", ".join(paths))
            yield folder

    @cached_property
    def tracked(self) -> list[str]:
        """Files in git that exist in the working tree."""
        listed = (self.git("ls-files", "-z") or "").split("\0")
        return [path for path in listed if path and (self.root / path).is_file()]

    @property
    def source_files(self) -> list[str]:
        """Tracked Python files of the package and of the tools."""
        return [p for p in self.tracked if p.endswith(".py") and p.startswith(SOURCES)]

    @cached_property
    def markdown(self) -> list[str]:
        """Hand-written Markdown files."""
        outside = (".venv/", "evidence/")
        return [p for p in self.tracked if p.endswith(".md") and not p.startswith(outside)]

    @property
    def decisions(self) -> list[Path]:
        return sorted((self.root / "docs" / "adr").glob("[0-9]*.md"))

    def text(self, path: str) -> str:
        """The text of a file; empty if it does not exist."""
        file = self.root / path
        return file.read_text("utf-8") if file.is_file() else ""

    @cached_property
    def ancestors(self) -> dict[str, int]:
        """Commits reachable from HEAD with their committer time, seconds."""
        lines = (self.git("log", "--format=%H %ct", "HEAD") or "").splitlines()
        return {sha: int(time) for sha, time in (line.split() for line in lines)}

    def rewritten(self, path: str) -> Messages:
        """A message if an ancestor of HEAD, on whichever side of a merge, holds lines of an
        append-only file that the file of today does not begin with.
        """
        file = self.root / path
        now = file.read_bytes() if file.is_file() else b""
        seen: set[bytes] = set()
        for commit, then in self.in_history(path).items():
            if then not in seen and not now.startswith(then):
                yield f"lines committed in {commit[:10]} were changed or removed"
                return
            seen.add(then)

    def in_history(self, path: str) -> dict[str, bytes]:
        """The content of a file at each ancestor of HEAD that has it, oldest first, read once."""
        if path not in self._histories:
            self._histories[path] = self._read_history(path)
        return self._histories[path]

    def _read_history(self, path: str) -> dict[str, bytes]:
        commits = list(reversed(self.ancestors))
        places = "".join(f"{commit}:{path}\n" for commit in commits).encode()
        listed = self.history.git("cat-file", "--batch-check=%(objectname)", stdin=places) or b""
        blobs = {
            commit: line
            for commit, line in zip(commits, listed.decode().splitlines())
            if not line.endswith(" missing")
        }
        distinct = list(dict.fromkeys(blobs.values()))
        contents = {blob: data or b"" for blob, data in zip(distinct, self.history.read(distinct))}
        return {commit: contents[blob] for commit, blob in blobs.items()}

    @cached_property
    def _histories(self) -> dict[str, dict[str, bytes]]:
        return {}


@dataclass
class Survey:
    """What one pass over all accepted records gives: a glance at each, in ledger order, the states
    of the gates, and why a record is not the accepted one.
    """

    glances: dict[str, Glance]
    coverage: Coverage
    unread: dict[str, str]


@dataclass
class _Beside:
    """What was read of one record and of the files beside it, by name."""

    record: str
    config: dict[str, Any] | None = None
    content: dict[str, bytes] = field(default_factory=dict)
    lines: dict[str, list[dict]] = field(default_factory=dict)


class Repo(Checkout):
    """A checkout. Files and git facts are read lazily and once."""

    look_at: Callable[[Record], None] = staticmethod(lambda record: None)

    @cached_property
    def spec(self) -> Spec:
        return load_spec(self.root)

    @cached_property
    def spec_sha256(self) -> str:
        return self.spec.sha256

    @cached_property
    def releases(self) -> dict[str, dict]:
        """Releases of the spec by version, oldest first."""
        return read_releases(self.root)

    @cached_property
    def present_release(self) -> dict:
        """The release that freezing the spec now would give."""
        return frozen_release(self.spec)

    @cached_property
    def catalogue(self) -> Catalogue:
        return load_catalogue(self.root)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.root / "evidence")

    @cached_property
    def entries(self) -> list[Entry]:
        return self.ledger.entries()

    @cached_property
    def survey(self) -> Survey:
        """The one pass over the records; `look_at` is called with each that is not superseded."""
        made, everything = Survey({}, Coverage(self.spec), {}), Records(self.ledger, self.entries)
        for entry in self.entries:
            try:
                record = everything[entry.record]
            except NoHistory:
                continue
            except StackproofError as e:
                made.unread[entry.record] = e.what
                continue
            made.glances[record.id] = self.seen[record.id] = glance_at(record)
            if record.id not in self.superseded:
                made.coverage.add(record)
                self.look_at(record)
        return made

    def glance(self, record_id: str) -> Glance | None:
        """A glance at a record that no later one supersedes, also during the pass; None if it is
        not accepted.
        """
        return None if record_id in self.superseded else self.seen_glance(record_id)

    def seen_glance(self, record_id: str) -> Glance | None:
        """A glance at an accepted record, superseded or not, also during the pass."""
        if record_id not in self.seen and record_id in self.sha256_of:
            try:
                record = Records(self.ledger, self.entries)[record_id]
                self.seen[record_id] = glance_at(record)
            except StackproofError:
                return None
        return self.seen.get(record_id)

    @cached_property
    def sha256_of(self) -> dict[str, str]:
        """The sha256 of each record in the ledger."""
        return {e.record: e.sha256 for e in self.entries}

    @cached_property
    def seen(self) -> dict[str, Glance]:
        return {}

    @cached_property
    def superseded(self) -> frozenset[str]:
        return frozenset(e.supersedes for e in self.entries if e.supersedes)

    def valid_records(self) -> Container[str]:
        """Accepted records that were read; none if the ledger cannot be read."""
        try:
            return self.survey.glances
        except StackproofError:
            return ()

    @cached_property
    def accepted(self) -> Records:
        """Records that are readable and match their hash; RECORD-HASH reports the others. Each
        access reads the record again.
        """
        known = self.survey.glances
        return Records(self.ledger, (e for e in self.entries if e.record in known))

    @cached_property
    def records(self) -> Records:
        """Accepted records that no later one supersedes, as `accepted`."""
        known = self.survey.glances.keys() - self.superseded
        return Records(self.ledger, (e for e in self.entries if e.record in known))

    @cached_property
    def glances(self) -> dict[str, Glance]:
        """A glance at each accepted record that no later one supersedes."""
        glances = self.survey.glances
        return {name: glance for name, glance in glances.items() if name not in self.superseded}

    @cached_property
    def states(self) -> dict[str, GateState]:
        return self.survey.coverage.states(findings=self.findings)

    @cached_property
    def findings(self) -> list[findings.Finding]:
        return findings.read_findings(self.root / "evidence" / findings.FILE)

    @cached_property
    def registry(self) -> list[Release]:
        return read_registry(self.root / REGISTRY)

    def config_of(self, record: Record) -> dict[str, Any] | None:
        """The configuration of a run under today's keys, with defaults; that of the record that was
        read last is kept. None if it is not valid, which RECORD-CONFIG reports.
        """
        held = self._beside(record)
        if held.config is None:
            try:
                held.config = recorded_config(record.config).to_dict()
            except StackproofError:
                held.config = {}
        return held.config or None

    def record_file(self, record_id: str, name: str = "metadata.json") -> str:
        return f"evidence/{record_id}/{name}"

    def series(self, record: Record | None, name: str) -> list[dict]:
        """Lines of a series beside a record; those that were read last are kept. Empty if the
        record has none, if a file does not match its hash, or if a line is invalid, which
        RECORD-HASH, ARTEFACT-HASH and SERIES-TYPED report.
        """
        declared = next((s for s in record.series if s.path == name), None) if record else None
        try:
            return self.series_lines(record, declared) if declared else []
        except StackproofError:
            return []

    def series_lines(self, record: Record, series: Series) -> list[dict]:
        """The lines of a series; those of the record that was read last are kept. Raises
        IntegrityError as `series_bytes`, and naming a line of another form.
        """
        held = self._beside(record).lines
        if series.path not in held:
            origin = self.record_file(record.id, series.path)
            data = self.series_bytes(record, series)
            held[series.path] = parse_series(data, series.path, origin=origin)
        return held[series.path]

    def series_bytes(self, record: Record, series: Series) -> bytes:
        """A file beside a record; those of the record that was read last are kept. Raises
        IntegrityError as `Ledger.series`.
        """
        held = self._beside(record).content
        if series.path not in held:
            held[series.path] = self.ledger.series(record, series)
        return held[series.path]

    def _beside(self, record: Record) -> "_Beside":
        if self._last.record != record.id:
            self._last = _Beside(record.id)
        return self._last

    @cached_property
    def _last(self) -> "_Beside":
        return _Beside("")

    def python_functions(self, path: str) -> dict[str, Definition]:
        """Functions and classes of a Python file by name."""
        return definitions(self.root / path)

    def missing_test(self, test: str) -> bool:
        """Whether "path::name" or "path::name[case]" names no test. A path alone names a file."""
        path, _, name = test.partition("::")
        return name.partition("[")[0] not in self.python_functions(path)

    def proves_nothing(self, test: str) -> str:
        """Why a cited test that exists cannot fail; empty if it can."""
        path, _, name = test.partition("::")
        return proves_nothing(self.root / path, name.partition("[")[0]) if name else ""

    @cached_property
    def plants(self) -> dict[str, Exhibit]:
        """Plants by id, with their place."""
        return read_exhibits(self.root)
