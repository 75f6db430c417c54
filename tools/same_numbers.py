"""Records the numbers that commands compute, and compares two records, before and after a change.

python tools/same_numbers.py record --stack .venv/bin/stack --out FILE [--parts variants resume]
python tools/same_numbers.py compare FILE FILE
Exit code 0: equal. 1: a value differs, or a command failed. 2: wrong usage, or no part to compare.

`record` runs the given `stack` as a process, so it can come from any checkout. It computes on the
CPU, with OMP_NUM_THREADS as inherited, in a temporary folder with a cache of its own. The parts:

pocket      the recipe `pocket`, trained to its end
variants    six small runs with the choices of architecture, both optimizers, bfloat16 and packing
resume      a variant stopped by SIGTERM after its first checkpoint and resumed, equal to it
documents   what the reading commands print with --json

A run is recorded as the sha256 of its last weights and optimizer state, every line of its series,
and its record. Values that may differ between two runs of the same code, and wording, are masked:
see `MASKED`. The computation is exact for the same machine, libraries and thread count, so
`compare` compares these first, as `environment`.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools/checkout")]

from stackproof.spec.visible import print_visible  # noqa: E402

ENVIRONMENT = ("cpu", "device", "numpy", "python", "threads", "tokenizers", "torch")
SERIES = ("metrics", "samples", "gates", "curriculum", "points")
# Ends of dotted paths, without the indices of lists.
TIMES = """
    record.started_at record.finished_at record.wall_s record.device_s
    gates.seconds document.seconds metrics.tokens_per_s metrics.train_s metrics.preflight_s
    metrics.gates_overhead_frac metrics.trace_overhead_frac
    derived.eta_s derived.probed_flops_per_s
    measured.said_to_all_frac measured.said_to_batch_frac measured.median_frac measured.peak_frac
"""
# Of the run, the machine and the code; hashes of files that contain them; source lines.
IDENTITIES = """
    record.id record.command record.code record.environment document.record document.run_dir
    spec.sha256 gates.fingerprint gates.state outputs.sha256 outputs.bytes series.sha256
    others.source others.called_from
"""
WORDING = """
    record.claim record.not_covered gates.message gates.title chain.hypothesis
    points.operation first_divergence.operation guilty.operation
"""
MASKED = tuple(f".{end}" for end in (TIMES + IDENTITIES + WORDING).split())
ROWS_SHOWN = 40

# --- the command lines ---

SMALL = """
    train.max_steps=20 train.tokens_per_step=512 train.micro_batch_size=4 train.sdc_check_every=10
    schedule.warmup_steps=4 checkpoint.every=5 trace.every=10
    eval.every=10 eval.batches=4 sample.every=10 sample.max_new_tokens=16
    model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16
    model.d_ff=64 model.max_seq_len=64
"""
ADAMW = "optim.kind=adamw optim.lr=3e-3 schedule.kind=cosine"
SOURCES = '[{kind="stdlib-docs",name="docs"},{kind="stdlib-code",name="code"}]'
VARIANTS = {
    "gpt2": f"""{ADAMW} data.tokenizer.kind=byte
        model.positions.kind=learned model.norm.kind=layernorm model.ffn.kind=gelu
        model.n_kv_heads=2 model.attention.qk_norm=false
        model.attention.qkv_bias=true model.attention.out_bias=true model.dropout=0.1""",
    "experts": f"""{ADAMW} model.tied_head=false
        model.ffn.kind=moe model.ffn.n_experts=4 model.ffn.capacity_factor=1.25""",
    "depths": """model.depth.kind=mixture-of-depths model.depth.gate.kind=hard model.depth.every=2
        model.ffn.kind=moe model.ffn.n_experts=4
        model.ffn.expert.kind=gelu model.ffn.balance.kind=selection-bias""",
    "differential": f"""{ADAMW} model.attention.kind=differential
        model.depth.kind=mixture-of-depths model.depth.gate.kind=soft""",
    "window": """train.dtype=bfloat16 model.attention.window=16
        model.positions.scaling.kind=llama3 model.positions.scaling.original_max_seq_len=32""",
    "packed": f"""data.corpus.kind=mixture data.corpus.sources={SOURCES}
        data.packing.kind=best-fit data.dedup.kind=near
        curriculum.kind=bandit curriculum.probe_every=2 model.dropout=0.1
        train.activation_checkpointing=blocks checkpoint.async_save=true""",
}
RESUMED = "packed"
DOCUMENTS = {
    "dry-run": "train pocket --dry-run",
    "inspect": "inspect gpt2",
    "evaluate": "evaluate gpt2",
    "sample": "sample gpt2 --max-new-tokens 32 --count 2",
    "gates": "gates list",
    "trace": "trace differential",
    "trace-backward": "trace experts --backward",
    "trace-against": "trace window --against self@reference",
    "trace-bisect": "trace gpt2 --against gpt2/checkpoints/step-00000015 --bisect",
    "trace-weights": "trace gpt2 --weights --against gpt2/checkpoints/step-00000015",
    "trace-nonfinite": "trace depths --nonfinite",
    "trace-lens": "trace experts --lens logit",
    "trace-ablate": "trace window --ablate layers.*.attention_out",
    "trace-patch": "trace gpt2 --prompt The.cat --patch layers.*.resid_out@-1 --from The.dog",
}


def variant(name: str) -> list[str]:
    """The arguments that train a variant into the folder of its name."""
    sets = [word for setting in (SMALL + VARIANTS[name]).split() for word in ("--set", setting)]
    return ["train", "pocket", "--run-dir", name, *sets]


# --- recording ---


class Failed(Exception):
    """A command did not end as expected."""


class Recorder:
    """Runs a `stack` command in a folder and reads what it leaves there. Each part is a method."""

    def __init__(self, stack: Path, folder: Path):
        self.stack, self.folder = stack, folder
        self.surroundings = os.environ | {
            "STACKPROOF_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def pocket(self) -> dict[str, Any]:
        self._run("train", "pocket", "--run-dir", "pocket")
        return self._read_run("pocket")

    def variants(self) -> dict[str, Any]:
        for name in VARIANTS:
            if not (self.folder / name).exists():
                self._run(*variant(name))
        return {name: self._read_run(name) for name in VARIANTS}

    def resume(self) -> dict[str, Any]:
        straight = self.variants()[RESUMED]
        self._terminate(
            [*variant(RESUMED), "--run-dir", "resumed"],
            self.folder / "resumed" / "checkpoints" / "latest",
        )
        self._run("train", "--resume", "resumed")
        resumed = self._read_run("resumed")
        if unlike := [
            k for k in ("weights", "state", "metrics", "samples") if resumed[k] != straight[k]
        ]:
            raise Failed(
                f"{RESUMED} resumed differs from {RESUMED} uninterrupted in its {', '.join(unlike)}"
            )
        return resumed

    def documents(self) -> dict[str, Any]:
        self.variants()
        return {
            name: mask(json.loads(self._run(*line.split(), "--json")), "document")
            for name, line in DOCUMENTS.items()
        }

    def environment(self) -> dict[str, Any]:
        """The facts on which exact numbers depend, from the record of a run."""
        record = next(self.folder.glob("*/metadata.json"))
        return {
            k: v
            for k, v in json.loads(record.read_text("utf-8"))["environment"].items()
            if k in ENVIRONMENT
        }

    def _run(self, *arguments: str) -> str:
        """The standard output of a command. Raises Failed if its exit code is not 0."""
        print_visible(f"stack {' '.join(arguments[:4])}", file=sys.stderr)
        command = [self.stack, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.surroundings, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise Failed(
                f"stack {' '.join(arguments)}\nexit code {done.returncode}:\n{done.stderr[-2000:]}"
            )
        return done.stdout

    def _terminate(self, arguments: list[str], awaited: Path) -> None:
        """Send SIGTERM once a file exists. Raises Failed if the exit code is not 75."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(
            [self.stack, *arguments], cwd=self.folder, env=self.surroundings, **quiet
        ) as process:
            while process.poll() is None and not awaited.exists():
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
        if process.returncode != 75:
            raise Failed(
                f"a run stopped by SIGTERM ended with exit code {process.returncode} instead of 75"
            )

    def _read_run(self, name: str) -> dict[str, Any]:
        run = self.folder / name
        last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text("utf-8").strip()
        series = {s: run / f"{s}.jsonl" for s in SERIES}
        return {
            "weights": sha256(last / "model.safetensors"),
            "state": sha256(last / "state.safetensors"),
            "record": mask(json.loads((run / "metadata.json").read_text("utf-8")), "record"),
            **{
                s: mask([json.loads(x) for x in p.read_text("utf-8").splitlines()], s)
                for s, p in series.items()
                if p.is_file()
            },
        }


PARTS = {
    "pocket": Recorder.pocket,
    "variants": Recorder.variants,
    "resume": Recorder.resume,
    "documents": Recorder.documents,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mask(value: Any, path: str) -> Any:
    """The value with "masked" at every path that MASKED names. Keys are kept."""
    if f".{path}".endswith(MASKED):
        return "masked"
    if isinstance(value, dict):
        return {k: mask(v, f"{path}.{k}") for k, v in value.items()}
    return [mask(v, path) for v in value] if isinstance(value, list) else value


def record(stack: Path, out: Path, parts: list[str]) -> None:
    """Run the parts and write one file. Raises Failed if a command fails."""
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        recorder = Recorder(stack.absolute(), Path(folder))
        recorded = {part: PARTS[part](recorder) for part in parts}
        recorded = {"environment": recorder.environment(), **recorded}
    out.write_text(json.dumps(recorded, indent=0) + "\n", "utf-8")


# --- comparing ---


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each value of a document with its path, as JSON: 1 and 1.0 differ, [] is a value."""
    if isinstance(value, dict | list) and value:
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(
                v, f"{key}[{k}]" if isinstance(value, list) else f"{key}.{k}".lstrip(".")
            )
    else:
        yield key, json.dumps(value)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(path, value in a, value in b) of each value that differs; `absent` if a side lacks it."""
    left, right = dict(leaves(a)), dict(leaves(b))
    rows = ((key, left.get(key, "absent"), right.get(key, "absent")) for key in left | right)
    return [row for row in rows if row[1] != row[2]]


def compare(a: Path, b: Path) -> int:
    """Print what differs in the parts both files have. Returns the exit code."""
    left, right = (json.loads(path.read_text("utf-8")) for path in (a, b))
    common = [part for part in PARTS if part in left and part in right]
    for part in (p for p in PARTS if (p in left) != (p in right)):
        print_visible(f"not compared: {part}, which only {a if part in left else b} has")
    if not common:
        print_visible(f"error: {a} and {b} have no part in common", file=sys.stderr)
        return 2
    kept = ["environment", *common]
    rows = differences(*({k: side[k] for k in kept} for side in (left, right)))
    for row in rows[:ROWS_SHOWN]:
        print_visible(
            "  ".join(
                f"{cell[:80]:<{width}}" for cell, width in zip(row, (64, 24, 24), strict=True)
            ).rstrip()
        )
    if len(rows) > ROWS_SHOWN:
        print_visible(f"… and {len(rows) - ROWS_SHOWN} more")
    print_visible(
        f"{len(rows)} values differ in {', '.join(common)}"
        if rows
        else f"equal: {', '.join(common)}"
    )
    return 1 if rows else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("--stack", type=Path, required=True, help="the stack command to run")
    recording.add_argument("--out", type=Path, required=True, help="the file to write")
    recording.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    comparing = verbs.add_parser("compare")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    given = parser.parse_args(arguments)
    if given.verb == "compare":
        return compare(given.a, given.b)
    if not given.stack.is_file():
        parser.error(
            f"--stack {given.stack} is not a file; give the command's path: .venv/bin/stack"
        )
    try:
        record(given.stack, given.out, given.parts)
    except Failed as e:
        print_visible(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
