"""Training steps on several ranks: ours, a plain DDP script and a plain FSDP2 script, in turn.

    python benchmarks/ranks_training.py [--shape a|b|llama-370m] [--ranks 2] [--device cpu|cuda]
        [--compiled] [--rounds 9] [--steps 10] [--only …] [--run-dir DIR]

All compute with one model, ours, with its kernels and its loss, so that only what is around them
differs: reductions, clipping, optimizer, data, log and gates. A step is forward, backward, clipping
to 1.0 and fused AdamW. Ours is the real run on a mesh: reader, step, runtime gates and those of
distributed, log line, the exchange of signals. Its first steps, one of which rank 0 computes again,
are not timed. The peers repeat a few batches of random tokens that they hold, and look at nothing.
Each rank has one thread on a CPU, one device on a GPU. All heaps are kept, as a run of ours does by
itself. With `--compiled` all compile each block.

A contestant is a team of processes that lives through all rounds, of the larger shapes for one
round. Teams take turns, and a ratio is taken within each round. The interval is that of the median
ratio, of 95 % at least, from the order of the rounds' ratios. Processor time is that of rank 0.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import comb
from pathlib import Path

import child
from shapes import SHAPES, corpus_sets, write_corpus
from side_by_side import (
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    metric_key,
    open_record,
    show,
    write_json,
)

OURS = "ours, shard"
MESHES = {OURS: {}, "ours, replicate": {"parallel.replicate": 0}}
PEERS = ("ddp", "fsdp2")
GOAL = 0.97
WARM_STEPS = 3
CORPUS_TOKENS = 400_000
MAX_STEPS = 100_000
PACKAGES = ("torch", "numpy")


# ---- what a rank does


def configuration(options, *sets: str):
    """The configuration of a run of this shape, and its overrides."""
    from peers import LR, MAX_GRAD_NORM

    from stackproof.config import load_config
    from stackproof.recipes import recipe

    settings = (
        f"device={options.device}",
        f"train.max_steps={MAX_STEPS}",
        f"train.compile={str(options.compiled).lower()}",
        f"optim.lr={LR}",
        f"optim.max_grad_norm={MAX_GRAD_NORM}",
    )
    shape = SHAPES[options.shape]
    corpus = corpus_sets(options.folder)
    return load_config(recipe("tiny"), sets=(*shape.sets(), *corpus, *settings, *sets))


def open_ours(opened: ExitStack, mesh: dict[str, int], options) -> Callable[[], None]:
    """A step of `stack train` on this rank, with what its loop does after one."""
    import our_run

    from stackproof.train.signals import Requests

    sets = [f"{key}={size or options.ranks}" for key, size in mesh.items()]
    cfg, overrides = configuration(options, *sets)
    folder = options.folder / metric_key(options.contestant)
    run, requests = our_run.open_on_ranks(opened, cfg, overrides, folder), Requests()

    def step() -> None:
        our_run.gated_step(run)
        run.callbacks.on_step_end(run, run.report)
        requests.agree(run.state.ranks)

    return step


def open_peer(opened: ExitStack, options) -> Callable[[], None]:
    """A step of a plain script on this rank: our model in DDP, or each of its blocks and the whole
    in FSDP2.
    """
    import peers
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from stackproof.model.build import build_model
    from stackproof.train.device import kernels_of

    shape, device = SHAPES[options.shape], torch.device(options.device)
    cfg, _ = configuration(options)
    opened.enter_context(kernels_of(cfg, device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    opened.callback(dist.destroy_process_group)
    trained = peers.WithLoss(build_model(cfg.model, shape.vocab_size, seed=1, device=device))
    if options.compiled:
        for block in trained.model.layers:
            block.compile(fullgraph=True)
    match options.contestant:
        case "ddp":
            ids = [torch.cuda.current_device()] if options.device == "cuda" else None
            forward = DistributedDataParallel(
                trained, ids, gradient_as_bucket_view=True, static_graph=True
            )
        case "fsdp2":
            for block in trained.model.layers:
                fully_shard(block)
            forward = fully_shard(trained)
    return peers.update(forward, forward, shape, options.device, shape.rows // options.ranks)


def contest(opened: ExitStack, options) -> tuple[dict, Callable[[dict], dict]]:
    """Make a rank of a contestant ready, and return how it answers `{"steps": n}`."""
    import torch

    from stackproof.distributed.process_group import device_of_rank

    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(device_of_rank())
    mesh = MESHES.get(options.contestant)
    step = open_peer(opened, options) if mesh is None else open_ours(opened, mesh, options)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    for _ in range(WARM_STEPS):
        step()

    def answer(question: dict) -> dict:
        wait()
        started, cpu_started, n = time.perf_counter(), time.process_time(), question["steps"]
        for _ in range(n):
            step()
        wait()
        cpu_s = time.process_time() - cpu_started
        return {"step_s": (time.perf_counter() - started) / n, "cpu_s": cpu_s / n}

    return {}, answer


# ---- the measurement


def interval(ratios: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics between which the median lies with this confidence at least, or the least
    and the most if there are too few.
    """
    n, ordered = len(ratios), sorted(ratios)
    outside, k = 0.0, 0
    while k < n // 2 and outside + comb(n, k) / 2**n <= (1 - confidence) / 2:
        outside += comb(n, k) / 2**n
        k += 1
    low = max(0, k - 1)
    return ordered[low], ordered[n - 1 - low]


def measure(
    options: argparse.Namespace,
) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """Tokens/s of every contestant in every round, by the mean step, so that a comparison of ranks
    or a log line counts; and the median processor time that a step takes on rank 0, s, which other
    work on the machine hardly changes.
    """
    shape, teams, cpu_s = SHAPES[options.shape], {}, {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as folder:
        write_corpus(Path(folder), shape.vocab_size, CORPUS_TOKENS)
        env = child.ALLOCATORS["heap-kept"] | {"STACKPROOF_CACHE": f"{folder}/cache"}
        given = child.itself("--shape", options.shape, "--device", options.device)
        given += ["--ranks", str(options.ranks), *["--compiled"][: options.compiled]]
        given += ["--folder", folder]

        def rate(name: str) -> float:
            if name not in teams:
                command = [*given, "--contestant", name]
                teams[name] = child.Team(command, options.ranks, env=env)
            answer = teams[name].ask(steps=options.steps)
            cpu_s[name].append(answer["cpu_s"])
            if shape.fresh:
                teams.pop(name).close()
            return shape.tokens_per_step / answer["step_s"]

        try:
            once = {n: partial(rate, n) for n in options.only}
            rates = alternate(once, options.rounds, thrown_away=0 if shape.fresh else 1)
            return rates, {n: statistics.median(own) for n, own in cpu_s.items()}
        finally:
            for team in teams.values():
                team.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*MESHES, *PEERS]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="compile each block, of all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--contestant", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.contestant:
        with ExitStack() as opened:
            return child.serve(lambda: contest(opened, options))
    title = f"training on {options.ranks} ranks, shape {options.shape}"
    title += ", compiled" if options.compiled else ""
    record = open_record(options, title)
    rates, cpu_s = measure(options)
    rows, extra = [], {f"cpu_s_{metric_key(n)}": (s, "s") for n, s in cpu_s.items()}
    for ours in (n for n in MESHES if n in rates):
        peers_rates = {n: r for n, r in rates.items() if n in PEERS}
        found = against(
            ours,
            [
                Row(n, "tokens/s", r, goal=GOAL)
                for n, r in ({ours: rates[ours]} | peers_rates).items()
            ],
        )
        show(f"{title}, {options.device}, {options.rounds} rounds in turn", found)
        for row in found[1:]:
            ends = interval([a / b for a, b in zip(rates[ours], row.rates)])
            key = f"{metric_key(ours)}_over_{metric_key(row.name)}"
            print(f"  {key}: {row.ratio[0]:.3f}, 95 % interval {ends[0]:.3f} – {ends[1]:.3f}")
            print(f"    processor time {cpu_s[row.name] / cpu_s[ours]:.3f}")
            extra |= {key: (row.ratio[0], "1")}
            extra |= {f"{key}_{end}": (v, "1") for end, v in zip(("low", "high"), ends)}
        rows = rows or found
    machine = facts(PACKAGES)
    print(machine)
    write_json(options.json, {"machine": machine, "rows": as_json(rows), "figures": extra})
    close_record(record, options.run_dir, rows, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
