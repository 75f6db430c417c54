"""Memory that training adds to a process, as measured and as `stack train --dry-run` predicts it,
over sizes and variants.

    python benchmarks/memory.py [--only NAME ...] [--run-dir DIR]

Every configuration has a process of its own. It opens a real run on data that another process has
prepared, notes what is resident without the weights, and takes steps with gates; the most that was
resident from there on, less what was noted, is the measured figure. Linux only: the peak is reset
and read through /proc.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import child
from shapes import SHAPES, write_corpus
from side_by_side import close_record, facts, metric_key, open_record, write_json

LIMIT = 1.3
STEPS = 4
CORPUS_TOKENS = 200_000
PACKAGES = ("torch", "numpy")
SMALL, LARGE = SHAPES["a"], SHAPES["b"]
ROUTED = ("model.ffn.kind=moe", "model.ffn.n_experts=8", "model.ffn.top_k=2")
CONFIGURATIONS = {
    "shape a": (SMALL, ()),
    "shape b": (LARGE, ()),
    "shape b, half the rows at a time": (LARGE, ("train.micro_batch_size=4",)),
    "shape b, muon": (LARGE, ("optim.kind=muon", "optim.lr=2e-3", "optim.adamw_lr=2e-3")),
    "shape b, blocks recomputed": (LARGE, ("train.activation_checkpointing=blocks",)),
    "shape a, experts": (SMALL, ROUTED),
    "shape a, mixture of depths": (SMALL, ("model.depth.kind=mixture-of-depths",)),
    "shape a, differential attention": (SMALL, ("model.attention.kind=differential",)),
    "shape a, as GPT-2": (
        SMALL,
        ("model.positions.kind=learned", "model.norm.kind=layernorm", "model.ffn.kind=gelu"),
    ),
}


def configured(name: str, folder: Path):
    """The configuration and what was overridden, on a corpus of random tokens."""
    from stackproof.config import load_config
    from stackproof.recipes import recipe

    shape, sets = CONFIGURATIONS[name]
    corpus = write_corpus(folder, shape.vocab_size, CORPUS_TOKENS)
    return load_config(recipe("tiny"), sets=(*shape.sets(), *corpus, *sets, "train.max_steps=1000"))


def prepare(name: str, folder: Path) -> None:
    """Fill the cache, so that no tokenizing is counted as training."""
    import our_run

    cfg, overrides = configured(name, folder)
    our_run.open_run(cfg, overrides, folder / "prepared")


def used_bytes(name: str, folder: Path) -> dict[str, int]:
    """Measured and predicted peak of one configuration, bytes."""
    import our_run

    from stackproof.train.memory import predict_bytes

    cfg, overrides = configured(name, folder)
    run = our_run.open_run(cfg, overrides, folder / "run")
    predicted = predict_bytes(cfg, CONFIGURATIONS[name][0].vocab_size)
    before = child.status_bytes("VmRSS") - predicted["weights"]
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        our_run.gated_step(run)
    return {"measured": child.status_bytes("VmHWM") - before, "predicted": predicted["peak"]}


def measure(name: str) -> dict[str, int]:
    """What a process of its own says of a configuration, its data prepared by another."""
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as folder:
        for task in ("prepare", "measure"):
            arguments = ("--task", task, "--only", name, "--scratch", folder)
            process = child.Child(
                child.itself(*arguments), env={"STACKPROOF_CACHE": str(Path(folder) / "cache")}
            )
            process.close()
    return process.ready


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CONFIGURATIONS),
        default=list(CONFIGURATIONS),
        metavar="NAME",
    )
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", choices=("prepare", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        work = {"prepare": prepare, "measure": used_bytes}[options.task]
        return child.serve(
            lambda: (work(options.only[0], options.scratch) or {}, lambda question: {})
        )
    record = open_record(options, "memory of a training run, measured over predicted")
    found = {name: measure(name) for name in options.only}
    figures, outside = {}, []
    print(f"{'':36}{'measured MiB':>14}{'predicted MiB':>15}{'ratio':>8}")
    for name, used in found.items():
        ratio = used["measured"] / used["predicted"]
        print(
            f"{name:36}{used['measured'] / 2**20:>14.0f}{used['predicted'] / 2**20:>15.0f}"
            f"{ratio:>8.2f}"
        )
        key = metric_key(name)
        figures |= {f"{part}_bytes_{key}": (value, "bytes") for part, value in used.items()}
        figures[f"measured_over_predicted_{key}"] = (ratio, "1")
        outside += [name] if not 1 / LIMIT <= ratio <= LIMIT else []
    print(f"outside of {1 / LIMIT:.2f} … {LIMIT}: {', '.join(outside) or 'none'}")
    write_json(options.json, {"machine": facts(PACKAGES), "bytes": found})
    close_record(record, options.run_dir, [], figures)
    print(json.dumps(facts(PACKAGES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
