"""Many settings of a recipe over seeds, each within the same budget, through the real
`stack train`; one record with their ranking.

    python benchmarks/sweep.py pocket --out DIR --tokens 2000000 --try 'optim.lr=2e-3
        schedule.warmup_steps=40' --try '' --seeds 1 2 3
    python benchmarks/sweep.py pocket --out DIR --seconds 120 --file tries.toml

A try is any number of `--set` values, the empty one is the recipe as it is. The file holds
`tries = ["optim.lr=2e-3", …]`, and may hold `sets = […]` for all of them and `seeds = […]`. With
`--tokens` every run reads that many. With `--seconds` a short run of each try measures its rate
once, and its number of steps follows from that, so that its schedule ends with the budget; on a
busy machine rates differ.

Runs are ranked by bits per byte, the mean over seeds: on the run's own held-out split, which
compares tries that share their data settings, or on all of another text with `--held-out FILE`.
Every run keeps its folder and its record; what is finished is not run again. A run that a gate
halted is reported with its reason, and its try comes behind all others.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import held_out
from side_by_side import facts, open_record, write_json

from stackproof.config import load_config
from stackproof.recipes import recipe
from stackproof.spec.canonical import sha256_json
from stackproof.spec.records import Record, read_record
from stackproof.train import checkpoint

PROBE_STEPS = 24
PACKAGES = ("torch", "numpy")


@dataclass(frozen=True)
class Outcome:
    """One run: the try it belongs to, and what came of it.
    `bits_per_byte` is infinite for a run that ended badly.
    """

    trial: int
    seed: int
    bits_per_byte: float
    train_s: float
    tokens_per_s: float
    steps: int
    record: str
    reason: str


@dataclass(frozen=True)
class Place:
    """A try in the ranking: mean over seeds and its standard error."""

    trial: int
    bits_per_byte: float
    stderr: float
    train_s: float
    tokens_per_s: float


def read_tries(
    options: argparse.Namespace,
) -> tuple[list[tuple[str, ...]], tuple[str, ...], list[int]]:
    """Tries, what all have in common, and seeds, from the file and the command line.
    Raises SystemExit for an unknown key or no try.
    """
    document = tomllib.loads(options.file.read_text("utf-8")) if options.file else {}
    if odd := set(document) - {"tries", "sets", "seeds"}:
        raise SystemExit(
            f"{options.file}: {', '.join(sorted(odd))} is not known; allowed: tries, sets, seeds"
        )
    tries = [tuple(shlex.split(t)) for t in (*document.get("tries", ()), *options.tries)]
    if not tries:
        raise SystemExit(
            "there is nothing to try; give --try 'optim.lr=2e-3', or --try '' for the recipe as "
            "it is"
        )
    return (
        tries,
        (*document.get("sets", ()), *options.set),
        options.seeds or document.get("seeds", [1]),
    )


def steps_within(options: argparse.Namespace, sets: tuple[str, ...], out: Path) -> int:
    """Optimizer steps that the budget pays for, at least 2."""
    tokens_per_step = load_config(recipe(options.recipe), sets=sets)[0].train.tokens_per_step
    if options.tokens:
        return max(2, options.tokens // tokens_per_step)
    record = finished_run(
        options.recipe,
        (*sets, *steps_sets(PROBE_STEPS)),
        out / f"probe-{key_of(options.recipe, sets)}",
    )
    if not record.succeeded:
        raise SystemExit(
            f"the run that measures the rate of {' '.join(sets)} ended as {record.status}: "
            f"{record.end_reason}"
        )
    return max(
        2, int(options.seconds * float(record.metrics["tokens_per_s"].value) / tokens_per_step)
    )


def steps_sets(n: int) -> tuple[str, ...]:
    """A short run that only measures: as few samples as are allowed,
    and one evaluation at its end.
    """
    return (
        f"train.max_steps={n}",
        "schedule.warmup_steps=1",
        f"eval.every={n}",
        f"sample.every={min(n, 100)}",
        f"checkpoint.every={n}",
    )


def key_of(name: str, sets: tuple[str, ...]) -> str:
    """Names a run by everything that was asked of it."""
    return sha256_json([name, *sets])[:16]


def finished_run(name: str, sets: tuple[str, ...], folder: Path) -> Record:
    """The record of a run, trained now unless it was before; a folder without a record is what a
    kill left, and begins anew.
    """
    if not (folder / "metadata.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "stackproof",
            "train",
            name,
            "--run-dir",
            str(folder),
            "--json",
            *(a for s in sets for a in ("--set", s)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if not (folder / "metadata.json").is_file():
            raise SystemExit(
                f"stack train left no record (code {done.returncode}):\n{done.stderr[-3000:]}"
            )
    return read_record(folder / "metadata.json")


def outcome_of(trial: int, seed: int, record: Record, folder: Path, text: str | None) -> Outcome:
    """What a record says, or with a text what its last checkpoint needs for that."""
    value = {name: float(m.value) for name, m in record.metrics.items()}
    score, reason = math.inf, f"{record.status}: {record.end_reason}"
    if record.succeeded:
        score = (
            value["val_bits_per_byte"]
            if text is None
            else held_out.bits_per_byte_of(checkpoint.find(folder), text)
        )
    numbers = (
        value.get("train_s", 0.0),
        value.get("tokens_per_s", 0.0),
        int(value.get("steps", 0)),
    )
    return Outcome(trial, seed, score, *numbers, record.id, reason)


def ranking(outcomes: list[Outcome]) -> list[Place]:
    """Tries by their mean bits per byte, best first; one run that ended badly puts its try last."""
    places = []
    for trial in sorted({o.trial for o in outcomes}):
        own = [o for o in outcomes if o.trial == trial]
        scores = [o.bits_per_byte for o in own]
        spread = (
            statistics.stdev(scores) / len(scores) ** 0.5
            if len(scores) > 1 and all(map(math.isfinite, scores))
            else 0.0
        )
        mean = statistics.fmean(scores) if all(map(math.isfinite, scores)) else math.inf
        train_s, rate = (
            statistics.median(values) for values in zip(*((o.train_s, o.tokens_per_s) for o in own))
        )
        places.append(Place(trial, mean, spread, train_s, rate))
    return sorted(places, key=lambda p: (p.bits_per_byte, p.trial))


def show(places: list[Place], tries: list[tuple[str, ...]], outcomes: list[Outcome]) -> None:
    """Print the ranking as a table, and why runs ended badly."""
    print(f"\n{'':>4}{'bits/byte':>11}{'± stderr':>11}{'seconds':>10}{'tokens/s':>11}  settings")
    for rank, p in enumerate(places, 1):
        settings = " ".join(tries[p.trial]) or "as it is"
        print(
            f"{rank:>4}{p.bits_per_byte:>11.4f}{p.stderr:>11.4f}{p.train_s:>10.1f}"
            f"{p.tokens_per_s:>11.0f}  {settings}"
        )
    for o in outcomes:
        if not math.isfinite(o.bits_per_byte):
            print(
                f"seed {o.seed} of {' '.join(tries[o.trial]) or 'the recipe as it is'} ended as "
                f"{o.reason}"
            )


def state(builder, places: list[Place], outcomes: list[Outcome]) -> None:
    """Every run and every place as metrics; the numbers of tries are places in the list
    `tries` of the configuration.
    """
    for o in outcomes:
        name = f"try{o.trial}_seed{o.seed}"
        builder.metric(f"{name}_bits_per_byte", o.bits_per_byte, "bits per byte", better="lower")
        builder.metric(f"{name}_train_s", o.train_s, "s", better="lower")
        builder.metric(f"{name}_tokens_per_s", o.tokens_per_s, "tokens/s", better="higher")
        builder.metric(f"{name}_steps", o.steps, "steps")
    for rank, p in enumerate(places, 1):
        n = sum(o.trial == p.trial for o in outcomes)
        builder.metric(f"rank{rank}_try", p.trial, "1")
        builder.metric(
            f"rank{rank}_bits_per_byte",
            p.bits_per_byte,
            "bits per byte",
            n=n,
            stderr=p.stderr,
            better="lower",
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe's name")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of all runs and of the record"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=int, help="that every run reads")
    budget.add_argument("--seconds", type=float, help="of training of every run, about")
    parser.add_argument(
        "--try",
        action="append",
        default=[],
        dest="tries",
        metavar="'KEY=VALUE …'",
        help="one try; repeatable",
    )
    parser.add_argument("--file", type=Path, help="TOML file with tries")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for all tries; repeatable"
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--held-out", type=Path, help="UTF-8 text that all final models are scored on"
    )
    return parser.parse_args()


def main() -> int:
    options = parsed()
    tries, common, seeds = read_tries(options)
    options.tries, options.set, options.seeds, options.run_dir = (
        [" ".join(t) for t in tries],
        list(common),
        seeds,
        options.out,
    )
    record = open_record(options, f"sweep of {options.recipe}")
    text = options.held_out.read_text("utf-8") if options.held_out else None
    outcomes = []
    for trial, chosen in enumerate(tries):
        sets = (*common, *chosen)
        n_steps = steps_within(options, sets, options.out)
        for seed in seeds:
            asked = (*sets, f"seed={seed}", f"train.max_steps={n_steps}")
            folder = options.out / f"run-{key_of(options.recipe, asked)}"
            outcomes.append(
                outcome_of(trial, seed, finished_run(options.recipe, asked, folder), folder, text)
            )
            print(json.dumps({"try": options.tries[trial], **vars(outcomes[-1])}), flush=True)
    places = ranking(outcomes)
    show(places, tries, outcomes)
    state(record, places, outcomes)
    write_json(
        options.out / "sweep.json",
        {"machine": facts(PACKAGES), "tries": tries, "runs": [vars(o) for o in outcomes]},
    )
    record.claim = (
        f"Within this budget on this machine, these settings of {options.recipe} ended at these "
        "bits per byte."
    )
    record.not_covered = ("other budgets, data, seeds and machines", "settings that were not tried")
    best = options.tries[places[0].trial] or "the recipe as it is"
    record.finish(
        options.out, status="completed", end_reason=f"best of {len(tries)}: {best}", exit_code=0
    )
    print(f"record {options.out / 'metadata.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
