"""For each integrity rule, the one break of a valid repository that it is for."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

from stackproof.spec import mutants
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.fingerprint import check_fingerprint
from stackproof.spec.gates import normative_fields
from stackproof.spec.ledger import GENESIS, Entry, Ledger
from stackproof.spec.pins import SignedPin, pin_of
from tools.integrity.all_rules import check
from tools.integrity.former_fingerprint import first_form
from tools.tampers import archived, small_repo
from tools.tampers.found import found_something
from tools.tampers.small_repo import edit, git, write


def found(root: Path) -> set[str]:
    small_repo.forget()
    return {f.code for f in check(root)}


def folder(root: Path, kind: str) -> Path:
    """The folder of the first record of a kind, or of a record."""
    evidence = root / "evidence"
    return evidence / kind if "-" in kind else min(evidence.glob(f"{kind}-*"))


def rechain(
    root: Path,
    kind: str,
    change: Callable[[dict], None],
    *,
    series: Callable[[list[dict]], None] | None = None,
    supersedes: str = "",
) -> None:
    """Edit a record and re-hash everything after it, as a person with write access would,
    then commit.
    """
    path = folder(root, kind)
    document = json.loads((path / "metadata.json").read_bytes())
    if series:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        series(lines)
        data = b"".join(canonical_json(line) + b"\n" for line in lines)
        (path / "metrics.jsonl").write_bytes(data)
        document["series"][0]["sha256"] = sha256_bytes(data)
    change(document)
    (path / "metadata.json").write_bytes(canonical_json(document))
    previous, out = GENESIS, []
    for line in (root / "evidence" / "ledger.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        sha256 = sha256_bytes((root / "evidence" / entry["record"] / "metadata.json").read_bytes())
        gone = (
            folder(root, supersedes).name if supersedes and entry["record"] == path.name else None
        )
        links = {"prev": previous, "supersedes": gone}
        out.append(
            Entry(seq=entry["seq"], record=entry["record"], sha256=sha256, **links).to_line()
        )
        previous = sha256_bytes(out[-1])
    (root / "evidence" / "ledger.jsonl").write_bytes(b"\n".join(out) + b"\n")


def carry(root: Path, **changes: str) -> None:
    """Add the line of the table that carries the gate over, with changes."""
    small_repo.forget()
    entry = tomllib.loads((root / "spec/gates/loss.toml").read_text())["gate"][0]
    fields = normative_fields(entry)
    row = {
        "gate": entry["id"],
        "old": first_form(fields, entry["check"], root),
        "new": check_fingerprint(fields, entry["check"], root),
    }
    row |= {"commit": git(root, "rev-parse", "HEAD").strip()} | changes
    write(root, "spec/carried.jsonl", json.dumps(row) + "\n")


def put(*path: str, value):
    """A change that sets one nested field."""

    def change(document: dict) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


def metric(name: str, value):
    return put("metrics", name, "value", value=value)


def nothing(document: dict) -> None:
    return None


def drop_ledger_line(root: Path) -> None:
    lines = (root / "evidence" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (root / "evidence" / "ledger.jsonl").write_bytes(b"".join(lines[:1] + lines[2:]))


def second_train(root: Path, minute: int = 9, **changes) -> None:
    """The same losses once more, by another configuration."""
    config = json.loads(json.dumps(small_repo.CONFIG)) | (changes or {"seed": 2})
    commit = git(root, "rev-parse", "HEAD")
    small_repo.record(
        root,
        "train",
        minute,
        commit,
        config=config,
        metrics=small_repo.train_metrics(),
        series_lines={"metrics.jsonl": small_repo.log_lines()},
    )


def waived_for_ever(document: dict) -> None:
    waiver = {"id": "loss.golden", "reason": "it is known and accepted", "expires": "9999-12-31"}
    document["gates"][0].update(verdict="fail", waiver=waiver)


def signed_by_nobody(root: Path, lines: list[bytes]) -> bytes:
    """The line of a pin with an empty signature."""
    return SignedPin(pin=pin_of(lines), signer="owner", signature="").to_line()


def release_of_head(root: Path) -> None:
    """The release names the commit that added its records."""
    registry = root / "evidence/registry.toml"
    trained = tomllib.loads(registry.read_text())["model"][0]["commit"]
    edit(root, "evidence/registry.toml", trained, git(root, "rev-parse", "HEAD").strip())


def change_frozen(root: Path) -> None:
    edit(root, "spec/releases.jsonl", '"value":1e-05', '"value":1e-04')


def loosen(root: Path) -> None:
    edit(root, "spec/gates/loss.toml", "value = 1e-5", "value = 1e-2")


def stale(root: Path) -> None:
    edit(root, "contracts/loss.py", "return x", "return x + 1")


def failed_gate(document: dict) -> None:
    document["gates"][0]["verdict"] = "fail"
    document["status"], document["exit_code"] = "halted", 4


def expired(document: dict) -> None:
    document["gates"][0] |= {
        "verdict": "fail",
        "waiver": {"id": "loss.golden", "reason": "it was known then", "expires": "2026-01-12"},
    }


def big_file(root: Path) -> None:
    write(root, "stack/big.py", "x = 1\n" * 601)
    git(root, "add", "-A")


def weights(root: Path) -> None:
    write(root, "docs/logo.png", (16).to_bytes(8, "little") + b'{"a":1}         ' + b"\0" * 8)
    git(root, "add", "-A")


def link_evidence(root: Path) -> None:
    (folder(root, "train") / "extra.json").symlink_to("metadata.json")


def shorten_archive(root: Path) -> None:
    archived.append(root, folder(root, "resume").name)
    small_repo.commit_all(root)
    write(root, archived.LIST, "")


def spec_of_another_version(root: Path) -> None:
    rechain(root, "train", put("spec", "version", value="0.9.0"))


def remove_gates(root: Path) -> None:
    (root / "spec/gates/loss.toml").unlink()


def audited(root: Path, breadth: int, passes: int) -> None:
    """An audit at two steps; at the last, one of two domains passes, with two prompts."""
    seen = [(8, "a", True), (8, "b", True), (9, "a", True), (9, "a", True), (9, "b", False)]
    line = {"prompt": "p", "text": "t"}
    lines = [line | {"step": step, "domain": domain, "passed": ok} for step, domain, ok in seen]
    metrics = {"breadth": small_repo.metric(breadth), "passes": small_repo.metric(passes)}
    commit, parents = git(root, "rev-parse", "HEAD"), [folder(root, "train").name]
    small_repo.record(
        root,
        "evaluate",
        9,
        commit,
        metrics=metrics,
        series_lines={"audits.jsonl": lines},
        parents=parents,
    )


def drawn(root: Path, changed: str = "") -> None:
    """A draw of four mutants, of which a metric is stated higher than it is."""
    ending = {"kind": "red", "moment": "before step 1"}
    line = {"target": "m:f", "line": 1, "operator": "axis", "diff": "- 1", "package": "data"}
    rows = [
        line | {"scenario": "museum", "outcome": outcome, "effect": effect, "ending": ending}
        for outcome, effect in (
            *(("caught", "result"), ("survivor", "result")),
            *(("equivalent", ""), ("crashed", "")),
        )
    ]
    metrics = {
        name: {"value": value + (name == changed), "unit": unit, "n": n, "better": "neither"}
        for name, (value, unit, n) in mutants.metrics(rows).items()
    }
    small_repo.record(
        root,
        "mutation",
        9,
        git(root, "rev-parse", "HEAD"),
        metrics=metrics,
        series_lines={mutants.SERIES: rows},
    )


BREAKS: dict[str, Callable[[Path], None]] = {
    "GATE-CARRIED": lambda r: carry(r, new="b" * 64),
    "SCHEMA": lambda r: rechain(r, "train", put("surprise", value=1)),
    "SPEC-EMPTY": remove_gates,
    "ID-UNIQUE": lambda r: write(r, "docs/adr/0001-two.md", small_repo.ADR),
    "SPEC-NOBUMP": stale,
    "SPEC-CHANGELOG": lambda r: write(r, "spec/CHANGELOG.md", "# Changes\n"),
    "GATE-TOMBSTONE": lambda r: edit(
        r, "spec/gates/loss.toml", 'id = "loss.golden"', 'id = "loss.silver"'
    ),
    "GOALPOST": loosen,
    "RELEASE-FROZEN": change_frozen,
    "GATE-KILLED": lambda r: rechain(
        r, "falsification", lambda d: d["kills"][0].update(outcome="crashed")
    ),
    "STALE-KILL": stale,
    "GATE-FAILED": lambda r: rechain(r, "train", failed_gate),
    "MERGE-MARK": lambda r: edit(r, "README.md", "# Small\n", "# Small\n\n" + "<" * 7 + " HEAD\n"),
    "PLANT-EXISTS": lambda r: edit(
        r, "stack/museum/plants/loss.toml", '"loss.wrong"', '"loss.other"'
    ),
    "RATES-STATED": lambda r: (r / "spec/chance.toml").unlink(),
    "FAILURE-PLANTED": lambda r: write(r, "stack/tune/masks.py", "def tune():\n    return 1\n"),
    "CHECK-EXISTS": lambda r: edit(
        r, "contracts/loss.py", '@decides("loss.golden")', '@decides("loss.other")'
    ),
    "RECORD-GATES": lambda r: rechain(r, "train", put("gates", value=[])),
    "TEST-EXISTS": lambda r: edit(r, "tests/test_loss.py", "test_golden", "test_silver"),
    "CHAIN": drop_ledger_line,
    "LEDGER-APPEND-ONLY": lambda r: rechain(r, "resume", put("claim", value="another")),
    "RECORD-HASH": lambda r: (
        edit(r, f"evidence/{folder(r, 'train').name}/metadata.json", '"value":2.1', '"value":1.1')
        if '"value":2.1' in (folder(r, "train") / "metadata.json").read_text()
        else edit(
            r, f"evidence/{folder(r, 'train').name}/metadata.json", '"value":1.9', '"value":1.8'
        )
    ),
    "PIN": lambda r: write(
        r, "evidence/pins.jsonl", signed_by_nobody(r, Ledger(r / "evidence").lines())
    ),
    "RECORD-CLOSED": lambda r: write(
        r, f"evidence/{folder(r, 'train').name}/weights.pt", "not a weight"
    ),
    "RECORD-ORPHAN": lambda r: shutil.copytree(
        folder(r, "resume"), r / "evidence" / "resume-20260101T000000Z-00000000"
    ),
    "ARCHIVE": lambda r: archived.append(r, folder(r, "resume").name),
    "ARCHIVE-APPEND-ONLY": shorten_archive,
    "ARTEFACT-HASH": lambda r: edit(
        r, f"evidence/{folder(r, 'train').name}/metrics.jsonl", "2.3", "2.2"
    ),
    "SERIES-TYPED": lambda r: rechain(
        r, "train", nothing, series=lambda x: x[1].update(loss_nats=[2.2])
    ),
    "DERIVED": lambda r: rechain(r, "train", metric("epochs", 2.5)),
    "LOG-ARITHMETIC": lambda r: rechain(
        r, "train", nothing, series=lambda x: x[1].update(ema_loss_nats=2.0)
    ),
    "RECORD-CONFIG": lambda r: rechain(r, "train", put("config", "train", value=[])),
    "CONFIG-HASH": lambda r: rechain(r, "evaluate", put("config_sha256", value="d" * 64)),
    "LOCK-AT-COMMIT": lambda r: rechain(r, "resume", put("code", "lock_sha256", value="d" * 64)),
    "CLEAN-DIFF": lambda r: rechain(r, "resume", put("code", "diff_sha256", value="d" * 64)),
    "SPEC-OF-RELEASE": lambda r: rechain(r, "resume", put("spec", "sha256", value="d" * 64)),
    "PLANT-AT-PROOF": lambda r: edit(
        r, "stack/museum/plants/loss.toml", 'new = "a - b"', 'new = "a + b"'
    ),
    "KILL-TOUCHED": lambda r: rechain(
        r, "falsification", lambda d: d["kills"][0].update(touches=0)
    ),
    "SUPERSEDES": lambda r: rechain(r, "resume", nothing, supersedes="train"),
    "CLAIM-SERIES": lambda r: edit(
        r,
        "README.md",
        "# Small\n",
        "# Small\n\n| loss |\n|---|\n| 2 |\n| 3 |\n\nIt is `monotone(loss)`.\n",
    ),
    "PPL": lambda r: rechain(r, "train", metric("val_ppl", 7.0)),
    "TOKENS": lambda r: rechain(r, "train", metric("tokens_seen", 65)),
    "WALL": lambda r: rechain(r, "train", put("wall_s", value=3000.0)),
    "FINITE": lambda r: rechain(r, "train", metric("val_loss_nats", "NaN")),
    "STATUS": lambda r: rechain(r, "train", put("exit_code", value=4)),
    "PLACEHOLDER": lambda r: rechain(
        r, "train", nothing, series=lambda x: [line.update(loss_nats=1.0) for line in x]
    ),
    "STEPS-CONTIGUOUS": lambda r: rechain(r, "train", nothing, series=lambda x: x.pop(2)),
    "METRIC-RECOMPUTE": lambda r: rechain(r, "train", metric("best_val_loss_nats", 1.0)),
    "AUDIT-RECOMPUTE": lambda r: audited(r, 2, 2),
    "MUTATION-RECOMPUTE": lambda r: drawn(r, "caught_frac"),
    "COMMIT": lambda r: rechain(r, "train", put("code", "commit", value="d" * 40)),
    "TIME": lambda r: rechain(
        r,
        "train",
        lambda d: d.update(started_at="2025-01-01T00:00:00Z", finished_at="2025-01-01T00:00:30Z"),
    ),
    "DIRTY": lambda r: rechain(r, "train", put("code", "dirty", value=True)),
    "SPEC-AT-COMMIT": spec_of_another_version,
    "PARENTS": lambda r: rechain(
        r, "evaluate", put("parents", value=["train-20200101T000000Z-00000000"])
    ),
    "DATA-RECORD": lambda r: rechain(
        r, "train", put("config", "data", value={"corpus": {"kind": "built"}})
    ),
    "DUP-METRICS": second_train,
    "WAIVER-LONG": lambda r: rechain(r, "train", waived_for_ever),
    "WAIVER-EXPIRED": lambda r: rechain(r, "train", expired),
    "FINDING-SHOWN": lambda r: found_something(r, falsifier="tests/test_loss.py::test_silver"),
    "REG-REF": lambda r: edit(
        r, "evidence/registry.toml", 'recipe = "small"', 'recipe = "small"\ntag = "small-1"'
    ),
    "REG-KIN": lambda r: rechain(r, "evaluate", put("parents", value=[])),
    "REG-COMMIT": release_of_head,
    "REG-RECORDS": lambda r: edit(
        r, "evidence/registry.toml", 'resume = "resume-2', 'resume = "resume-3'
    ),
    "REG-FILES": lambda r: (r / "docs/models/small.md").unlink(),
    "REG-PARAMS": lambda r: edit(
        r, "evidence/registry.toml", f"n_params = {small_repo.N_PARAMS}", "n_params = 120000000"
    ),
    "REG-WEIGHTS": lambda r: rechain(r, "evaluate", put("inputs", value=[])),
    "LINK": lambda r: edit(r, "README.md", "0001-one.md#context", "0001-one.md#contexts"),
    "GEN-STALE": lambda r: edit(r, "README.md", "| 0 |", "| 00 |"),
    "TALLY-TYPED": lambda r: write(
        r, "README.md", (r / "README.md").read_text() + "\nWe pass 41 of 45 gates.\n"
    ),
    "FACT-CONFLICT": lambda r: edit(r, "README.md", f"-->{small_repo.N_PARAMS}<!--", "-->7<!--"),
    "UNTIL": lambda r: edit(r, "README.md", "registry.models>7", "registry.models>0"),
    "DOC-COMMAND": lambda r: edit(r, "README.md", "--set a=b", "--sets a=b"),
    "DOC-TEST": lambda r: edit(
        r, "README.md", "# Small\n", "# Small\n\nIt holds: `tests/test_loss.py::test_silver`.\n"
    ),
    "ADR": lambda r: edit(r, "docs/adr/0001-one.md", "## Rejected", "## Other"),
    "WEIGHTS-IN-GIT": weights,
    "SYMLINK": link_evidence,
    "LOC": big_file,
    "CI-SELF": lambda r: edit(r, ".ci/run", "make test", "# make test"),
    "UNFINISHED": lambda r: edit(r, "stack/recipes/small.py", "return 1", "return 1  # TO" + "DO"),
}
