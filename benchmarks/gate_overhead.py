"""What the runtime gates cost: the same training steps with and without them, in turn,
in one process.

python benchmarks/gate_overhead.py [--device cpu|cuda] [--rounds 6] [--steps 12] [--run-dir DIR]
Writes a record of kind benchmark with the ratio of the medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from our_run import announce, bare_step, gated_step, open_run

from stackproof.config import load_config
from stackproof.recipes import recipe
from stackproof.spec.building import RecordBuilder
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.train.trainer import Trainer

CLAIM = "Median step time with all runtime gates over that without any, alternating in one process."
NOT_COVERED = (
    "preflight and artifact gates",
    "other model sizes; the cost per step does not depend on the size, the step does",
)


def timed_steps(run: Trainer, n: int, *, gated: bool) -> list[float]:
    """Seconds of `n` real training steps."""
    taken = []
    for _ in range(n):
        started = time.perf_counter()
        gated_step(run) if gated else bare_step(run)
        taken.append(time.perf_counter() - started)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    n_steps = 2 * (options.rounds + 1) * options.steps
    cfg, overrides = load_config(
        recipe("pocket"), sets=(f"train.max_steps={n_steps}", f"device={options.device}")
    )
    builder = RecordBuilder(
        kind="benchmark",
        spec=load_spec(),
        config=cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        overrides=overrides,
    )
    builder.command = ["python", "benchmarks/gate_overhead.py", *sys.argv[1:]]
    builder.environment = environment(options.device)
    directory = options.run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(cfg, overrides, Path(folder) / "run")
        medians: dict[bool, list[float]] = {True: [], False: []}
        for round_number in range(options.rounds + 1):
            for gated in (False, True):
                announce(run)
                taken = timed_steps(run, options.steps, gated=gated)
                if round_number:
                    medians[gated].append(statistics.median(taken))
                reset_positions(run)
    gate_s = sum(state.seconds for state in run.keeper.states.values()) / (
        (options.rounds + 1) * options.steps
    )
    ratio = statistics.median(a / b for a, b in zip(medians[True], medians[False]))
    builder.metric(
        "step_s_without_gates",
        statistics.median(medians[False]),
        "s",
        n=len(medians[False]),
        better="lower",
    )
    builder.metric(
        "step_s_with_gates",
        statistics.median(medians[True]),
        "s",
        n=len(medians[True]),
        better="lower",
    )
    builder.metric("ratio", ratio, "1", n=options.rounds, better="lower")
    builder.metric("gate_s_per_step", gate_s, "s", better="lower")
    builder.metric("gate_frac", gate_s / statistics.median(medians[False]), "1", better="lower")
    record = builder.finish(
        directory,
        status="completed",
        end_reason=f"{options.rounds} alternating rounds",
        exit_code=0,
    )
    print({name: m.value for name, m in record.metrics.items()}, torch.__version__)
    return 0


def reset_positions(run: Trainer) -> None:
    """Forget what the gates remember between blocks: blocks without gates leave holes
    that a run must not have.
    """
    for state in run.keeper.states.values():
        if hasattr(state.watcher, "cursor"):
            state.watcher.cursor = None
            state.watcher.recent.clear()


if __name__ == "__main__":
    sys.exit(main())
