"""What recording the points of a run costs: one recording against a training step, in turn,
in one process.

python benchmarks/trace_every.py [--recipe pocket] [--set a.b=v]... [--rounds 8] [--run-dir DIR]
Writes a record of kind benchmark with the ratio, and the smallest `trace.every` at which it
stays within 2 % of the time.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from our_run import bare_step, open_run

from stackproof.config import load_config
from stackproof.recipes import recipe
from stackproof.spec.building import RecordBuilder
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.trace.points_log import points_lines
from stackproof.train.run_dir import RunDir

CLAIM = (
    "Median time of recording all points of one micro-batch, with its lines written, over that of "
    "a training step, in turn."
)
NOT_COVERED = (
    "other sizes and lengths",
    "accelerators",
    "the first recording of a process, which also compares the training state",
)
SHARE = 0.02


def timed(work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    cfg, overrides = load_config(recipe(options.recipe), sets=(*options.sets, "device=cpu"))
    builder = RecordBuilder(
        kind="benchmark",
        spec=load_spec(),
        config=cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        overrides=overrides,
    )
    builder.command = ["python", "benchmarks/trace_every.py", *sys.argv[1:]]
    builder.environment = environment("cpu")
    directory = options.run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(cfg, overrides, Path(folder) / "run")
        batch, log = run.state.data_loader.next_batch(), RunDir(Path(folder) / "run")
        record = lambda: [  # noqa: E731
            log.log("points.jsonl", step=0, **line) for line in points_lines(run.state, batch)
        ]
        pairs = [(timed(lambda: bare_step(run)), timed(record)) for _ in range(options.rounds + 1)][
            1:
        ]
        recording_bytes = (Path(folder) / "run" / "points.jsonl").stat().st_size // (
            options.rounds + 1
        )
    ratio = statistics.median(points / step for step, points in pairs)
    builder.metric(
        "step_s", statistics.median(s for s, _ in pairs), "s", n=len(pairs), better="lower"
    )
    builder.metric(
        "points_s", statistics.median(p for _, p in pairs), "s", n=len(pairs), better="lower"
    )
    builder.metric("ratio", ratio, "1", n=len(pairs), better="lower")
    builder.metric("share_every_100", ratio / 100, "1", better="lower")
    builder.metric("every_within_2_pct", math.ceil(ratio / SHARE), "steps", better="lower")
    builder.metric("recording_bytes", recording_bytes, "bytes", better="lower")
    made = builder.finish(
        directory, status="completed", end_reason=f"{options.rounds} rounds in turn", exit_code=0
    )
    print({name: m.value for name, m in made.metrics.items()}, torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
