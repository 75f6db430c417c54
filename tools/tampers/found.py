"""A finding of the small repository, with the records that it cites."""

import json
from pathlib import Path

from tools.tampers import small_repo
from tools.tampers.small_repo import commit_all, git, write

FINDING = {
    "id": "a-finding",
    "date": "2026-01-12",
    "symptom": "a run was halted",
    "cause": "a limit",
    "mechanism": "rounding",
    "gates": ["loss.golden"],
    "metric": "n_suspects",
    "better": "lower",
    "falsifier": "tests/test_loss.py::test_golden",
}
CHAIN = [
    {"id": "E1", "hypothesis": "the weights differ", "verdict": "kept"},
    {"id": "E2", "hypothesis": "the kernel differs", "verdict": "eliminated"},
]
BAD = "compare-20260110T122000Z-00000014"


def found_something(
    root: Path,
    *,
    figures: tuple = (3, 0),
    stated: tuple[str, str] = ("neither", "neither"),
    suspect: dict | None = None,
    **changes,
) -> None:
    """A finding with a record of the failure, one without it, and what cleared a suspect: a link of
    a chain by default.

    `figures` are those of the two records, `stated` which way is better in each.
    """
    commit = git(root, "rev-parse", "HEAD")
    bad, good = (
        small_repo.record(
            root,
            "compare",
            minute,
            commit,
            metrics={"n_suspects": small_repo.metric(n, better=way)},
            series_lines={"chain.jsonl": CHAIN},
        )
        for minute, n, way in zip((20, 21), figures, stated)
    )
    assert bad.id == BAD
    entry = FINDING | {"negative": bad.id, "positive": good.id, "fix": commit} | changes
    cleared = suspect or {"hypothesis": "the kernel differs", "evidence": f"{bad.id}#E2"}
    tables = {"[[finding]]": entry, "[[finding.ruled_out]]": cleared}
    lines = [line for head, table in tables.items() for line in (head, *_lines(table))]
    write(root, "evidence/findings.toml", "\n".join(lines) + "\n")
    commit_all(root)


def _lines(table: dict) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
