"""Writing and reading the state of a run: ours with every hash, `torch.save` and safetensors
without, all with fsync, in turn.

    python benchmarks/checkpoint.py [--megabytes 400] [--rounds 7] [--folder DIR] [--json PATH]

The state is that of a real run after one update: weights and both moments, float32. Ours writes a
folder, hashes each file and tensor, syncs, renames, compares what lies on the disk with what was
meant, and moves the pointer; the peers write one file and sync it. Written behind training, the
same waits only for a copy and for checksums of the live tensors: that row is no saving, but what it
stalls. Ours reads with every hash verified; the peers verify nothing, and safetensors only maps the
file: a second row sums its tensors, so that they are read. All reads come from the page cache. MB
are 10^6 bytes of tensors. Read the ratios; the rates are those of one disk in one hour.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import our_run
import torch
from shapes import Shape, write_corpus
from side_by_side import (
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    write_json,
)
from torch import Tensor

from stackproof import tensorfile
from stackproof.config import load_config
from stackproof.recipes import recipe
from stackproof.train import checkpoint
from stackproof.train.state import TrainState, live_crc32

OURS_SAVE, OURS_LOAD = "ours: save", "ours: load, verified"
OURS_BEHIND = "ours: behind, until training goes on"
SAVE_GOAL = 0.9
LOAD_GOAL_GB_S = 1.0
D_MODEL, D_FF = 512, 2048
BYTES_PER_PARAMETER = 12  # weight and two moments, float32
PACKAGES = ("torch", "safetensors", "numpy")


def open_state(megabytes: float, folder: Path) -> tuple[TrainState, dict]:
    """The state of a run after one update, of about that size, and its document."""
    n_layers = max(
        1, round(megabytes * 1e6 / BYTES_PER_PARAMETER / (4 * D_MODEL**2 + 3 * D_MODEL * D_FF))
    )
    shape = Shape(n_layers, D_MODEL, 8, 8, D_FF, seq_len=64, vocab_size=512, rows=1, fresh=False)
    cfg, overrides = load_config(
        recipe("tiny"), sets=(*shape.sets(), *write_corpus(folder, shape.vocab_size, 100_000))
    )
    run = our_run.open_run(cfg, overrides, folder / "run")
    our_run.bare_step(run)
    tokenizer = run.dataset.tokenizer
    document = checkpoint.state_document(
        run.state,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        gates={},
        record=run.output.record.id,
    )
    return run.state, document


def timed(work: Callable[[], object], size: int, unit: float) -> Callable[[], float]:
    """What one round does; returns bytes per second in `unit`."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return size / (time.perf_counter() - started) / unit

    return once


def savers(
    state: TrainState, document: dict, tensors: dict[str, Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    """Ways of writing the same tensors; each begins without what it wrote before."""
    import safetensors.torch

    def ours() -> None:
        checkpoint.save(folder / "ours", state, document)

    def behind() -> None:
        checkpoint.capture(state, document, copied=True)
        live_crc32(state)

    def torch_save() -> None:
        torch.save(tensors, folder / "torch.pt")
        tensorfile.sync(folder / "torch.pt")

    def safetensors_save() -> None:
        safetensors.torch.save_file(tensors, folder / "peer.safetensors")
        tensorfile.sync(folder / "peer.safetensors")

    return {
        OURS_SAVE: ours,
        OURS_BEHIND: behind,
        "torch.save + fsync": torch_save,
        "safetensors save_file + fsync": safetensors_save,
    }


def loaders(folder: Path) -> dict[str, Callable[[], object]]:
    """Ways of reading them back into memory."""
    import safetensors.torch

    def touched(tensors: dict[str, Tensor]) -> float:
        return sum(float(t.sum()) for t in tensors.values())

    return {
        OURS_LOAD: lambda: checkpoint.load(checkpoint.find(folder / "ours")),
        "torch.load": lambda: torch.load(folder / "torch.pt", weights_only=True),
        "safetensors load_file, mapped": lambda: safetensors.torch.load_file(
            folder / "peer.safetensors"
        ),
        "safetensors load_file, summed": lambda: touched(
            safetensors.torch.load_file(folder / "peer.safetensors")
        ),
    }


def without_earlier(work: Callable[[], float], folder: Path) -> Callable[[], float]:
    """The same on an empty disk: what earlier rounds wrote is gone before the clock starts."""

    def once() -> float:
        for path in folder.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return work()

    return once


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the disk that is to be measured; default: the temporary folder's",
    )
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = open_record(options, "checkpoints")
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-", dir=options.folder) as name:
        folder = Path(name)
        os.environ["STACKPROOF_CACHE"] = str(folder / "cache")
        state, document = open_state(options.megabytes, folder)
        tensors = {n: t for file in checkpoint.tensors_of(state).values() for n, t in file.items()}
        size = sum(t.nbytes for t in tensors.values())
        target = folder / "written"
        target.mkdir()
        work = savers(state, document, tensors, target)
        saved = alternate(
            {n: without_earlier(timed(w, size, 1e6), target) for n, w in work.items()},
            options.rounds,
        )
        for write in work.values():
            write()
        loaded = alternate(
            {n: timed(w, size, 1e9) for n, w in loaders(target).items()}, options.rounds
        )
    goals = {"torch.save + fsync": SAVE_GOAL}
    saving = against(OURS_SAVE, [Row(n, "MB/s", r, goal=goals.get(n)) for n, r in saved.items()])
    loading = against(OURS_LOAD, [Row(n, "GB/s", r) for n, r in loaded.items()])
    show(
        f"saving {size / 1e6:.0f} MB in {len(tensors)} tensors, {options.rounds} rounds in turn",
        saving,
    )
    show(f"loading them from the page cache, {options.rounds} rounds in turn", loading)
    reached = (
        "reached"
        if sorted(loading[0].rates)[len(loading[0].rates) // 2] >= LOAD_GOAL_GB_S
        else "missed"
    )
    print(f"\nverified loading wanted at {LOAD_GOAL_GB_S:g} GB/s: {reached}")
    machine = facts(PACKAGES)
    print(machine)
    write_json(
        options.json,
        {"machine": machine, "bytes": size, "saving": as_json(saving), "loading": as_json(loading)},
    )
    close_record(
        record,
        options.run_dir,
        [*saving, *loading],
        {"state_bytes": (size, "bytes"), "wanted_load": (LOAD_GOAL_GB_S, "GB/s")},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
