"""A small repository with two gates, two plants and an optional ledger, for tests of the site."""

from pathlib import Path

from stackproof.spec.canonical import canonical_json, sha256_bytes, sha256_json
from stackproof.spec.gates import load_spec
from stackproof.spec.ledger import Ledger
from stackproof.spec.mutants import SERIES
from stackproof.spec.mutants import metrics as mutant_metrics
from stackproof.spec.rank_log import over_ranks
from stackproof.spec.records import (
    SCHEMA,
    Artefact,
    Code,
    GateResult,
    Kill,
    Metric,
    Override,
    Record,
    Series,
    SpecRef,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAST_STEP = 300

SPEC = 'version = "0.9.0"\ntitle = "A small spec"\nscope = "Two gates."\n'
GATES = """
[[gate]]
id = "loss.adds-up"
title = "Sums add up"
statement = "The sum of `a` and b MUST be within abs_error_max | of c."
moment = "preflight"
severity = "halt"
check = "contracts.loss:adds_up"
plants = ["loss.off-by-one", "loss.swapped"]
tests = ["tests/contracts/test_loss.py"]
since = "0.9.0"
sources = ["https://example.org/paper", "a book"]
[gate.limits]
abs_error_max = { value = 1e-6, unit = "nats", direction = "at-most", why = "float32 sums of a few terms" }

[[gate]]
id = "loss.stays-finite"
title = "The loss stays finite"
statement = "Every step MUST report a finite loss."
moment = "runtime"
severity = "warn"
check = "contracts.loss:Finite"
plants = []
tests = []
since = "0.9.0"
sources = []
"""  # noqa: E501
CHECKS = '''"""Checks."""


def adds_up(limits, *, a, b, c):
    """Sum."""
    return abs(a + b - c) <= limits.abs_error_max


class Finite:
    """Watches."""
'''
PLANTS = """
[[plant]]
id = "loss.off-by-one"
gate = "loss.adds-up"
title = "One too many"
story = "Somebody *added* one."
sources = ["https://example.org/bug"]
function = "loss:off_by_one"

[[plant]]
id = "loss.swapped"
gate = "GATE"
title = "Arguments <swapped>"
story = "b came first."
sources = []
target = "contracts.loss:adds_up"
old = "a + b - c"
new = "b + a - c"
"""
GENERATORS = "def off_by_one():\n    yield\n"


def write_repository(root: Path, *, gate_of_second_plant: str = "loss.adds-up") -> Path:
    """Spec, checks and museum; no evidence."""
    for folder in ("spec/gates", "contracts", "stack/museum/plants", "evidence"):
        (root / folder).mkdir(parents=True)
    (root / "spec/spec.toml").write_text(SPEC)
    (root / "spec/gates/loss.toml").write_text(GATES)
    (root / "contracts/loss.py").write_text(CHECKS)
    (root / "stack/museum/plants/loss.toml").write_text(
        PLANTS.replace("GATE", gate_of_second_plant)
    )
    (root / "stack/museum/loss.py").write_text(GENERATORS)
    return root


def record(root: Path, kind: str, nonce: str, **parts) -> Record:
    """A record of the small repository with every required field."""
    spec = load_spec(root)
    config = {"recipe": "pocket", "optim": {"lr": 0.004}}
    fields = {
        "schema": SCHEMA,
        "id": f"{kind}-20260131T120000Z-{nonce}",
        "kind": kind,
        "status": "completed",
        "end_reason": "all steps taken",
        "exit_code": 0,
        "claim": f"A {kind} record with <b>markup</b> | and a pipe.",
        "not_covered": ("more than one seed",),
        "spec": SpecRef(version=spec.version, sha256=spec.sha256),
        "code": Code(commit=COMMIT, dirty=False),
        "command": ("stack", kind, "a b"),
        "config": config,
        "config_sha256": sha256_json(config),
        "environment": {"python": "3.11", "cpu_count": 2},
        "compute": "real",
        "started_at": "2026-01-31T12:00:00.000Z",
        "finished_at": "2026-01-31T12:05:00.000Z",
        "wall_s": 300.0,
        "device_s": 0.0,
    }
    return Record(**(fields | parts))


def add_evidence(root: Path) -> list[Record]:
    """A record of each kind the site has a page for, with their series, accepted into the ledger;
    the three a model stands on.
    """
    spec = load_spec(root)
    print_of = spec.fingerprint("loss.adds-up")
    hash_of_plant = sha256_bytes(b"plant")
    kills = tuple(
        Kill(
            gate="loss.adds-up",
            fingerprint=print_of,
            plant=p,
            plant_sha256=hash_of_plant,
            outcome="killed",
            control="pass",
            latency="preflight",
            seconds=0.1,
        )
        for p in ("loss.off-by-one", "loss.swapped")
    )
    falsification = record(root, "falsification", "aaaaaaaa", kills=kills)
    gates = (
        GateResult(
            id="loss.adds-up",
            fingerprint=print_of,
            verdict="pass",
            checks=1,
            measured={"abs_error": 2.5e-9},
        ),
        GateResult(
            id="loss.stays-finite",
            fingerprint=spec.fingerprint("loss.stays-finite"),
            verdict="fail",
            checks=300,
            first_failure_step=40,
            message="not finite",
        ),
    )
    series = _write_series(root / "evidence" / "train-20260131T120000Z-bbbbbbbb")
    train = record(
        root,
        "train",
        "bbbbbbbb",
        gates=gates,
        series=series,
        metrics={
            "val_loss_nats": Metric(
                value=3.14159265, unit="nats/token", n=512, stderr=0.02, better="lower"
            )
        },
        overrides=(Override(key="optim.lr", value=0.004, source="--set optim.lr=4e-3"),),
        outputs=(
            Artefact(
                name="weights",
                path="checkpoints/step-00000200/model.safetensors",
                sha256=hash_of_plant,
                bytes=4_000_000,
            ),
        ),
    )
    evaluate = record(
        root,
        "evaluate",
        "cccccccc",
        parents=(train.id,),
        metrics={"bits_per_byte": Metric(value=2.5, unit="bits/byte", n=9000)},
    )
    others = (_data_record(root), _benchmark_record(root), _mutation_record(root))
    for one in (falsification, train, evaluate, *others):
        folder = root / "evidence" / one.id
        folder.mkdir(exist_ok=True)
        (folder / "metadata.json").write_bytes(one.to_bytes())
        Ledger(root / "evidence").append(one)
    return [falsification, train, evaluate]


def add_release(root: Path, records: list[Record]) -> None:
    """A registry with one model standing on the given records."""
    lines = [f'{r.kind} = "{r.id}"' for r in records]
    head = (
        'id = "pocket-1"\nseries = "pocket"\nstatus = "candidate"\nrecipe = "pocket"\nresearcher '
        '= "a person"\nlicense = "Apache-2.0"\n'
        'data_license = "PSF-2.0"\nn_params = 1000000\ncard = "evidence/cards/pocket-1.md"\n'
        f'commit = "{COMMIT}"\ntokenizer_sha256 = "{"1" * 64}"\nweights_sha256 = "{"2" * 64}"\n'
    )
    (root / "evidence/registry.toml").write_text(
        "[[model]]\n" + head + "[model.records]\n" + "\n".join(lines) + "\n"
    )


def _data_record(root: Path) -> Record:
    """A data set of one source that lost three documents for two reasons."""
    source = {
        "name": "letters",
        "license": "CC0-1.0",
        "weight": 2,
        "cap": 0.7,
        "floor": 0.1,
        "documents_in": 1203,
        "documents_out": 1200,
    }
    source |= {
        "dropped": {"too-short": {"documents": 2}, "low-diversity": {"documents": 1}},
        "tokens": {"train": 54321, "validation": 678},
    }
    line = canonical_json(source) + b"\n"
    made = record(
        root,
        "data",
        "dddddddd",
        series=(Series(path="sources.jsonl", sha256=sha256_bytes(line)),),
        metrics={
            n: Metric(value=v, unit=u)
            for n, v, u in (
                ("documents_in", 1203, "documents"),
                ("documents_out", 1200, "documents"),
            )
        }
        | {"train_tokens": Metric(value=54321, unit="tokens")},
    )
    (root / "evidence" / made.id).mkdir(parents=True)
    (root / "evidence" / made.id / "sources.jsonl").write_bytes(line)
    return made


def _benchmark_record(root: Path) -> Record:
    """Two peers: one ratio that was wanted and reached, one that was missed."""
    figures = {"ratio_to_slow_one": (5.5, 5.1, 6.2, 5.0), "ratio_to_fast_one": (0.8, 0.7, 0.9, 1.0)}
    metrics = {}
    for name, values in figures.items():
        names = (name, f"{name}_min", f"{name}_max", f"wanted_{name}")
        metrics |= {n: Metric(value=v, unit="1") for n, v in zip(names, values)}
    environment = {"python": "3.11", "cpu": "a processor", "cpu_count": 2, "peer_slow-one": "1.2.3"}
    config = {"benchmark": "the reader"}
    return record(
        root,
        "benchmark",
        "eeeeeeee",
        metrics=metrics,
        environment=environment,
        config=config,
        config_sha256=sha256_json(config),
    )


def _mutation_record(root: Path) -> Record:
    """A draw of four mutants: one caught before step 1, one survivor, two refusals."""
    line = {"operator": "axis", "scenario": "museum", "package": "data", "diff": "- a\n+ b"}
    found = (
        ("caught", "result", {"kind": "red", "moment": "before step 1"}),
        ("survivor", "result", {"kind": "completed"}),
        ("refused", "", {"kind": "refused", "exit_code": 3, "error": "DataError: a shard"}),
        ("refused", "", {"kind": "refused", "exit_code": 6, "error": "IntegrityError: x"}),
    )
    rows = [
        line
        | {"target": f"stackproof.data.packing:f{n}", "line": n, "outcome": outcome}
        | {"effect": effect, "ending": ending, "differing": ["run/metrics.jsonl::[0].loss_nats"]}
        for n, (outcome, effect, ending) in enumerate(found)
    ]
    data = b"".join(canonical_json(row) + b"\n" for row in rows)
    made = record(
        root,
        "mutation",
        "ffffffff",
        series=(Series(path=SERIES, sha256=sha256_bytes(data)),),
        metrics={n: Metric(value=v, unit=u, n=of) for n, (v, u, of) in mutant_metrics(rows).items()},
    )
    (root / "evidence" / made.id).mkdir(parents=True)
    (root / "evidence" / made.id / SERIES).write_bytes(data)
    return made


def _write_series(folder: Path) -> tuple[Series, ...]:
    folder.mkdir()
    metrics = []
    for step in range(1, LAST_STEP + 1):
        line = {
            "step": step,
            "loss_nats": 7.0 - 0.01 * step,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_seen": step * 4096,
            "tokens_per_s": 9e3,
        }
        metrics.append(
            line
            | (
                {
                    "val_loss_nats": 7.1 - 0.01 * step,
                    "val_bits_per_byte": 3.0,
                    "val_stderr_nats": 0.05,
                }
                if step % 60 == 0
                else {}
            )
        )
    samples = [
        {
            "step": s,
            "prompt": "The ",
            "text": "<script>alert(1)</script> | `x`\n",
            "score": 61.5,
            "parts": {"words": 0.5},
        }
        for s in (60, 120)
    ]
    gates = [
        {
            "gate": "loss.stays-finite",
            "step": 40,
            "verdict": "fail",
            "measured": {},
            "message": "not finite",
        },
        {
            "gate": "checkpoint.reloads",
            "step": 200,
            "verdict": "pass",
            "measured": {},
            "message": "",
        },
    ]
    events = [{"event": "resumed", "step": 200, "lines_cut": 3, "at": "2026-01-31T12:03:00.000Z"}]
    draws = [
        {"step": 1, "event": "rows", "rows": {"letters": 24, "novels": 8}},
        {"step": 2, "event": "rows", "rows": {"letters": 6, "novels": 2}},
        {"step": 2, "event": "turn", "focus": "novels"},
    ]
    of_ranks = [
        {
            "step": 0,
            "event": "mesh",
            "mesh": {"replicate": 1, "shard": 2, "tensor": 1},
            "ranks": [
                {"rank": r, "replicate": 0, "shard": r, "tensor": 0, "device": "cuda"}
                | {"device_name": f"card <{r}>"}
                for r in range(2)
            ],
        },
        *(
            {"step": step, "event": "times", "n_steps": 100}
            | {"step_s": over_ranks([0.5, 0.5]), "own_s": over_ranks([0.4, 0.2])}
            | {"communication_frac": over_ranks([0.25, 0.65])}
            | {"exposed_frac": over_ranks([0.2, exposed])}
            for step, exposed in ((50, 0.6), (150, 0.8))
        ),
    ]
    files = {
        "ranks": of_ranks,
        "metrics": metrics,
        "samples": samples,
        "gates": gates,
        "events": events,
        "curriculum": draws,
    }
    written = []
    for name, lines in ((f"{stem}.jsonl", lines) for stem, lines in files.items()):
        data = b"".join(canonical_json(line) + b"\n" for line in lines)
        (folder / name).write_bytes(data)
        written.append(Series(path=name, sha256=sha256_bytes(data)))
    return tuple(written)
