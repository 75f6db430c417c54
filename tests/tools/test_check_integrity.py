"""Every integrity rule is green on a valid repository and red on the one break it is for."""

import json
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.fingerprint import check_fingerprint
from stackproof.spec.gates import normative_fields
from stackproof.spec.ledger import GENESIS, Entry
from stackproof.spec.releases import read_releases, release_line, release_text
from tests.tools import archived, small_repo
from tests.tools.found import found_something
from tests.tools.small_repo import edit, git, write
from tools.check_integrity import check, explain, main
from tools.freeze_spec import freeze
from tools.integrity import core
from tools.integrity.core import RULES, Repo
from tools.integrity.former_fingerprint import first_form
from tools.integrity.glance import trained_by
from tools.integrity.repo_rules import looks_like_weights

ROOT = Path(__file__).resolve().parents[2]


def found(root: Path) -> set[str]:
    small_repo.forget()
    return {f.code for f in check(root)}


def folder(root: Path, kind: str) -> Path:
    return next((root / "evidence").glob(f"{kind}-*"))


def rechain(
    root: Path,
    kind: str,
    change: Callable[[dict], None],
    *,
    series: Callable[[list[dict]], None] | None = None,
) -> None:
    """Edit a record and re-hash everything after it, as somebody with write access would,
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
        out.append(
            Entry(seq=entry["seq"], record=entry["record"], sha256=sha256, prev=previous).to_line()
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
    lines = [{"step": step, "domain": domain, "passed": ok} for step, domain, ok in seen]
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
        r, "falsification", lambda d: d["kills"][0].update(outcome="missed")
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
    "WAIVER-EXPIRED": lambda r: rechain(r, "train", expired),
    "FINDING-SHOWN": lambda r: found_something(r, falsifier="tests/test_loss.py::test_silver"),
    "REG-REF": lambda r: edit(
        r, "evidence/registry.toml", 'recipe = "small"', 'recipe = "small"\ntag = "small-1"'
    ),
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


def test_a_valid_repository_has_no_finding(repo):
    assert [f"{f.code} {f.path} {f.message}" for f in check(repo)] == []


def test_every_rule_has_its_break():
    assert set(BREAKS) == set(RULES) and len(RULES) >= 24


@pytest.mark.parametrize("code", sorted(BREAKS))
def test_rule_is_red_on_its_break(repo, code):
    BREAKS[code](repo)
    assert code in found(repo)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"old": "a" * 64}, "the old fingerprint of loss.golden is not the one"),
        ({"new": "a" * 64}, "the new fingerprint of loss.golden is not the one"),
        ({"gate": "loss.gone"}, "gate loss.gone is not in the spec"),
        ({"commit": "a" * 40}, "is no ancestor"),
    ],
)
def test_the_table_of_carried_gates_is_recomputed_on_both_sides(repo, changes, says):
    carry(repo, **changes)
    messages = [f.message for f in check(repo) if f.code == "GATE-CARRIED"]
    assert [says in m for m in messages] == ([True] if says else [])


def test_the_commit_of_a_carried_gate_is_read_and_not_the_working_tree(repo):
    carry(repo)
    edit(repo, "contracts/loss.py", "return x", "return x * 2")
    small_repo.forget()
    assert [f.message for f in check(repo) if f.code == "GATE-CARRIED"] == []


def test_without_history_a_carried_gate_is_not_verified(repo, tmp_path, capsys):
    carry(repo)
    small_repo.commit_all(repo)
    shallow = tmp_path / "shallow"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{repo}", str(shallow)], check=True
    )
    small_repo.forget()
    main(["--root", str(shallow)])
    shown = capsys.readouterr().out
    assert (
        "not verified: GATE-CARRIED: commit" in shown and "GATE-CARRIED         spec" not in shown
    )


def test_a_missing_commit_a_lost_tag_and_a_dead_link_are_named(repo):
    edit(repo, "README.md", "0001-one.md#context", "0002-two.md")
    findings = [f for f in check(repo) if f.code == "LINK"]
    assert (
        findings[0].path == "README.md"
        and findings[0].line == 3
        and "0002-two.md" in findings[0].message
    )


def test_a_run_from_before_a_key_was_renamed_has_the_same_configuration():
    before, now, other = (
        SimpleNamespace(config={"seed": 1, "stop": stop})
        for stop in ({"min_epochs": 3}, {"min_evaluations": 3}, {"min_evaluations": 4})
    )
    assert trained_by(before) == trained_by(now) != trained_by(other)


def test_a_run_that_only_recorded_more_rightly_ends_alike(repo):
    second_train(repo, trace={"every": 50})
    assert "DUP-METRICS" not in found(repo)
    second_train(
        repo,
        19,
        trace={"every": 50},
        train=small_repo.CONFIG["train"] | {"log_every": 7, "max_steps": 99},
    )
    assert "DUP-METRICS" in found(repo)


def _rewrite_releases(root: Path, **fields) -> None:
    """Another release under the same version, its hash recomputed."""
    (old,) = read_releases(root).values()
    write(root, "spec/releases.jsonl", release_line({}, old | fields))


def test_a_release_that_was_rewritten_with_its_hash_differs_from_history(repo):
    _rewrite_releases(repo, sha256="f" * 64)
    messages = [f.message for f in check(repo) if f.code == "RELEASE-FROZEN"]
    assert len(messages) == 1 and messages[0].endswith("were changed or removed")
    git(repo, "commit", "-qam", "rewritten")
    assert "RELEASE-FROZEN" in found(repo)


def test_a_release_is_what_history_holds_as_a_single_file(repo):
    """Releases were files of their own before; the line must give each of them byte for byte."""
    (release,) = read_releases(repo).values()
    write(repo, "spec/releases/1.0.0.json", release_text(release))
    small_repo.commit_all(repo)
    git(repo, "rm", "-q", "spec/releases/1.0.0.json")
    small_repo.commit_all(repo)
    assert found(repo) == set()
    for version in ("1.0.0", "0.9.0"):
        write(repo, f"spec/releases/{version}.json", release_text(release) + b"\n")
        small_repo.commit_all(repo)
        messages = [f.message for f in check(repo) if f.code == "RELEASE-FROZEN"]
        assert any(f"release {version} is not the one" in m for m in messages)


def test_a_new_release_is_appended_and_both_are_read(repo):
    before = (repo / "spec/releases.jsonl").read_bytes()
    loosen(repo)
    edit(repo, "spec/spec.toml", "1.0.0", "1.1.0")
    small_repo.forget()
    assert freeze(repo) == 0
    assert (repo / "spec/releases.jsonl").read_bytes().startswith(before)
    assert list(read_releases(repo)) == ["1.0.0", "1.1.0"]
    assert not {"SPEC-NOBUMP", "RELEASE-FROZEN"} & found(repo)
    edit(repo, "spec/spec.toml", "1.1.0", "1.0.5")
    assert "SPEC-CHANGELOG" in found(repo), "1.0.5 is older than the released 1.1.0"


def test_loosening_with_a_new_version_that_says_so_is_allowed(repo):
    loosen(repo)
    edit(repo, "spec/spec.toml", "1.0.0", "1.1.0")
    assert "GOALPOST" in found(repo)
    edit(
        repo,
        "spec/CHANGELOG.md",
        "# Changes\n",
        "# Changes\n\n## 1.1.0\n\nloss.golden: error_max, because of noise.\n",
    )
    codes = found(repo)
    assert "GOALPOST" not in codes and "STALE-KILL" in codes, (
        "what the old limit discharged is open again"
    )


@pytest.mark.parametrize(("train_s", "plausible"), [(45.0, True), (75.0, False)])
def test_a_child_has_trained_as_long_as_its_parents_and_itself(repo, train_s, plausible):
    """30 s of its own and 30 s of its parent's."""
    metrics = small_repo.train_metrics() | {
        "train_s": small_repo.metric(train_s),
        "tokens_per_s": small_repo.metric(64 / train_s),
    }
    small_repo.record(
        repo,
        "train",
        9,
        git(repo, "rev-parse", "HEAD"),
        metrics=metrics,
        series_lines={"metrics.jsonl": small_repo.log_lines()},
        parents=[folder(repo, "train").name],
    )
    assert ("WALL" not in found(repo)) is plausible


def test_a_run_on_a_data_set_that_is_recorded_is_fine(repo):
    manifest = small_repo.artefact("manifest.json", "e" * 64)
    small_repo.record(repo, "data", 0, git(repo, "rev-parse", "HEAD"), outputs=[manifest])
    rechain(
        repo,
        "train",
        lambda d: (
            d["config"].update(data={"corpus": {"kind": "built"}}) or d["inputs"].append(manifest)
        ),
    )
    assert "DATA-RECORD" not in found(repo)
    rechain(repo, "train", lambda d: d["inputs"][-1].update(sha256="f" * 64))
    assert "DATA-RECORD" in found(repo)


RATES = (
    'rates = { false_alarm = 0.01, per = "run", power = POWER, effect = "ten percent", '
    'measured_by = "tests/a.py::test_golden" }'
)


@pytest.mark.parametrize(
    ("power", "listed", "message"),
    [
        (0.9, "", None),
        (0.01, "", "no more often"),
        (0.9, '"loss.golden"', "not beyond chance"),
        (0.9, '"loss.silver"', "is no gate"),
    ],
)
def test_rates_are_stated_in_one_place_and_say_something(repo, power, listed, message):
    edit(
        repo,
        "spec/gates/loss.toml",
        "[gate.limits]",
        RATES.replace("POWER", str(power)) + "\n[gate.limits]",
    )
    edit(repo, "spec/chance.toml", '"loss.golden"', listed)
    assert [message in f.message for f in check(repo) if f.code == "RATES-STATED"] == (
        [True] if message else []
    )


def test_a_gate_that_chance_is_said_to_spare_twice_is_refused(repo):
    edit(repo, "spec/chance.toml", '"loss.golden"', '"loss.golden", "loss.golden"')
    assert any("listed twice" in f.message for f in check(repo) if f.code == "SCHEMA")


@pytest.mark.parametrize(
    ("breadth", "passes", "named"), [(1, 2, None), (2, 2, "breadth"), (1, 3, "passes")]
)
def test_breadth_is_that_of_the_answers(repo, breadth, passes, named):
    audited(repo, breadth, passes)
    said = [f.message for f in check(repo) if f.code == "AUDIT-RECOMPUTE"]
    assert len(said) == bool(named) and all(named in message for message in said)


def test_a_citation_of_a_test_that_is_there_is_fine(repo):
    edit(
        repo, "README.md", "# Small\n", "# Small\n\nIt holds: `tests/test_loss.py::test_golden`.\n"
    )
    assert "DOC-TEST" not in found(repo)


def test_write_restores_blocks_byte_for_byte_and_twice_is_once(repo, capsys):
    before = (repo / "README.md").read_bytes()
    BREAKS["GEN-STALE"](repo)
    assert main(["--root", str(repo), "--write"]) == 0
    assert (repo / "README.md").read_bytes() == before
    assert main(["--root", str(repo), "--write"]) == 0
    assert (repo / "README.md").read_bytes() == before


def test_a_crashing_rule_is_a_finding(repo, monkeypatch):
    def crash(repo):
        raise RuntimeError("oops")
        yield

    monkeypatch.setitem(RULES, "CHAIN", core.Rule("CHAIN", "t", "w", "h", crash, core.whole))
    assert "INTERNAL" in found(repo)


def test_json_is_one_document_and_exit_code_6(repo):
    BREAKS["LINK"](repo)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_integrity.py"), "--json", "--root", str(repo)],
        capture_output=True,
        text=True,
        cwd="/",
    )
    document = json.loads(done.stdout)
    assert done.returncode == 6 and document["ok"] is False and document["rules_run"] == len(RULES)
    assert set(document["findings"][0]) == {"code", "path", "line", "message", "hint"}


def test_explain_names_the_nearest_rule(capsys):
    assert explain("GOALPOST") == 0 and "fix   " in capsys.readouterr().out
    assert explain("GOALPOSTS") == 2 and "GOALPOST" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(12))
def test_any_changed_byte_of_the_evidence_is_found(repo, seed):
    """One random byte of the ledger, a record or a series: always a finding, never a crash."""
    draw = random.Random(seed)
    files = sorted(p for p in (repo / "evidence").rglob("*.json*") if p.is_file())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    codes = found(repo)
    assert codes and "INTERNAL" not in codes, codes


def test_weights_are_known_by_their_first_bytes():
    assert looks_like_weights(b"\x80\x04\x95" + b"\0" * 20, "notes.txt") == "a pickle"
    assert looks_like_weights(b"GGUF" + b"\0" * 20, "a") == "GGUF"
    assert looks_like_weights((40).to_bytes(8, "little") + b'{"x"', "a.md") == "safetensors"
    assert looks_like_weights(b"PK\x03\x04" + b"archive/data.pkl", "a.dat") == "a torch archive"
    assert looks_like_weights(b"# a heading of plain text\n", "a.md") == ""


def test_the_real_repository_is_read_quickly_and_with_the_light_install():
    missing = ("torch", "numpy", "jinja2", "markupsafe", "mkdocs")
    code = f"import sys, time; sys.modules.update(dict.fromkeys({missing}))\n"
    code += (
        "from tools.check_integrity import check, ROOT; t = time.process_time(); f = check(ROOT)\n"
    )
    code += "assert not [x for x in f if x.code == 'INTERNAL'], f\nprint(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.0, "seconds of one processor; measured 1.4 on a quiet machine"


def test_repo_reads_plants_with_their_places(repo):
    exhibit = Repo(repo).plants["loss.wrong"]
    assert exhibit.gate == "loss.golden" and (exhibit.path, exhibit.line) == (
        "stack/museum/plants/loss.toml",
        3,
    )


def test_an_edit_whose_old_text_is_gone_is_found(repo):
    """A refactoring that rewrites the line a plant edits has to take the plant along."""
    edit(repo, "stack/loss_of.py", "a + b", "b + a")
    messages = [f.message for f in check(repo) if f.code == "PLANT-EXISTS"]
    assert (
        len(messages) == 1
        and "edits loss_of:total, where its old text 'a + b' does not stand once" in messages[0]
    )


def test_a_plant_that_names_no_function_of_the_museum_is_found(repo):
    path = "stack/museum/plants/loss.toml"
    edit(
        repo,
        path,
        'target = "loss_of:total"\nold = "a + b"\nnew = "a - b"\n',
        'function = "loss:gone"\n',
    )
    assert [
        "names loss:gone, which does not exist" in f.message
        for f in check(repo)
        if f.code == "PLANT-EXISTS"
    ] == [True]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('plants = ["loss.wrong"]', 'plants = ["loss.lost"]', "which is not in the museum"),
        ('plants = ["loss.wrong"]', 'rules = ["NO-RULE"]', "names the rule NO-RULE"),
        ('plants = ["loss.wrong"]', 'tests = ["tests/test_loss.py::test_gone"]', "names the test"),
    ],
)
def test_a_failure_that_names_what_is_not_there_is_found(repo, old, new, says):
    edit(repo, "spec/failures/loss.toml", old, new)
    small_repo.forget()
    assert [f.message for f in check(repo) if f.code == "FAILURE-PLANTED" and says in f.message]


def test_a_failure_of_before_step_one_needs_a_gate_that_looks_there(repo):
    edit(repo, "spec/gates/loss.toml", 'moment = "preflight"', 'moment = "runtime"')
    small_repo.forget()
    assert "no gate of its plants looks there" in " ".join(
        f.message for f in check(repo) if f.code == "FAILURE-PLANTED"
    )


def test_an_awaited_failure_is_no_finding_until_its_capability_is_built(repo):
    write(repo, "stack/tune/masks.py", "x = 1\n")
    assert "FAILURE-PLANTED" not in found(repo)
    write(repo, "stack/tune/masks.py", "def tune():\n    return 1\n")
    small_repo.forget()
    messages = [f.message for f in check(repo) if f.code == "FAILURE-PLANTED"]
    assert messages == ["SF-T01 A wrong mask: nothing stands for it, and tuning is built"]
