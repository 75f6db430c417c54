"""CPU time and peak memory of the commands that read a large evidence folder, and of the page of a
run whose log is as long as one can be.

    python benchmarks/evidence_folder.py [--records 10000] [--folder DIR] [--json PATH]

Writes a folder of synthetic records, or measures the one that is there, and runs each command in a
process of its own. The records have the fields, gates and size of real ones: about 35 kB of a
training run, 10 to 20 kB of the other kinds, and a short log beside each run. They are true to the
rules of the integrity check, but `compute` is `synthetic`, so that they discharge nothing.
"""

import argparse
import datetime as dt
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackproof.evidence.ledgering import MAX_ARTEFACT_BYTES
from stackproof.spec import ROOT
from stackproof.spec.archive import History
from stackproof.spec.canonical import canonical_json, canonical_lines, sha256_bytes, sha256_json
from stackproof.spec.gates import Gate, Spec, load_spec
from stackproof.spec.ledger import GENESIS, Entry
from stackproof.spec.records import SCHEMA, Series

STEPS, VOCAB = 20, 1024
MODEL = {
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "d_ff": 384,
    "max_seq_len": 128,
    "tied_head": True,
}
CONFIG = {
    "recipe": "synthetic",
    "model": MODEL,
    "train": {"tokens_per_step": 2048, "micro_batch_size": 16, "max_steps": STEPS, "log_every": 1},
    "optim": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "data": {"corpus": {"kind": "files", "paths": ["corpus.txt"]}, "split": {"kind": "tail"}},
}
COMMANDS = {
    "stack evidence verify": ("-m", "stackproof", "evidence", "verify", "--json"),
    "stack gates list": ("-m", "stackproof", "gates", "list", "--json"),
}
# In a process of its own: the peak of this one would be counted for its children.
MEASURE = """
import json, os, resource, sys
pid = os.spawnvp(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
print(json.dumps({"code": os.waitstatus_to_exitcode(status),
    "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}))
"""


def write_records(directory: Path, n: int, *, commit: str, spec: Spec, seed: int = 0) -> None:
    """Write `n` records with their series and a ledger of them."""
    previous, lines = GENESIS, []
    for seq, (document, series) in enumerate(_records(n, commit, spec, random.Random(seed))):
        folder = directory / document["id"]
        folder.mkdir(parents=True)
        for name, data in series.items():
            (folder / name).write_bytes(data)
        data = canonical_json(document)
        (folder / "metadata.json").write_bytes(data)
        entry = Entry(seq=seq, record=document["id"], sha256=sha256_bytes(data), prev=previous)
        lines.append(entry.to_line())
        previous = sha256_bytes(lines[-1])
    (directory / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def _records(
    n: int, commit: str, spec: Spec, chance: random.Random
) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Records and their series: six of ten are training runs, with an evaluation after each
    third, and the others proofs and benchmarks.
    """
    # computed anew at each call
    fingerprints = {gate_id: spec.fingerprint(gate_id) for gate_id in spec.gates}
    of_spec = {"version": spec.version, "sha256": spec.sha256}
    kinds = ["train", "train", "train", "evaluate", "train", "train", "train"]
    kinds += ["falsification", "benchmark", "benchmark"]
    parent = ""
    for number in range(n):
        kind = kinds[number % len(kinds)]
        document = _common(kind, number, commit) | {"spec": of_spec}
        series: dict[str, bytes] = {}
        match kind:
            case "train":
                series["metrics.jsonl"] = _log(document, chance)
                parent = document["id"]
            case "evaluate":
                document["parents"] = [parent]
        document["gates"] = [_gate(g, fingerprints[g.id], chance) for g in spec.required(kind)]
        if kind != "train":
            names = (f"part-{i:03d}.{k}" for i in range(40) for k in ("rate", "seconds", "bytes"))
            document["metrics"] = {name: _metric(chance.random()) for name in names}
        document["series"] = [
            {"path": name, "sha256": sha256_bytes(data)} for name, data in series.items()
        ]
        yield document, series


def _common(kind: str, number: int, commit: str) -> dict[str, Any]:
    started = dt.datetime.now(dt.UTC).replace(microsecond=0)
    text = lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ")  # noqa: E731
    config = CONFIG | {"seed": number}
    return {
        "schema": SCHEMA,
        "id": f"{kind}-{started:%Y%m%dT%H%M%SZ}-{number:08x}",
        "kind": kind,
        "status": "completed",
        "end_reason": f"reached {STEPS} steps",
        "exit_code": 0,
        "claim": "This configuration, on this text, gives these weights and these figures.",
        "not_covered": ["other seeds", "other machines", "longer runs"],
        "code": {
            "commit": commit,
            "dirty": False,
            "diff_sha256": None,
            "lock_sha256": "d" * 64,
        },
        "command": ["stack", kind, "synthetic", "--set", f"seed={number}"],
        "config": config,
        "config_sha256": sha256_json(config),
        "overrides": [{"key": "seed", "value": number, "from": f"--set seed={number}"}],
        "environment": {
            "python": "3.12.3",
            "os": "Linux-6.1-x86_64",
            "cpu": "a processor",
            "cpu_count": 8,
            "device": "cpu",
            "world_size": 1,
            "threads": 1,
            "torch": "2.13.0",
        },
        "compute": "synthetic",
        "inputs": [_file("train tokens", number, 5 * 2**20)],
        "outputs": [_file("model.safetensors", number + 1, 3 * 2**20)],
        "metrics": {},
        "gates": [],
        "kills": [],
        "parents": [],
        "series": [],
        "started_at": text(started),
        "finished_at": text(started + dt.timedelta(seconds=30)),
        "wall_s": 30.0,
        "device_s": 0.0,
    }


def _file(name: str, number: int, n_bytes: int) -> dict[str, Any]:
    sha256 = sha256_bytes(f"{name} {number}".encode())
    parts = {"name": name, "path": f"runs/synthetic/{name}", "sha256": sha256, "bytes": n_bytes}
    return parts | {"license": "CC0-1.0", "tokens": None}


def _metric(value: float, unit: str = "1", n: int | None = None) -> dict[str, Any]:
    return {"value": value, "unit": unit, "n": n, "stderr": None, "better": "lower"}


def _gate(gate: Gate, fingerprint: str, chance: random.Random) -> dict[str, Any]:
    limits = {name: limit.value for name, limit in gate.limits.items()}
    return {
        "id": gate.id,
        "fingerprint": fingerprint,
        "verdict": "pass",
        "checks": 1 + chance.randrange(STEPS),
        "heartbeat_last_step": STEPS,
        "first_failure_step": None,
        "measured": {name.removesuffix("_max"): chance.random() for name in limits},
        "limits": limits,
        "message": "",
        "seconds": round(chance.random(), 6),
        "waiver": None,
    }


def _log(document: dict[str, Any], chance: random.Random) -> bytes:
    """The log of a training run; the metrics of the record are those that follow from it."""
    tokens = CONFIG["train"]["tokens_per_step"]
    rows = [
        {
            "step": step,
            "loss_nats": 7 - step / 10 + chance.random() / 100,
            "ema_loss_nats": 7 - step / 10,
            "grad_norm": 0.5 + chance.random(),
            "lr": 1e-3,
            "tokens_seen": tokens * step,
            "tokens_per_s": tokens * STEPS / 20.0,
        }
        for step in range(1, STEPS + 1)
    ]
    rows[-1]["val_loss_nats"] = held_out = 5.2 + chance.random()
    figures = {
        "steps": STEPS,
        "tokens_seen": tokens * STEPS,
        "vocab_size": VOCAB,
        "n_params": 1_000_000,
        "train_loss_nats": rows[-1]["loss_nats"],
        "ema_loss_nats": rows[-1]["ema_loss_nats"],
        "val_loss_nats": held_out,
        "best_val_loss_nats": held_out,
        "tokens_per_s": tokens * STEPS / 20.0,
        "train_s": 20.0,
    }
    document["metrics"] = {name: _metric(value, n=STEPS) for name, value in figures.items()}
    return canonical_lines(rows)


def measured(folder: Path, *command: str) -> dict[str, Any]:
    """Exit code, CPU seconds and peak bytes of Python with these arguments, and of its children
    the CPU seconds.
    """
    # evidence/ of the working directory is what the commands read
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "checkout")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr[-400:]}


def write_checkout(folder: Path, n: int) -> None:
    """A clone of this checkout whose evidence is `n` synthetic records, committed."""
    git = ("git", "-c", "user.name=benchmark", "-c", "user.email=none@example.invalid")
    subprocess.run([*git, "clone", "-q", "--shared", str(ROOT), str(folder)], check=True)
    evidence = folder / "evidence"
    for path in sorted(evidence.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    commit = History(folder).git("rev-parse", "HEAD") or b""
    write_records(evidence, n, commit=commit.decode().strip(), spec=load_spec(folder))


def page_of_a_long_log(folder: Path) -> dict[str, Any]:
    """CPU seconds and peak bytes of the site's page of a run whose log is as long as the ledger
    takes it up. The checkout is written to `folder`.
    """
    sys.path.insert(0, str(ROOT))
    from tools.site_pages.runs import run_page
    from tools.site_pages.world import load_world

    write_checkout(folder, 1)
    world = load_world(folder, folder / "evidence")
    (record,) = world.records.values()
    lines, n_bytes = [], 0
    while n_bytes < MAX_ARTEFACT_BYTES - 1000:
        row = {"step": len(lines) + 1, "loss_nats": 7 - len(lines) / 1e7, "grad_norm": 0.5}
        lines.append(canonical_json(row | {"lr": 1e-3, "tokens_seen": 2048 * len(lines)}) + b"\n")
        n_bytes += len(lines[-1])
    (folder / "evidence" / record.id / "metrics.jsonl").write_bytes(data := b"".join(lines))
    series = (Series(path="metrics.jsonl", sha256=sha256_bytes(data)),)
    started = time.process_time()
    run_page(world, record.model_copy(update={"series": series}))
    used_s, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"code": 0, "cpu_s": used_s, "peak_bytes": peak * 1024, "lines": len(lines)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="a checkout of an earlier call")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stackproof-records-") as temporary:
        folder = options.folder or Path(temporary) / "checkout"
        if not folder.exists():
            write_checkout(folder, options.records)
        commands = COMMANDS | {
            "tools/check_integrity.py": (
                str(ROOT / "tools/check_integrity.py"),
                "--root",
                str(folder),
                "--json",
            )
        }
        rows = {name: measured(folder, *command) for name, command in commands.items()}
        rows["page of the longest log"] = page_of_a_long_log(Path(temporary) / "page")
    for name, row in rows.items():
        print(
            f"{name:28} exit {row['code']}  {row['cpu_s']:6.1f} s of CPU  "
            f"{row['peak_bytes'] / 2**20:7.0f} MB"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
