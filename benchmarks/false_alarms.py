"""Clean runs over seeds and configurations, with every gate on: how often does each gate fire
although nothing is wrong?

python benchmarks/false_alarms.py --runs 200 --run-dir runs/false-alarms
    [--ranks] [--work DIR] [--only NAME …]

Run number n trains configuration n modulo their count with seed 1000 + n. Finished runs of the same
code in the work folder are taken as they are, so two hundred can be made in parts (--first,
--runs); each is a process of its own with one thread. With `--ranks` each is a run on 2 or 4 ranks
of this machine, with one thread each, over meshes and configurations of their own. Writes a record
of kind benchmark: per gate the runs that held it, its looks, its alarms, and the upper end of the
exact 95 % interval of their rate. Exit code 0 if no gate fired, 4 if one did, 1 if a run broke.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from side_by_side import open_record

from stackproof.spec.provenance import code_state
from stackproof.spec.records import Code, Record, read_record

CONFIDENCE = 0.95
PARTS = ("spec", "contracts", "stack")  # of the repository, that decide what a run does
STEPS = 48
# A pocket-shaped run in small: the same parts and proportions, seconds instead of minutes.
SMALL = """
    model.d_model=48 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 model.head_dim=12
    model.d_ff=96 model.max_seq_len=64 train.tokens_per_step=512 train.micro_batch_size=8
    schedule.warmup_steps=6 eval.every=12 eval.batches=4 sample.every=6 sample.max_new_tokens=48
    checkpoint.every=24 stop.expected_gain_nats=0.5 data.tokenizer.vocab_size=512 device=cpu
""".split()
CORPUS = ("data.corpus.kind=files", "data.split.validation_frac=0.2")
ADAMW = "optim.kind=adamw optim.lr=4e-3 optim.weight_decay=0.1".split()
MOE = (
    "model.ffn.kind=moe model.ffn.n_experts=4 model.ffn.top_k=2 model.ffn.expert.kind=swiglu"
).split()
# Wide enough that a processor's own kernels take over from torch's where they are the default,
# see docs/kernels.md.
WIDE = (
    "model.d_model=128 model.n_heads=4 model.head_dim=32 model.d_ff=352 model.max_seq_len=256 "
    "train.tokens_per_step=2048"
).split()


def waived(reason: str, *gates: str) -> str:
    """The override that waives gates which are right to be red for these texts,
    and say so in every run.
    """
    entries = ",".join(
        f'{{id="{gate}", reason="{reason}", expires="2999-01-01"}}' for gate in gates
    )
    return f"gates.waive=[{entries}]"


@dataclass(frozen=True)
class Shape:
    """One configuration: what it sets, on how many ranks, and whether it is stopped,
    resumed or continued in a child at its half.
    """

    name: str
    sets: tuple[str, ...] = ()
    seam: str = ""
    steps: int = STEPS
    n_ranks: int = 1


SHORT = waived("the text is short for this width", "data.corpus-budget")
SHAPES = (
    Shape("pocket"),
    Shape("pocket-long", steps=4 * STEPS),
    Shape("adamw-cosine", (*ADAMW, "schedule.kind=cosine")),
    Shape("adamw-wsd", tuple(ADAMW)),
    Shape("muon-cosine", ("schedule.kind=cosine",)),
    Shape("accumulate-2", ("train.micro_batch_size=4",)),
    Shape("accumulate-4", ("train.micro_batch_size=2",)),
    Shape("dropout", ("model.dropout=0.1",)),
    Shape("no-qk-norm", ("model.attention.qk_norm=false",)),
    Shape("differential", ("model.attention.kind=differential", "model.attention.qk_norm=false")),
    Shape("mixture-of-depths", ("model.depth.kind=mixture-of-depths",)),
    Shape("experts", tuple(MOE)),
    Shape("experts-adamw-accumulate-2", (*ADAMW, *MOE, "train.micro_batch_size=4")),
    Shape("packed", ("data.packing.kind=best-fit",)),
    Shape(
        "packed-dropout-accumulate-2",
        ("data.packing.kind=best-fit", "model.dropout=0.1", "train.micro_batch_size=4"),
    ),
    Shape(
        "gpt2-parts",
        (
            "model.norm.kind=layernorm",
            "model.positions.kind=learned",
            "model.ffn.kind=gelu",
            *ADAMW,
        ),
    ),
    Shape("untied", ("model.tied_head=false",)),
    Shape("resumed", ("model.dropout=0.1",), seam="resume"),
    Shape("forked", tuple(ADAMW), seam="fork"),
    Shape("recomputed", ("train.activation_checkpointing=blocks",)),
    Shape("bytes", ("data.tokenizer.kind=byte",)),
    Shape("bfloat16", ("train.dtype=bfloat16",)),
    Shape("traced", ("trace.every=8",)),
    Shape("traced-experts-no-qk-norm", (*MOE, "trace.every=8", "model.attention.qk_norm=false")),
    Shape(
        "traced-differential",
        ("trace.every=8", "model.attention.kind=differential", "model.attention.qk_norm=false"),
    ),
    Shape("traced-mixture-of-depths", ("trace.every=8", "model.depth.kind=mixture-of-depths")),
    Shape("compiled", ("train.compile=true",), steps=STEPS // 2),
    Shape("wide", (*WIDE, SHORT)),
    Shape(
        "wide-packed-window",
        (*WIDE, SHORT, "data.packing.kind=best-fit", "model.attention.window=96"),
    ),
    Shape("wide-experts-dropout", (*WIDE, *MOE, SHORT, "model.dropout=0.1")),
    Shape(
        "pangram",
        (
            *(
                "data.corpus.kind=pangram data.split.kind=tail data.tokenizer.kind=char "
                "sample.language=any"
            ).split(),
            *(
                "model.max_seq_len=32 train.tokens_per_step=256 data.split.validation_frac=0.1"
            ).split(),
            waived(
                "one sentence over and over has no held-out side and no budget",
                "data.leakage",
                "data.corpus-budget",
            ),
        ),
    ),
)


RANKS_STEPS = 24
BFLOAT16 = "train.dtype=bfloat16"
HALVES = ",".join(
    f'{{kind="files",name="{n}",paths=["TEXT/half-{i}.jsonl"]}}' for i, n in enumerate("ab")
)
BANDIT = (
    "data.corpus.kind=mixture",
    f"data.corpus.sources=[{HALVES}]",
    "curriculum.kind=bandit",
    "curriculum.probe_every=2",
    "curriculum.probe_windows=1",
)


def on_ranks(name: str, mesh: dict[str, int], *sets: str) -> Shape:
    """A configuration on a mesh, whose ranks are compared every few steps."""
    sizes = (f"parallel.{key}={size}" for key, size in mesh.items())
    n_ranks = math.prod(mesh.values())
    given = (*sizes, "parallel.compare_every=4", *sets)
    return Shape(f"ranks-{name}", given, steps=RANKS_STEPS, n_ranks=n_ranks)


SHAPES_ON_RANKS = (
    on_ranks("replicate", {"replicate": 2}),
    on_ranks("shard", {"shard": 2}),
    on_ranks("tensor", {"tensor": 2}),
    on_ranks("replicate-shard", {"replicate": 2, "shard": 2}, "model.dropout=0.1"),
    on_ranks("shard-tensor", {"shard": 2, "tensor": 2}),
    on_ranks("replicate-bandit", {"replicate": 2}, *BANDIT),
    on_ranks("shard-experts", {"shard": 2}, *MOE, "train.micro_batch_size=2"),
    on_ranks("shard-bfloat16", {"shard": 2}, BFLOAT16, *ADAMW, "train.micro_batch_size=2"),
    on_ranks("tensor-bfloat16-dropout", {"tensor": 2}, BFLOAT16, "model.dropout=0.1"),
    on_ranks(
        "shard-packed-recomputed",
        {"shard": 2},
        "data.packing.kind=best-fit",
        "train.activation_checkpointing=blocks",
        "model.dropout=0.1",
    ),
    on_ranks("shard-compiled", {"shard": 2}, "train.compile=true"),
    on_ranks("tensor-compiled-bfloat16", {"tensor": 2}, "train.compile=true", BFLOAT16),
)


def sets_of(shape: Shape, seed: int, text: Path) -> list[str]:
    """What a run sets; a later word on the same key counts, so that a shape can differ in anything.
    Kinds come before their keys.
    """
    corpus = (
        ()
        if any(s.startswith("data.corpus.kind") for s in shape.sets)
        else (*CORPUS, f'data.corpus.paths=["{text}"]')
    )
    wanted = dict(
        s.split("=", 1)
        for s in (*SMALL, f"train.max_steps={shape.steps}", f"seed={seed}", *corpus, *shape.sets)
    )
    wanted = {k: v.replace("TEXT", str(text.parent)) for k, v in wanted.items()}
    if "data.tokenizer.kind" in wanted:
        del wanted["data.tokenizer.vocab_size"]
    ordered = sorted(wanted.items(), key=lambda item: not item[0].endswith(".kind"))
    return [a for k, v in ordered for a in ("--set", f"{k}={v}")]


def stack(arguments: list[str], log: Path) -> int:
    """One command of the stack in a process of its own; returns its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "stackproof", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    with open(log, "a") as f:
        f.write(f"$ stack {' '.join(arguments)}\n{done.stderr}\nexit {done.returncode}\n")
    return done.returncode


def trained(shape: Shape, seed: int, folder: Path, text: Path, code: Code) -> Record | None:
    """The record of a clean run, made now unless this code has made it with these settings;
    None if it ended without one.
    """
    made = read_record(folder / "metadata.json") if (folder / "metadata.json").is_file() else None
    sets, asked = sets_of(shape, seed, text), folder.with_suffix(".asked")
    if (
        made is None
        or not same_code(made.code, code)
        or not asked.is_file()
        or asked.read_text() != shlex.join(sets)
    ):
        for leftover in (folder, folder.with_name(folder.name + "-parent")):
            shutil.rmtree(leftover, ignore_errors=True)
        asked.write_text(shlex.join(sets))
        log, half = folder.with_suffix(".log"), shape.steps // 2
        if shape.seam == "resume":
            kill_after(half, [*sets, "--set", f"checkpoint.every={max(1, half // 2)}"], folder, log)
            stack(["train", "--resume", str(folder)], log)
        elif shape.seam == "fork":
            parent = folder.with_name(folder.name + "-parent")
            stack(
                [
                    "train",
                    "pocket",
                    *sets,
                    "--set",
                    f"train.max_steps={half}",
                    "--run-dir",
                    str(parent),
                ],
                log,
            )
            stack(
                [
                    "train",
                    "--fork",
                    str(parent),
                    "--set",
                    f"train.max_steps={shape.steps}",
                    "--run-dir",
                    str(folder),
                ],
                log,
            )
        else:
            ranks = ["--nproc", str(shape.n_ranks)] if shape.n_ranks > 1 else []
            stack(["train", "pocket", *ranks, *sets, "--run-dir", str(folder)], log)
    return read_record(folder / "metadata.json") if (folder / "metadata.json").is_file() else None


def same_code(one: Code, other: Code) -> bool:
    """Whether two commits, neither of them changed, hold the same spec, contracts and stack."""
    if one.dirty or other.dirty:
        return False
    trees = [
        subprocess.run(
            ["git", "rev-parse", *(f"{c.commit}:{part}" for part in PARTS)], capture_output=True
        )
        for c in (one, other)
    ]
    return all(t.returncode == 0 for t in trees) and trees[0].stdout == trees[1].stdout


def unfit(folder: Path) -> bool:
    """Whether a run without a record was refused because this machine has no units for its type: it
    says nothing about gates.
    """
    log = folder.with_suffix(".log")
    return log.is_file() and "exit 7" in log.read_text()


def kill_after(step: int, sets: list[str], folder: Path, log: Path) -> None:
    """Start a run and kill it, without a word, when its log reaches a step."""
    command = [
        sys.executable,
        "-m",
        "stackproof",
        "train",
        "pocket",
        *sets,
        "--run-dir",
        str(folder),
    ]
    with open(log, "a") as f:
        process = subprocess.Popen(
            command, stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (
        path.is_file() and path.read_bytes().count(b"\n") >= step
    ):
        time.sleep(0.02)
    process.kill()
    process.wait()


def upper_bound(alarms: int, runs: int, confidence: float = CONFIDENCE) -> float:
    """Upper end of the exact one-sided interval of a rate (Clopper-Pearson): the rate at which so
    few alarms have a chance of 5 %.

    Without an alarm this is 1 − 0.05^(1/n), which the rule of three gives as 3/n.
    """
    if alarms >= runs:
        return 1.0
    low, high = alarms / runs, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if at_most(alarms, runs, middle) > 1 - confidence else (low, middle)
        )
    return high


def at_most(alarms: int, runs: int, rate: float) -> float:
    """Chance of at most so many alarms in so many runs."""
    total = term = (1 - rate) ** runs
    for k in range(1, alarms + 1):
        term *= (runs - k + 1) / k * rate / (1 - rate) if rate < 1 else 0.0
        total += term
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(s.name for s in (*SHAPES, *SHAPES_ON_RANKS))}",
    )
    parser.add_argument("--ranks", action="store_true", help="runs on several ranks")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/false-alarms"),
        help="where the runs lie; finished ones are kept",
    )
    parser.add_argument("--run-dir", type=Path, help="folder of the record")
    options = parser.parse_args()
    builder = open_record(options, "false alarms of the gates")
    text = write_text(options.work)
    source = builder.code if builder else code_state()
    held, fired, looks, broken, skipped = Counter(), Counter(), Counter(), [], []
    every = SHAPES_ON_RANKS if options.ranks else SHAPES
    shapes = [s for s in every if not options.only or s.name in options.only]
    for number in range(options.first, options.first + options.runs):
        shape = shapes[number % len(shapes)]
        name = f"{number:04d}-{shape.name}"
        record = trained(shape, 1000 + number, options.work / name, text, source)
        # after a halt nobody is asked any more
        quiet = ("pass", "not_run") if record and record.status == "halted" else ("pass",)
        alarms = (
            [g.id for g in record.gates if g.verdict not in quiet and not g.waiver]
            if record
            else []
        )
        if record is None or (not record.succeeded and not alarms):
            (skipped if unfit(options.work / name) else broken).append(name)
        else:
            # one that is waived here can give no alarm, nor be said to have been silent
            asked = [g for g in record.gates if not g.waiver]
            held.update(g.id for g in asked if g.checks)
            looks.update({g.id: g.checks for g in asked})
            fired.update(alarms)
        row = {
            "run": name,
            "status": record.status if record else "none",
            "alarms": alarms,
            "wall_s": record.wall_s if record else None,
        }
        print(json.dumps(row), flush=True)
    show(held, fired, looks, broken)
    counts = {
        "runs": options.runs - len(broken) - len(skipped),
        "broken_runs": len(broken),
        "runs_unfit_here": len(skipped),
    }
    extra = {k: (n, "runs") for k, n in counts.items()} | {
        "shapes": (len(shapes), "configurations")
    }
    for gate in sorted(held):
        name = gate.replace(".", "_").replace("-", "_")
        extra |= {
            f"{name}_runs": (held[gate], "runs"),
            f"{name}_alarms": (fired[gate], "runs"),
            f"{name}_looks": (looks[gate], "looks"),
        }
        extra[f"{name}_alarm_rate_upper_95"] = (round(upper_bound(fired[gate], held[gate]), 6), "1")
    code = 1 if broken else 4 if fired else 0
    if builder:
        builder.claim = (
            "In complete clean trainings over seeds and configurations the gates gave these "
            "alarms and no others."
        )
        builder.not_covered = (
            "longer runs, larger models, other text, and GPUs",
            "alarms that depend on how busy the machine is",
        )
        for name, (value, unit) in extra.items():
            builder.metric(name, value, unit)
        alarms = (
            f"{sum(fired.values())} alarm(s) in {counts['runs']} clean runs, {len(broken)} run(s) "
            "broken"
        )
        options.run_dir.mkdir(parents=True, exist_ok=True)
        builder.finish(
            options.run_dir,
            status="failed" if code else "completed",
            end_reason=alarms,
            exit_code=code,
        )
        print(f"record {options.run_dir / 'metadata.json'}")
    return code


def show(held: Counter, fired: Counter, looks: Counter, broken: list[str]) -> None:
    """Print what every gate said, and the runs that ended by no gate."""
    print(f"\n{'gate':34}{'runs':>6}{'looks':>8}{'alarms':>8}{'rate at most (95 %)':>22}")
    for gate in sorted(held):
        print(
            f"{gate:34}{held[gate]:>6}{looks[gate]:>8}{fired[gate]:>8}"
            f"{upper_bound(fired[gate], held[gate]):>22.2%}"
        )
    if broken:
        print(f"broken, by no gate: {', '.join(broken)}; see the .log beside each")


def write_text(work: Path) -> Path:
    """The museum's text as JSON lines: real English that is on every machine. Beside it lie its two
    halves, for mixtures.
    """
    from stackproof.museum.collection import museum_texts

    work.mkdir(parents=True, exist_ok=True)
    texts, path = museum_texts(), work.resolve() / "text.jsonl"
    parts = {"text.jsonl": texts, "half-0.jsonl": texts[::2], "half-1.jsonl": texts[1::2]}
    for name, own in parts.items():
        if not path.with_name(name).is_file():
            lines = "".join(json.dumps({"text": t}) + "\n" for t in own)
            path.with_name(name).write_text(lines, "utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
