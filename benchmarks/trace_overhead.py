"""What tracing costs: time and peak memory of a traced forward over those of the plain one, and
memory of a comparison of large models.

    python benchmarks/trace_overhead.py [--rounds 8] [--no-comparison] [--run-dir DIR]

The model is shape b of `shapes.py` (6 layers, d 256), batch 2, weights as they are initialised.
Each way of running has a process of its own, they take turns, and ratios are taken within each
round. Peak memory is what the process comes to need from before the model is built, with all
libraries imported.
The comparison is of two models of 28 layers and 105 million parameters that differ in one matrix.
Beside run, where they are installed, the plain forward of transformers' Llama of the same shape,
and TransformerLens with `run_with_cache` followed by the same statistics. Linux only: the peak is
reset and read through /proc.
"""

import argparse
import copy
import importlib
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import child
from shapes import SHAPES
from side_by_side import close_record, facts, open_record, spread, why_not, write_json

GOAL_TIME, GOAL_MEMORY = 1.35, 1.1
ROWS = 2
PACKAGES = ("torch", "transformers", "transformer-lens")
LENS, TRANSFORMERS = "TransformerLens run_with_cache", "transformers plain"
PEERS = {TRANSFORMERS: "transformers", LENS: "transformer_lens"}
LARGE = {
    "d_model": 512,
    "n_layers": 28,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 64,
    "d_ff": 1408,
    "max_seq_len": 256,
}
LARGE_VOCAB = 32_000


def ready(task: str, threads: int, folder: str):
    """Build the model, and what answers each question with the seconds of one forward and
    the peak of memory by then.
    """
    import torch
    from peers import huggingface_model

    from stackproof.config import ModelConfig
    from stackproof.model.build import build_model
    from stackproof.trace import trace

    torch.set_num_threads(threads)
    shape = SHAPES["b"]
    ids = torch.randint(
        0, shape.vocab_size, (ROWS, shape.seq_len), generator=torch.Generator().manual_seed(0)
    )
    # a library imports what it needs when it is first asked for it,
    # which is not the memory of a forward
    if task in PEERS:
        importlib.import_module(PEERS[task])
        huggingface_model(
            replace(shape, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, vocab_size=64)
        )
    before = child.status_bytes("VmRSS")
    if task == LENS:
        once = lens(ids, folder)
    elif task == TRANSFORMERS:
        peer = huggingface_model(shape).eval()
        once = torch.no_grad()(lambda: peer(ids, use_cache=False))
    else:
        sizes = {
            k: getattr(shape, k) for k in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        }
        cfg = ModelConfig(
            **sizes, head_dim=shape.d_model // shape.n_heads, max_seq_len=shape.seq_len
        )
        model = build_model(cfg, shape.vocab_size, seed=0).eval()
        once = torch.no_grad()(lambda: model(ids)) if task == "plain" else lambda: trace(model, ids)
    Path("/proc/self/clear_refs").write_text("5")

    def answer(question: dict) -> dict:
        started, used = time.perf_counter(), time.process_time()
        once()
        return {
            "wall_s": time.perf_counter() - started,
            "processor_s": time.process_time() - used,
            "peak_bytes": child.status_bytes("VmHWM") - before,
        }

    return {"task": task}, answer


def lens(ids, folder: str):
    """The peer, from a folder of `hf_folder`: every value kept, then the same statistics of it."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from stackproof.trace.points import Point
    from stackproof.trace.stats import Gatherer

    model = TransformerBridge.boot_transformers(folder, device="cpu")

    def once():
        with torch.no_grad():
            _, cache = model.run_with_cache(ids)
        gatherer = Gatherer()
        for i, (name, x) in enumerate(cache.items()):
            if x.is_floating_point() and x.ndim >= 2:
                gatherer.see(Point(name, None, name, i), x if x.ndim > 2 else x[None])
        return gatherer.finish()

    return once


def hf_folder() -> str:
    """A folder with the peer's model of the same shape."""
    import tempfile

    from peers import huggingface_model
    from tokenizers import Tokenizer, models

    folder = tempfile.mkdtemp(prefix="stackproof-lens-")
    huggingface_model(SHAPES["b"]).save_pretrained(folder)
    # it wants a tokenizer, of which nothing is read
    words = {f"w{i}": i for i in range(SHAPES["b"].vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(Path(folder) / "tokenizer.json"))
    return folder


def comparison(threads: int):
    """Compare two large models in this process; answer with its peak beyond both models
    and a plain forward of one.
    """
    import torch

    from stackproof.config import ModelConfig
    from stackproof.model.build import build_model, n_parameters
    from stackproof.trace import compare, variant
    from stackproof.trace.trace import trace

    torch.set_num_threads(threads)
    good = build_model(ModelConfig(**LARGE), LARGE_VOCAB, seed=0).eval()
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.layers[17].ffn.up.weight[5] += 0.1
    ids = torch.randint(
        0, LARGE_VOCAB, (1, LARGE["max_seq_len"]), generator=torch.Generator().manual_seed(0)
    )
    kept = sum(t.stat.n * 4 for t in trace(good, ids).points)
    Path("/proc/self/clear_refs").write_text("5")
    resident = child.status_bytes("VmRSS")
    with torch.no_grad():
        good(ids)
    forward = child.status_bytes("VmHWM") - resident
    Path("/proc/self/clear_refs").write_text("5")
    resident, started = child.status_bytes("VmRSS"), time.perf_counter()
    found = compare(variant(good), variant(bad), ids)
    document = {
        "n_params": n_parameters(good),
        "points": len(found.points),
        "kept_bytes": kept,
        "forward_bytes": forward,
        "comparison_bytes": child.status_bytes("VmHWM") - resident,
        "wall_s": time.perf_counter() - started,
        "named": found.first_divergence.point.name,
        "suspects": len(found.suspects),
    }
    return document, lambda question: {}


def turns(tasks: list[str], rounds: int, threads: int, folder: str) -> dict[str, list[dict]]:
    """Answers of every way of running, in turn, the first thrown away."""
    children = {
        t: child.Child(child.itself("--task", t, "--threads", str(threads), "--folder", folder))
        for t in tasks
    }
    answers: dict[str, list[dict]] = {t: [] for t in tasks}
    for number in range(rounds + 1):
        for task, process in children.items():
            answer = process.ask(go=True)
            answers[task] += [answer] if number else []
    for process in children.values():
        process.close()
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-comparison", action="store_true")
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        if options.task == "comparison":
            return child.serve(lambda: comparison(options.threads))
        return child.serve(lambda: ready(options.task, options.threads, options.folder))
    record = open_record(options, "a traced forward over a plain one")
    missing = {task: reason for task, package in PEERS.items() if (reason := why_not(package))}
    folder = "" if LENS in missing else hf_folder()
    answers = turns(
        ["plain", "traced", *(task for task in PEERS if task not in missing)],
        options.rounds,
        options.threads,
        folder,
    )
    figures = {}
    for task, measured in answers.items():
        for key, unit in (("wall_s", "s"), ("processor_s", "s"), ("peak_bytes", "bytes")):
            middle, low, high = spread([m[key] for m in measured])
            ratio, least, most = spread(
                [m[key] / p[key] for m, p in zip(measured, answers["plain"])]
            )
            print(
                f"{task:32} {key:12} {middle:12.4g} [{low:.4g} – {high:.4g}]  ÷ plain {ratio:.2f} "
                f"[{least:.2f} – {most:.2f}]"
            )
            name = task.split()[0].lower()
            figures |= {f"{key}_{name}": (middle, unit), f"{key}_{name}_over_plain": (ratio, "1")}
    for task, reason in missing.items():
        print(f"{task:32} {reason}")
    print(f"wanted of traced ÷ plain: time ≤ {GOAL_TIME}, peak memory ≤ {GOAL_MEMORY}")
    if not options.no_comparison:
        process = child.Child(
            child.itself("--task", "comparison", "--threads", str(options.threads))
        )
        process.close()
        compared = process.ready
        print(f"comparison of two models: {compared}")
        figures |= {
            f"comparison_{k}": (v, "bytes" if k.endswith("bytes") else "1")
            for k, v in compared.items()
            if not isinstance(v, str)
        }
    write_json(options.json, {"machine": facts(PACKAGES), "answers": answers})
    close_record(record, options.run_dir, [], figures)
    print(
        f"median of {statistics.median([len(a) for a in answers.values()]):.0f} rounds, "
        f"{facts(PACKAGES)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
