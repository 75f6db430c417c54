"""Findings, the rule decorator, and the repository as rules see it:
every file and git fact read once.
"""

import ast
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stackproof.spec import findings
from stackproof.spec.coverage import GateState, coverage
from stackproof.spec.errors import IntegrityError, StackproofError
from stackproof.spec.failures import Catalogue, load_catalogue
from stackproof.spec.gates import Spec, load_spec
from stackproof.spec.ledger import Entry, Ledger
from stackproof.spec.records import Record
from stackproof.spec.registry import Release, read_registry
from tools.exhibits import Exhibit, read_exhibits


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    code: str
    path: str
    line: int
    message: str
    hint: str


@dataclass(frozen=True)
class Rule:
    """A named check of the repository. `look` yields (path, line, message)."""

    code: str
    title: str
    why: str
    hint: str
    look: Callable[["Repo"], Iterator[tuple[str, int, str]]]

    def run(self, repo: "Repo") -> list[Finding]:
        """Findings of this rule. What it cannot read is itself a finding:
        a checker that cannot look never says green.
        """
        try:
            return [
                Finding(self.code, path, line, message, self.hint)
                for path, line, message in self.look(repo)
            ]
        except StackproofError as e:
            return [
                Finding(
                    "SCHEMA",
                    "",
                    0,
                    f"{self.code} could not look: {e.what}",
                    "repair what SCHEMA names first",
                )
            ]
        except Exception as e:
            return [
                Finding(
                    "INTERNAL",
                    "tools",
                    0,
                    f"rule {self.code} crashed: {type(e).__name__}: {e}",
                    "this is a bug of the checker",
                )
            ]


RULES: dict[str, Rule] = {}


def rule(code: str, *, title: str, why: str, hint: str) -> Callable:
    """Register a generator `look(repo)` as a rule."""

    def register(look: Callable) -> Callable:
        if code in RULES:
            raise ValueError(f"rule {code} is defined twice")
        RULES[code] = Rule(code, title, why, hint, look)
        return look

    return register


def git_blob_id(data: bytes, length: int = 40) -> str:
    """The id that git gives to a file's content; 64 digits long in a sha256 repository."""
    algorithm = hashlib.sha256 if length == 64 else hashlib.sha1
    return algorithm(b"blob %d\0" % len(data) + data).hexdigest()


class Repo:
    """A checkout. Everything is read lazily and once."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._functions: dict[str, dict[str, int]] = {}
        self.not_verified: list[str] = []  # what rules could not look at for want of history

    def git(self, *arguments: str) -> str | None:
        """Output of a git command, or None if it failed."""
        done = subprocess.run(["git", "-C", str(self.root), *arguments], capture_output=True)
        return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None

    @contextmanager
    def tree_at(self, commit: str, *paths: str) -> Iterator[Path]:
        """A temporary folder with files as a commit holds them.
        Raises IntegrityError if git cannot read them.
        """
        done = subprocess.run(
            ["git", "-C", str(self.root), "archive", commit, "--", *paths], capture_output=True
        )
        if done.returncode:
            raise IntegrityError(
                f"commit {commit[:12]} cannot be read",
                value=done.stderr.decode("utf-8", errors="replace").strip(),
            )
        with (
            tempfile.TemporaryDirectory(prefix="stackproof-commit-") as folder,
            tarfile.open(fileobj=io.BytesIO(done.stdout)) as files,
        ):
            files.extractall(folder, filter="data")
            yield Path(folder)

    @cached_property
    def lacks_history(self) -> bool:
        """Whether this is no git checkout, or a shallow clone of one."""
        return (self.git("rev-parse", "--is-shallow-repository") or "true").strip() == "true"

    @cached_property
    def tracked(self) -> list[str]:
        return [p for p in (self.git("ls-files", "-z") or "").split("\0") if p]

    @cached_property
    def ancestors(self) -> dict[str, int]:
        """Commits reachable from HEAD with their committer time, seconds."""
        lines = (self.git("log", "--format=%H %ct", "HEAD") or "").splitlines()
        return {sha: int(time) for sha, time in (line.split() for line in lines)}

    def rewritten(self, path: str) -> str | None:
        """The newest commit that held lines of an append-only file which a later form lacks."""
        file = self.root / path
        later = file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else ""
        for commit in (self.git("log", "--format=%H", "-50", "--", path) or "").split():
            then = self.git("show", f"{commit}:{path}") or ""
            if not later.startswith(then):
                return commit
            later = then
        return None

    @cached_property
    def spec(self) -> Spec:
        return load_spec(self.root)

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
    def accepted(self) -> dict[str, Record]:
        """Readable, hash-true records; the others are findings of their own rules."""
        found = {}
        for entry in self.entries:
            try:
                found[entry.record] = self.ledger.read(entry)
            except StackproofError:
                continue
        return found

    @cached_property
    def records(self) -> dict[str, Record]:
        """Accepted records that no later one supersedes."""
        gone = {e.supersedes for e in self.entries if e.supersedes}
        return {name: record for name, record in self.accepted.items() if name not in gone}

    @cached_property
    def states(self) -> dict[str, GateState]:
        return coverage(self.spec, self.records, findings=self.findings)

    @cached_property
    def findings(self) -> list[findings.Finding]:
        return findings.read_findings(self.root / "evidence" / findings.FILE)

    @cached_property
    def registry(self) -> list[Release]:
        return read_registry(self.root / "evidence" / "registry.toml")

    def record_file(self, record_id: str, name: str = "metadata.json") -> str:
        return f"evidence/{record_id}/{name}"

    def series(self, record_id: str, name: str) -> list[dict]:
        """Lines of a series beside a record; empty if it has none, or if series or record is not
        what was hashed (other rules say so).
        """
        record = self.accepted.get(record_id)
        declared = next((s for s in record.series if s.path == name), None) if record else None
        try:
            data = self.ledger.series(record, declared) if declared else b""
        except StackproofError:
            return []
        return [json.loads(line) for line in data.decode("utf-8").splitlines()]

    @cached_property
    def markdown(self) -> list[str]:
        """Hand-written Markdown files, relative."""
        wanted = [p for p in self.tracked if p.endswith(".md")]
        return [
            p
            for p in wanted
            if (self.root / p).is_file() and not p.startswith((".venv/", "evidence/"))
        ]

    def text(self, path: str) -> str:
        return (self.root / path).read_text("utf-8")

    def python_functions(self, path: str) -> dict[str, int]:
        """Top-level functions and classes of a Python file with their line."""
        if path not in self._functions:
            file = self.root / path
            body = ast.parse(file.read_text("utf-8")).body if file.is_file() else []
            found = (
                n
                for n in body
                if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
            )
            self._functions[path] = {n.name: n.lineno for n in found}
        return self._functions[path]

    @cached_property
    def plants(self) -> dict[str, Exhibit]:
        """Plants by id, with their place. Nothing that they change is imported."""
        return read_exhibits(self.root)
