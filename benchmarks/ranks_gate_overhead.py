"""What the runtime gates of a run on several ranks cost: the same training steps with and without
them, in turn, in the same processes.

    python benchmarks/ranks_gate_overhead.py [--ranks 2] [--recipe pocket] [--set a.b=v]...
        [--device cpu|cuda] [--rounds 9] [--run-dir DIR]

A block has `parallel.compare_every` steps, so that each block with gates holds one comparison of
the ranks. Also stated is the processor time of rank 0, which other work on the machine hardly
changes. The first block, in which rank 0 computes a step again, is stated apart: once_s is its
processor time beyond that of a later block. Wanted is a ratio of at most 1.01.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import child
from gate_overhead import reset_positions
from side_by_side import Row, against, alternate, close_record, open_record, show, spread

MAX_STEPS = 100_000
WITH, WITHOUT = "with gates", "without gates"
GOAL = 1 / 1.01


def contest(opened: ExitStack, options) -> tuple[dict, Callable[[dict], dict]]:
    """Open the run on this rank, and return how it answers `{"gated": …}`: one block."""
    import our_run
    import torch

    from stackproof.config import load_config
    from stackproof.recipes import recipe

    sets = (f"train.max_steps={MAX_STEPS}", f"device={options.device}", *options.sets)
    cfg, overrides = load_config(recipe(options.recipe), sets=sets)
    run = our_run.open_on_ranks(opened, cfg, overrides, options.folder / "run")
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    n_steps = cfg.parallel.compare_every

    def answer(question: dict) -> dict:
        step = our_run.gated_step if question["gated"] else our_run.bare_step
        our_run.announce(run)
        wait()
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(n_steps):
            step(run)
        wait()
        cpu_s = (time.process_time() - cpu_started) / n_steps
        step_s = (time.perf_counter() - started) / n_steps
        reset_positions(run)
        return {"step_s": step_s, "cpu_s": cpu_s, "steps": n_steps}

    return {}, answer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        with ExitStack() as opened:
            return child.serve(lambda: contest(opened, options))
    title = f"steps on {options.ranks} ranks with the runtime gates"
    record = open_record(options, title)
    answers: dict[str, list[dict]] = {WITH: [], WITHOUT: []}
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as folder:
        command = child.itself(*sys.argv[1:], "--folder", folder)
        team = child.Team(command, options.ranks, env=child.ALLOCATORS["heap-kept"])

        def rate(name: str) -> Callable[[], float]:
            def once() -> float:
                answers[name].append(team.ask(gated=name == WITH))
                return 1 / answers[name][-1]["step_s"]

            return once

        rates = alternate({name: rate(name) for name in answers}, options.rounds)
        team.close()
    goals = {WITHOUT: GOAL}
    rows = against(WITH, [Row(n, "steps/s", r, goal=goals.get(n)) for n, r in rates.items()])
    show(f"{title}, {options.rounds} rounds in turn", rows)
    first, *later = answers[WITH]
    cpu = {name: [a["cpu_s"] for a in own[1:]] for name, own in answers.items()}
    once_s = (first["cpu_s"] - statistics.median(a["cpu_s"] for a in later)) * first["steps"]
    wall = spread([b / a for a, b in zip(rates[WITH], rates[WITHOUT])])
    of_cpu = spread([a / b for a, b in zip(cpu[WITH], cpu[WITHOUT])])
    extra = {"once_s": (once_s, "s")}
    for name, found in (("step", wall), ("processor", of_cpu)):
        print(f"{name} time with / without: {found[0]:.4f} [{found[1]:.4f} – {found[2]:.4f}]")
        extra |= {f"{name}_ratio{p}": (v, "1") for p, v in zip(("", "_min", "_max"), found)}
    print(f"once, in the first {first['steps']} steps: {once_s:.2f} s of processor time")
    close_record(record, options.run_dir, rows, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
