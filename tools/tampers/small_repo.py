"""A minimal repository on which every integrity rule is green."""

import datetime as dt
import json
import math
import subprocess
from itertools import accumulate
from pathlib import Path

from stackproof.spec import failures
from stackproof.spec.canonical import canonical_json, sha256_bytes, sha256_json
from stackproof.spec.fingerprint import code_below
from stackproof.spec.formulas import parameter_count
from stackproof.spec.gates import _load_spec, load_spec
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import SCHEMA, Record
from stackproof.spec.releases import FILE, frozen_release, release_line
from tools.exhibits import read_exhibits

GATE = """
[[gate]]
id = "loss.golden"
title = "The loss is right"
statement = "The loss MUST be right within error_max."
moment = "preflight"
severity = "halt"
check = "contracts.loss:golden"
plants = ["loss.wrong"]
tests = ["tests/test_loss.py::test_golden"]
since = "1.0.0"
sources = ["a paper"]
[gate.limits]
error_max = { value = 1e-5, unit = "nats", direction = "at-most", why = "Because it was measured." }
"""
CHECK = """
@decides("loss.golden")
def golden(limits, *, loss):
    return helper(limits.error_max)

def helper(x):
    return x
"""
TRAIN = """
def train():
    keeper = Gatekeeper(spec)
    keeper.preflight({"loss": 1.0})
"""
PLANT = """
[[plant]]
id = "loss.wrong"
gate = "loss.golden"
title = "Wrong"
story = "It is wrong and nobody sees it."
sources = ["a thread"]
target = "loss_of:total"
old = "a + b"
new = "a - b"
"""
LOSS_OF = """
def total(a, b):
    return a + b
"""
CHANCE = """
[[certain]]
why = "Compares a loss with the right one on numbers that are always the same."
gates = ["loss.golden"]
"""
FAILURES = """
[[capability]]
name = "tuning"
signs = ["stack/tune/*.py::def tune"]
why = "Anything that tunes a model."

[[failure]]
id = "SF-L01"
name = "A wrong loss"
mechanism = "The loss is another number than it says."
symptom = "It shows in the loss."
latency = "before step 1"
severity = 5
plants = ["loss.wrong"]
sources = ["a thread"]

[[failure]]
id = "SF-T01"
name = "A wrong mask"
mechanism = "The mask lies one token off what it covers."
symptom = "It shows in the loss."
latency = "within k steps"
steps = 3
severity = 3
awaiting = "tuning"
sources = ["a thread"]
"""
LOCK = b"torch==2.0\n"
ADR = (
    "# 0001 One decision\n\nStatus: accepted\n\n## Context\n\nx\n\n## Decision\n\nx\n\n## "
    "Rejected\n\nx\n\n## Evidence\n\nx\n"
)
CI = """set -e
make test
ruff check .
ruff format --check .
python tools/check_layers.py
python tools/check_integrity.py
mkdocs build --strict
"""
README = """# Small

See [the decision](docs/adr/0001-one.md#context) and [a gate](docs/gates/loss.golden.md).

<!-- generated:exit-codes -->
<!-- /generated -->

The model has <!-- fact:small-1#n_params -->{n_params}<!-- /fact --> parameters. <!-- until: registry.models>7 --> Only one so far.

```console
$ stack train --set a=b
$ make test
```
"""  # noqa: E501
MODEL = {
    "d_model": 8,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 4,
    "d_ff": 16,
    "max_seq_len": 8,
    "tied_head": True,
}
VOCAB = 10
N_PARAMS = parameter_count(MODEL, VOCAB)
CONFIG = {
    "recipe": "small",
    "model": MODEL,
    "train": {"max_steps": 4, "tokens_per_step": 16, "micro_batch_size": 1, "log_every": 1},
    "optim": {"kind": "adamw", "lr": 1e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 1},
    "eval": {"every": 2},
    "sample": {"every": 4},
    "checkpoint": {"every": 4},
}
WEIGHTS, TOKENIZER = "a" * 64, "b" * 64
STEPS = 4
START = dt.datetime(2026, 1, 10, 12, 0, tzinfo=dt.UTC)


def forget() -> None:
    """What was read of another repository at the same place is read again."""
    _load_spec.cache_clear()
    failures._load.cache_clear()
    code_below.cache_clear()


def git(root: Path, *arguments: str, when: str = "2026-01-01T00:00:00Z") -> str:
    """A git command under a fixed name and clock."""
    environment = {
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_DATE": when,
        "HOME": str(root),
        "PATH": "/usr/bin:/bin:/usr/local/bin",
    }
    names = [
        "-c",
        "user.name=tester",
        "-c",
        "user.email=tester@example.invalid",
        "-c",
        "commit.gpgsign=false",
    ]
    return subprocess.run(
        ["git", *names, *arguments],
        cwd=root,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def write(root: Path, path: str, text: str | bytes) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def edit(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text()
    assert old in text, (path, old)
    (root / path).write_text(text.replace(old, new, 1))


def artefact(name: str, sha256: str) -> dict:
    return {"name": name, "path": name, "sha256": sha256, "bytes": 1}


def commit_all(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "more", when="2026-01-12T00:00:00Z")


def metric(value: float | str, unit: str = "1", better: str = "neither") -> dict:
    return {"value": value, "unit": unit, "better": better}


def log_lines() -> list[dict]:
    losses = [2.3, 2.1, 2.0, 1.9]
    means = accumulate(losses, lambda mean, x: 0.98 * mean + 0.02 * x)
    lines = [
        {
            "step": s + 1,
            "loss_nats": x,
            "ema_loss_nats": mean,
            "grad_norm": 0.5 + s,
            "lr": 1e-3,
            "tokens_seen": 16 * (s + 1),
        }
        for s, (x, mean) in enumerate(zip(losses, means))
    ]
    lines[1]["val_loss_nats"], lines[3]["val_loss_nats"] = 2.2, 2.0
    return lines


def record(root: Path, kind: str, minute: int, commit: str, **fields) -> Record:
    """Build, store and accept one record; series files given as {name: lines}."""
    spec = load_spec(root)
    series = fields.pop("series_lines", {})
    started = START + dt.timedelta(minutes=minute)
    record_id = f"{kind}-{started:%Y%m%dT%H%M%SZ}-{minute:08x}"
    files = {
        name: b"".join(canonical_json(line) + b"\n" for line in lines)
        for name, lines in series.items()
    }
    config = fields.pop("config", CONFIG)
    made = Record.model_validate(
        {
            "schema": SCHEMA,
            "id": record_id,
            "kind": kind,
            "status": "completed",
            "end_reason": "done",
            "exit_code": 0,
            "claim": "it ran",
            "not_covered": ["everything else"],
            "spec": {"version": spec.version, "sha256": spec.sha256},
            "code": {"commit": commit, "dirty": False, "lock_sha256": sha256_bytes(LOCK)},
            "command": ["stack", kind],
            "config": config,
            "config_sha256": sha256_json(config),
            "environment": {"python": "3.11", "world_size": 1},
            "compute": "real",
            "series": [
                {"path": name, "sha256": sha256_bytes(data)} for name, data in files.items()
            ],
            "started_at": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "finished_at": (started + dt.timedelta(seconds=30)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "wall_s": 30.0,
            "device_s": 10.0,
            **fields,
        }
    )
    for name, data in {"metadata.json": made.to_bytes(), **files}.items():
        write(root, f"evidence/{made.id}/{name}", data)
    Ledger(root / "evidence").append(made)
    return made


def train_metrics() -> dict:
    return {
        "steps": metric(STEPS),
        "tokens_seen": metric(16 * STEPS),
        "vocab_size": metric(VOCAB),
        "n_params": metric(N_PARAMS),
        "train_loss_nats": metric(1.9),
        "ema_loss_nats": metric(log_lines()[-1]["ema_loss_nats"]),
        "val_loss_nats": metric(2.0) | {"n": 30},
        "val_bits_per_byte": metric(2.0 * 30 / math.log(2) / 60) | {"n": 60},
        "best_val_loss_nats": metric(2.0),
        "best_step": metric(4),
        "unique_tokens": metric(32),
        "epochs": metric(16 * STEPS / 32),
        "tokens_per_parameter": metric(16 * STEPS / N_PARAMS),
        "random_loss_nats": metric(math.log(VOCAB)),
        "val_ppl": metric(math.exp(2.0)),
        "tokens_per_s": metric(6.4),
        "train_s": metric(10.0),
    }


def build(root: Path) -> None:
    """Write, commit and accept everything. The checker finds nothing here."""
    git(root.parent, "init", "-q", "-b", "main", str(root))
    write(root, "spec/spec.toml", 'version = "1.0.0"\ntitle = "t"\nscope = "s"\n')
    write(root, "spec/gates/loss.toml", GATE)
    write(root, "spec/chance.toml", CHANCE)
    write(root, "spec/failures/loss.toml", FAILURES)
    write(root, "spec/CHANGELOG.md", "# Changes\n\n## 1.0.0 — today\n\nFirst.\n")
    verbs = {
        "train": {
            "arguments": [],
            "options": [{"flags": ["--set"], "takes_value": True, "many": True}],
        }
    }
    write(root, "spec/cli.json", json.dumps({"verbs": verbs}))
    write(root, "stack/train.py", TRAIN)
    write(root, "contracts/loss.py", CHECK)
    write(root, "stack/museum/plants/loss.toml", PLANT)
    write(root, "stack/loss_of.py", LOSS_OF)
    write(root, "stack/recipes/small.py", "def small():\n    return 1\n")
    write(root, "tests/test_loss.py", "def test_golden():\n    assert 1 + 1 == 2\n")
    write(root, "docs/adr/0001-one.md", ADR)
    write(root, "docs/models/small.md", "# Small\n")
    write(root, "README.md", README.format(n_params=N_PARAMS))
    write(root, "CHANGELOG.md", "# Changes\n")
    write(root, "LICENSE", "Apache\n")
    write(root, "constraints.txt", LOCK)
    write(root, "Makefile", "test:\n\tpython -m pytest -n 2\n")
    write(root, ".ci/run", CI)
    write(
        root,
        ".github/workflows/ci.yml",
        "steps:\n  - uses: x\n    with:\n      fetch-depth: 0\n  - run: bash .ci/run\n",
    )
    freeze(root)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "code")
    accept_evidence(root)
    from tools.integrity import blocks
    from tools.integrity.core import Repo

    git(root, "add", "-A")
    blocks.write(Repo(root))
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "evidence", when="2026-01-11T00:00:00Z")


def freeze(root: Path) -> None:
    _load_spec.cache_clear()
    write(root, FILE, release_line({}, frozen_release(load_spec(root))))


def accept_evidence(root: Path) -> None:
    commit = git(root, "rev-parse", "HEAD")
    fingerprint = load_spec(root).fingerprint("loss.golden")
    kill = {
        "gate": "loss.golden",
        "fingerprint": fingerprint,
        "plant": "loss.wrong",
        "plant_sha256": read_exhibits(root)["loss.wrong"].sha256,
    }
    kill |= {"outcome": "killed", "control": "pass", "latency": "before step 1", "seconds": 0.1}
    proof = record(root, "falsification", 0, commit, kills=[kill])
    gate = {"id": "loss.golden", "fingerprint": fingerprint, "verdict": "pass", "checks": 1}
    gate |= {"limits": {"error_max": 1e-5}}
    files = [artefact("model.safetensors", WEIGHTS), artefact("tokenizer.json", TOKENIZER)]
    train = record(
        root,
        "train",
        1,
        commit,
        gates=[gate],
        outputs=files,
        metrics=train_metrics(),
        series_lines={"metrics.jsonl": log_lines()},
    )
    evaluate = record(
        root,
        "evaluate",
        2,
        commit,
        inputs=files,
        parents=[train.id],
        metrics={
            "total_nats": metric(60.0),
            "tokens": metric(30),
            "bytes": metric(60),
            "chars": metric(50),
            "loss_nats": metric(2.0),
            "bits_per_byte": metric(60.0 / math.log(2) / 60),
            "bits_per_char": metric(60.0 / math.log(2) / 50),
        },
    )
    resume = record(root, "resume", 3, commit, metrics={"weights_equal": metric(1)})
    lines = [
        "[[model]]",
        'id = "small-1"',
        'series = "small"',
        'status = "released"',
        'recipe = "small"',
        f'commit = "{commit}"',
        'researcher = "somebody"',
        'license = "Apache-2.0"',
        'data_license = "PSF-2.0"',
        f"n_params = {N_PARAMS}",
        f'tokenizer_sha256 = "{TOKENIZER}"',
        f'weights_sha256 = "{WEIGHTS}"',
        'card = "docs/models/small.md"',
        "[model.records]",
        *(
            f'{name} = "{r.id}"'
            for name, r in (
                ("train", train),
                ("evaluate", evaluate),
                ("resume", resume),
                ("falsification", proof),
            )
        ),
    ]
    write(root, "evidence/registry.toml", "\n".join(lines) + "\n")
