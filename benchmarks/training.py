"""Training steps of ours, Hugging Face, litgpt and nanoGPT's recipe: tokens/s, memory, share of the
machine's matrix-product rate.

    python benchmarks/training.py [--shape a|b|llama-370m] [--device cpu|cuda] [--allocator
        shipped|heap-kept] [--rounds 5] [--only …]

A step is forward, backward, clipping to 1.0 and fused AdamW on random tokens. Ours is the real run:
reader, step, runtime gates, log line. Shape a: 4 layers of 128, context 256, vocabulary 512, 16
rows. Shape b: 6 layers of 256, 8 heads of which 2 hold keys and values, context 512, vocabulary
32,000, 8 rows. Both are float32. Shape llama-370m, for a GPU: the recipe's sizes, 16 rows of 2048,
bfloat16 by autocast. nanoGPT's model has as many key/value heads as heads, and two matrices of 4·d
in place of three of 3·d; its own count of operations is used. Every contestant has a process of its
own; processes take turns, and a ratio is taken within each round. On the larger shapes a process
lives for one round, as together they would not fit into memory.

Memory is the most that was ever resident in the process, on a GPU the most that was ever allocated
there. The allocator is C's, as shipped or told from outside to keep its heap; it decides how often
pages come fresh from the system, and that is measured too. A run of ours tells it so itself, so
that with `shipped` only the peers' heaps are returned. Peers that cannot be imported are left out,
and their rows say so.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import child
from shapes import SHAPES, Shape, write_corpus
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
    spread,
    why_not,
    write_json,
)

OURS = "ours"
PACKAGE = {"ours": "", "huggingface": "transformers", "litgpt": "litgpt", "nanogpt": ""}
VARIANTS = {
    f"{name}{kind}": package for name, package in PACKAGE.items() for kind in ("", " compiled")
}
PACKAGES = ("torch", "transformers", "litgpt", "numpy")
STEPS = {"a": 10, "b": 3, "llama-370m": 5}
PROBED = {"cpu": 1024, "cuda": 8192}
# (shape, allocator) -> least wanted ratio of our rate to a peer's, the peer eager
GOALS = {
    ("a", "shipped"): {"huggingface": 1.1, "nanogpt": 1.0},
    ("b", "shipped"): {"huggingface": 1.5, "litgpt": 1.25, "nanogpt": 1.3},
    ("b", "heap-kept"): {"huggingface": 1.1, "litgpt": 1.1, "nanogpt": 1.1},
    ("llama-370m", "shipped"): {
        "huggingface compiled": 1.15,
        "litgpt": 1.05,
        "litgpt compiled": 1.05,
    },
}
WARM_STEPS = 2
CORPUS_TOKENS = 400_000
MAX_STEPS = 100_000


# ---- what the process of a contestant does


def open_ours(
    shape: Shape, folder: Path, compiled: bool, device: str
) -> tuple[Callable[[], None], int]:
    """Our step and the number of matrix parameters."""
    import our_run
    from peers import LR, MAX_GRAD_NORM, matrix_parameters

    from stackproof.config import load_config
    from stackproof.recipes import recipe

    settings = (
        f"device={device}",
        f"train.max_steps={MAX_STEPS}",
        f"train.compile={str(compiled).lower()}",
        f"optim.lr={LR}",
    )
    sets = (
        *shape.sets(),
        *write_corpus(folder, shape.vocab_size, CORPUS_TOKENS),
        *settings,
        f"optim.max_grad_norm={MAX_GRAD_NORM}",
    )
    cfg, overrides = load_config(recipe("tiny"), sets=sets)
    run = our_run.open_run(cfg, overrides, folder / "run")

    def step() -> None:
        our_run.gated_step(run)
        run.callbacks.on_step_end(run, run.report)

    return step, matrix_parameters(run.state.model)


def open_peer(
    name: str, shape: Shape, compiled: bool, device: str
) -> tuple[Callable[[], None], int]:
    """A peer's step and the number of matrix parameters."""
    import peers

    makers = {
        "huggingface": (peers.huggingface_model, peers.huggingface_loss),
        "litgpt": (peers.litgpt_model, peers.litgpt_loss),
        "nanogpt": (peers.nanogpt_model, peers.nanogpt_loss),
    }
    make, loss_of = makers[name]
    model = make(shape).train().to(device)
    return peers.update(model, loss_of(model, compiled), shape, device), peers.matrix_parameters(
        model
    )


def contest(
    variant: str, shape: Shape, threads: int, device: str, folder: Path
) -> tuple[dict, Callable[[dict], dict]]:
    """Make a contestant ready and return what it says of itself,
    and how it answers `{"steps": n}`.
    """
    import torch

    torch.set_num_threads(threads)
    name, compiled = variant.split()[0], variant.endswith("compiled")
    step, matrices = (
        open_ours(shape, folder, compiled, device)
        if name == OURS
        else open_peer(name, shape, compiled, device)
    )
    wait, peak_bytes = torch.cuda.synchronize, torch.cuda.max_memory_allocated
    if device == "cpu":
        wait, peak_bytes = (lambda: None), partial(child.status_bytes, "VmHWM")
    built_bytes = child.status_bytes("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    started = time.perf_counter()
    for _ in range(WARM_STEPS):
        step()
    wait()
    ready = {
        "matrix_parameters": matrices,
        "built_bytes": built_bytes,
        "warm_s": time.perf_counter() - started,
    }

    def answer(question: dict) -> dict:
        before, step_s = child.fresh_bytes(), []
        for _ in range(question["steps"]):
            started = time.perf_counter()
            step()
            wait()
            step_s.append(time.perf_counter() - started)
        fresh = (child.fresh_bytes() - before) / question["steps"]
        return {"step_s": step_s, "peak_bytes": peak_bytes(), "fresh_bytes_per_step": fresh}

    return ready, answer


# ---- the measurement


@dataclass
class Seat:
    """A contestant and what its rounds brought.
    `kept` says whether its process lives on between two rounds.
    """

    variant: str
    command: list[str]
    env: dict[str, str]
    shape: Shape
    steps: int
    kept: bool
    process: child.Child | None = None
    ready: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)

    def once(self) -> float:
        """One round; tokens/s at the median step."""
        if self.process is None:
            self.process = child.Child(self.command, env=self.env)
            self.ready.append(self.process.ready)
        self.answers.append(self.process.ask(steps=self.steps))
        if not self.kept:
            self.close()
        return self.shape.tokens_per_step / statistics.median(self.answers[-1]["step_s"])

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def peak_bytes(self) -> float:
        return statistics.median(a["peak_bytes"] for a in self.answers)

    def fresh_bytes(self) -> float:
        return statistics.median(a["fresh_bytes_per_step"] for a in self.answers)

    def flops_per_step(self) -> int:
        return self.shape.flops_per_step(self.ready[0]["matrix_parameters"])


def product_rates(threads: int, device: str, dtype: str) -> Callable[[], tuple[float, float]]:
    """Probe of the machine: GFLOP/s of square products in the type that is trained in, by torch and
    by our kernel of choice (on a GPU torch's too), each the best of a third of a second.
    """
    import torch

    from stackproof.kernels import dispatch

    torch.set_num_threads(threads)
    size = PROBED[device]
    a = torch.rand(size, size, device=device, dtype=getattr(torch, dtype))

    def probe(multiply: Callable) -> float:
        best, end = 0.0, time.perf_counter() + 0.33
        while (started := time.perf_counter()) < end:
            float(multiply(a, a)[0, 0])  # the number is fetched, so the product is over
            best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
        return best

    return lambda: (probe(torch.mm), probe(dispatch.linear))


def measure(
    options: argparse.Namespace, missing: dict[str, str]
) -> tuple[dict[str, Seat], dict[str, tuple[float, ...]], list[tuple[float, float]]]:
    """Seats, rates by contestant, and the probed rates before, between and after."""
    shape, probes = SHAPES[options.shape], []
    probe = product_rates(options.threads, options.device, shape.dtype)
    steps = options.steps or STEPS[options.shape]

    def looked_at(seat: Seat) -> Callable[[], float]:
        def once() -> float:
            probes.append(probe())
            return seat.once()

        return once

    with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as cache:
        env = child.ALLOCATORS[options.allocator] | {"STACKPROOF_CACHE": cache}
        seats = {}
        for variant in (v for v, reason in missing.items() if not reason):
            command = child.itself(
                "--contestant", variant, "--shape", options.shape, "--threads", str(options.threads)
            )
            command += ["--device", options.device]
            seats[variant] = Seat(variant, command, env, shape, steps, kept=not shape.fresh)
        try:
            rates = alternate(
                {v: looked_at(s) for v, s in seats.items()},
                options.rounds,
                thrown_away=0 if shape.fresh else 1,
            )
        finally:
            for seat in seats.values():
                seat.close()
    probes.append(probe())
    return seats, rates, probes


def figures(
    seats: dict[str, Seat], rates: dict[str, tuple[float, ...]], probes: list[tuple[float, float]]
) -> dict[str, tuple[float, str]]:
    """Everything besides the rates: memory and its ratio theirs / ours, fresh pages, share of the
    probed rates, time to the first steps.
    """
    by_torch, by_choice = zip(*probes)
    named = {"probe": by_torch, "probe_chosen": by_choice}
    found = {
        f"{n}_{part}": (v, "GFLOP/s")
        for n, p in named.items()
        for part, v in zip(("median", "min", "max"), spread(p))
    }
    for variant, seat in seats.items():
        key, rate = metric_key(variant), statistics.median(rates[variant])
        flops_per_s = seat.flops_per_step() * rate / seat.shape.tokens_per_step
        found[f"probe_frac_{key}"] = (flops_per_s / 1e9 / statistics.median(by_torch), "1")
        found[f"probe_chosen_frac_{key}"] = (flops_per_s / 1e9 / statistics.median(by_choice), "1")
        found[f"built_bytes_{key}"] = (seat.ready[0]["built_bytes"], "bytes")
        found[f"peak_bytes_{key}"] = (seat.peak_bytes(), "bytes")
        found[f"fresh_bytes_per_step_{key}"] = (seat.fresh_bytes(), "bytes")
        found[f"warm_s_{key}"] = (seat.ready[0]["warm_s"], "s")
        if OURS in seats and variant != OURS:
            found[f"memory_ratio_{key}"] = (seat.peak_bytes() / seats[OURS].peak_bytes(), "1")
    return found


def show_figures(seats: dict[str, Seat], found: dict[str, tuple[float, str]]) -> None:
    """Print what the table of rates does not hold."""
    print(
        "\n"
        f"{'':24}{'GFLOP/step':>11}{'of torch':>10}{'of chosen':>10}{'built GB':>10}{'peak GB':>9}",
        end="",
    )
    print(f"{'/ ours':>8}{'fresh MB/step':>15}{'first steps s':>15}")
    for variant, seat in seats.items():
        key = metric_key(variant)
        ratio = found.get(f"memory_ratio_{key}", (1.0, ""))[0]
        names = (
            "probe_frac",
            "probe_chosen_frac",
            "built_bytes",
            "peak_bytes",
            "fresh_bytes_per_step",
            "warm_s",
        )
        share, of_chosen, built, peak, fresh, warm = (found[f"{n}_{key}"][0] for n in names)
        print(
            f"{variant:24}{seat.flops_per_step() / 1e9:>11.1f}{share:>10.2f}{of_chosen:>10.2f}"
            f"{built / 1e9:>10.2f}{peak / 1e9:>9.2f}",
            end="",
        )
        print(f"{ratio:>8.2f}{fresh / 1e6:>15.1f}{warm:>15.1f}")
    for name, key in (("torch", "probe"), ("kernel of choice", "probe_chosen")):
        rates = (found[f"{key}_{p}"][0] for p in ("median", "min", "max"))
        print("probed matrix products, {}: {:.0f} GFLOP/s [{:.0f} – {:.0f}]".format(name, *rates))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--device", choices=sorted(PROBED), default="cpu")
    parser.add_argument("--allocator", choices=sorted(child.ALLOCATORS), default="shipped")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps",
        type=int,
        help=(
            "timed steps of one contestant in one round; 10 of shape a, 3 of shape b, 5 of "
            "llama-370m"
        ),
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--contestant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.contestant:
        with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as folder:
            shape = SHAPES[options.shape]
            return child.serve(
                lambda: contest(
                    options.contestant, shape, options.threads, options.device, Path(folder)
                )
            )
    record = open_record(options, f"training shape {options.shape}, allocator {options.allocator}")
    missing = {v: why_not(VARIANTS[v]) for v in dict.fromkeys((OURS, *options.only))}
    seats, rates, probes = measure(options, missing)
    goals = GOALS.get((options.shape, options.allocator), {})
    rows = against(
        OURS,
        [
            Row(v, "tokens/s", rates.get(v, ()), reason, goal=goals.get(v))
            for v, reason in missing.items()
        ],
    )
    title = f"training, shape {options.shape}, allocator {options.allocator}"
    show(
        f"{title}, {options.device}, {options.threads} threads, {options.rounds} rounds in turn",
        rows,
    )
    found = figures(seats, rates, probes)
    show_figures(seats, found)
    machine = facts(PACKAGES)
    print(machine)
    write_json(
        options.json,
        {"machine": machine, "rows": as_json(rows), "figures": found, "probes": probes},
    )
    close_record(record, options.run_dir, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
