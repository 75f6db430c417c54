"""Steps of a run on several ranks while a checkpoint is written behind them, and without one, in
turn, in the same processes.

    python benchmarks/ranks_checkpoint.py [--ranks 2] [--set a.b=v]... [--rounds 7] [--steps 20]
        [--folder DIR] [--run-dir DIR]

The recipe is tiny with about 400 MB of weights and moments, and `checkpoint.async_save = true`;
`--set` changes both. A block with a save begins with it: stall_s is the time until training goes
on, then the steps are timed, and behind_s is what the write takes after the last of them. With
async_save = false the stall is the whole save. No ratio is wanted.
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
from shapes import Shape, corpus_sets, write_corpus
from side_by_side import Row, against, alternate, close_record, open_record, show, spread

SHAPE = Shape(8, 512, 8, 8, 2048, seq_len=64, vocab_size=512, rows=2, fresh=False)
CORPUS_TOKENS, MAX_STEPS = 100_000, 100_000
SAVING, PLAIN = "while saving", "without a save"


def contest(opened: ExitStack, options) -> tuple[dict, Callable[[dict], dict]]:
    """Open the run on this rank, and return how it answers `{"saving": …}`: one block."""
    import our_run

    from stackproof.config import load_config
    from stackproof.recipes import recipe
    from stackproof.train import loop

    settings = (f"train.max_steps={MAX_STEPS}", "device=cpu", "checkpoint.async_save=true")
    sets = (*SHAPE.sets(), *corpus_sets(options.corpus), *settings, *options.sets)
    cfg, overrides = load_config(recipe("tiny"), sets=sets)
    run = our_run.open_on_ranks(opened, cfg, overrides, options.corpus / "run")
    our_run.gated_step(run)
    n_bytes = sum(p.numel() * 12 for p in run.state.model.parameters())

    def answer(question: dict) -> dict:
        started = time.perf_counter()
        if question["saving"]:
            loop.save(run)
        saved = time.perf_counter()
        for _ in range(options.steps):
            our_run.gated_step(run)
        trained = time.perf_counter()
        run.output.writer.wait()
        run.state.ranks.highest(0)  # rank 0 alone may write
        behind_s = time.perf_counter() - trained
        step_s = (trained - saved) / options.steps
        return {"stall_s": saved - started, "step_s": step_s, "behind_s": behind_s}

    return {"state_bytes": n_bytes}, answer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        with ExitStack() as opened:
            return child.serve(lambda: contest(opened, options))
    title = f"steps on {options.ranks} ranks while a checkpoint is written"
    record = open_record(options, title)
    answers: dict[str, list[dict]] = {SAVING: [], PLAIN: []}
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-", dir=options.folder) as name:
        write_corpus(Path(name), SHAPE.vocab_size, CORPUS_TOKENS)
        env = child.ALLOCATORS["heap-kept"] | {"STACKPROOF_CACHE": f"{name}/cache"}
        team = child.Team(child.itself(*sys.argv[1:], "--corpus", name), options.ranks, env=env)

        def rate(name: str) -> Callable[[], float]:
            def once() -> float:
                answers[name].append(team.ask(saving=name == SAVING))
                return 1 / answers[name][-1]["step_s"]

            return once

        rates = alternate({name: rate(name) for name in answers}, options.rounds)
        team.close()
    rows = against(SAVING, [Row(n, "steps/s", r) for n, r in rates.items()])
    n_bytes = team.ready["state_bytes"]
    show(f"{title}, {n_bytes / 1e6:.0f} MB, {options.rounds} rounds in turn", rows)
    extra = {"state_bytes": (n_bytes, "bytes")}
    for key in ("stall_s", "behind_s"):
        found = spread([a[key] for a in answers[SAVING][1:]])
        print(f"{key}: {found[0]:.3f} s [{found[1]:.3f} – {found[2]:.3f}]")
        extra |= {f"{key}{part}": (v, "s") for part, v in zip(("", "_min", "_max"), found)}
    step_s = {
        name: statistics.median(a["step_s"] for a in own[1:]) for name, own in answers.items()
    }
    extra |= {f"step_s_{name.replace(' ', '_')}": (v, "s") for name, v in step_s.items()}
    close_record(record, options.run_dir, rows, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
