"""Greedy generation at batch 1: tokens/s of ours, Hugging Face with either cache, litgpt,
and nanoGPT, which has none.

    python benchmarks/generation.py [--shape b] [--new 256] [--prompt 8]
        [--rounds 5] [--threads 1 2]

Random weights of the same shapes, float32; a model's choice of words does not change its speed.
nanoGPT's model has as many key/value heads as heads. Every contestant has a process of its own that
waits while another is timed; a ratio is taken within each round. Peers that cannot be imported are
left out, and their rows say so.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import child
from shapes import SHAPES, Shape
from side_by_side import (
    Contestant,
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    why_not,
    write_json,
)

Generate = Callable[[list[int], int], list[int]]
OURS = "ours"
PACKAGES = ("torch", "transformers", "litgpt")


def open_ours(shape: Shape) -> Generate:
    from shapes import SEED

    from stackproof.config import load_config
    from stackproof.evaluate.sampling import generate
    from stackproof.model.build import build_model
    from stackproof.recipes import recipe

    cfg, _ = load_config(recipe("tiny"), sets=shape.sets())
    model = build_model(cfg.model, shape.vocab_size, seed=SEED)
    return lambda ids, n_new: generate(model, ids, max_new_tokens=n_new, temperature=0.0)


def open_huggingface(shape: Shape, *, cache: str) -> Generate:
    import torch
    from peers import huggingface_model

    model = huggingface_model(shape).eval()

    def generate(ids: list[int], n_new: int) -> list[int]:
        ids_BT = torch.tensor([ids])
        out_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        return out_BT[0, len(ids) :].tolist()

    return generate


def open_litgpt(shape: Shape) -> Generate:
    import torch
    from litgpt.generate.base import generate as litgpt_generate
    from peers import litgpt_model

    model = litgpt_model(shape).eval()
    model.set_kv_cache(batch_size=1)

    def generate(ids: list[int], n_new: int) -> list[int]:
        out_T = litgpt_generate(
            model, torch.tensor(ids), len(ids) + n_new, temperature=0.0, include_prompt=False
        )
        return out_T.tolist()

    return generate


def open_nanogpt(shape: Shape) -> Generate:
    from nanogpt import generate
    from peers import nanogpt_model

    return partial(generate, nanogpt_model(shape).eval())


CONTESTANTS = [
    Contestant(OURS, "", open_ours),
    Contestant(
        "huggingface dynamic cache",
        "transformers",
        partial(open_huggingface, cache="dynamic"),
        goal=1.4,
    ),
    Contestant(
        "huggingface static cache",
        "transformers",
        partial(open_huggingface, cache="static"),
        goal=1.4,
    ),
    Contestant("litgpt", "litgpt", open_litgpt, goal=1.3),
    Contestant("nanogpt without cache", "", open_nanogpt),
]


def contest(
    name: str, shape: Shape, prompt: int, n_new: int
) -> tuple[dict, Callable[[dict], dict]]:
    """Make a contestant ready, and answer every question with the seconds of one
    generation on that many threads.
    """
    import torch

    generate = next(c for c in CONTESTANTS if c.name == name).open(shape)
    ids = torch.randint(
        shape.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1)
    ).tolist()

    def answer(question: dict) -> dict:
        torch.set_num_threads(question["threads"])
        started = time.perf_counter()
        new = generate(ids, n_new)
        taken = time.perf_counter() - started
        if len(new) != n_new:
            raise SystemExit(f"{name} gave {len(new)} tokens, not {n_new}")
        return {"seconds": taken}

    answer({"threads": 1})
    return {"tokens": n_new}, answer


def measure(options: argparse.Namespace) -> dict[int, list[Row]]:
    """Rows of all contestants by number of threads, those that cannot be imported included."""
    missing = {c.name: why_not(c.package) for c in CONTESTANTS}
    sizes = ("--shape", options.shape, "--prompt", str(options.prompt), "--new", str(options.new))
    processes: dict[str, child.Child] = {}
    try:
        for name in (n for n, reason in missing.items() if not reason):
            processes[name] = child.Child(child.itself("--contestant", name, *sizes))
        return {n: rows_of(processes, missing, n, options) for n in options.threads}
    finally:
        for process in processes.values():
            process.close()


def rows_of(
    processes: dict[str, child.Child],
    missing: dict[str, str],
    threads: int,
    options: argparse.Namespace,
) -> list[Row]:
    """All contestants on one number of threads."""
    rates = alternate(
        {n: partial(rate, p, options.new, threads) for n, p in processes.items()}, options.rounds
    )
    return against(
        OURS,
        [
            Row(c.name, "tokens/s", rates.get(c.name, ()), missing[c.name], goal=c.goal)
            for c in CONTESTANTS
        ],
    )


def rate(process: child.Child, n_new: int, threads: int) -> float:
    """One generation; new tokens/s."""
    return n_new / process.ask(threads=threads)["seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="b")
    parser.add_argument("--new", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--prompt", type=int, default=8, help="tokens that are given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--contestant", choices=[c.name for c in CONTESTANTS], help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.contestant:
        return child.serve(lambda: contest(options.contestant, shape, options.prompt, options.new))
    record = open_record(options, f"generation, shape {options.shape}, batch 1")
    found = measure(options)
    for threads, rows in found.items():
        title = (
            f"generation, shape {options.shape}, batch 1, {options.new} new tokens after "
            f"{options.prompt}"
        )
        show(
            f"{title}, {threads} thread{'s' * (threads > 1)}, {options.rounds} rounds in turn", rows
        )
    machine = facts(PACKAGES)
    print(f"\n{machine}")
    write_json(
        options.json,
        {"machine": machine, "threads": {t: as_json(rows) for t, rows in found.items()}},
    )
    every = [replace(r, name=f"{t} threads, {r.name}") for t, rows in found.items() for r in rows]
    close_record(record, options.run_dir, every, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
