"""Memory of each rank of runs on two and four processes, as measured and as
`stack train --nproc N --dry-run` plans it.

    python benchmarks/rank_memory.py [--only NAME ...] [--run-dir DIR]

Every mesh has real processes, which start as those of a run do: each builds the whole state and
divides it. Gates are left out, since theirs are of one process. A rank notes its resident memory
after steps of one layer, which load code and take the buffers of libraries. `state` is what is
resident beyond that after steps of the whole model, when freed memory was returned to the system:
weights, gradients and moments. `peak` is the most that tensors of a step take together, by torch's
profiler; `resident` is the most that was resident, with the holes that the C heap keeps between
them. Linux with glibc only.
"""

import argparse
import ctypes
import gc
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import child
from side_by_side import close_record, facts, metric_key, open_record, write_json

VOCAB, TOKENS, STEPS = 8192, 128, 3
LIMIT = 0.1  # wanted: states as planned, up to this share
STATE = ("weights", "gradients", "moments")
SHAPE = (
    *("model.d_model=512", "model.n_layers=10", "model.n_heads=8", "model.n_kv_heads=8"),
    *(
        "model.head_dim=64",
        "model.d_ff=1408",
        f"model.max_seq_len={TOKENS}",
        "train.max_steps=1000",
    ),
)
MESHES = {
    "replicate 2": ({"replicate": 2}, 1),
    "shard 2": ({"shard": 2}, 1),
    "tensor 2": ({"tensor": 2}, 1),
    "replicate 4": ({"replicate": 4}, 1),
    "shard 4": ({"shard": 4}, 1),
    "replicate 2 shard 2": ({"replicate": 2, "shard": 2}, 1),
    "shard 4 two micro-steps": ({"shard": 4}, 2),
}


def configured(name: str):
    """The configuration of a mesh, with one row in each micro-step of a rank."""
    from stackproof.config import load_config
    from stackproof.recipes import recipe

    mesh, n_micro_steps = MESHES[name]
    n_data_ranks = mesh.get("replicate", 1) * mesh.get("shard", 1)
    tokens_per_step = n_data_ranks * n_micro_steps * TOKENS
    rows = ("train.micro_batch_size=1", f"train.tokens_per_step={tokens_per_step}")
    sizes = tuple(f"parallel.{dimension}={n}" for dimension, n in mesh.items())
    return load_config(recipe("tiny"), sets=(*SHAPE, *rows, *sizes))[0]


def held(name: str) -> dict[str, int]:
    """Measured state and peak of this rank, bytes."""
    import torch

    from stackproof.distributed.process_group import joined

    cfg = configured(name)
    warm = cfg.model_copy(update={"model": cfg.model.model_copy(update={"n_layers": 1})})
    with joined(cfg, torch.device("cpu")) as ranks:
        train(divided(warm, ranks), ranks)
        before = resident()
        state = divided(cfg, ranks)
        most = train(state, ranks) - before
        assert all(p.grad is not None for p in state.model.parameters())
        assert len(state.optimizer.state) == len(list(state.model.parameters()))
        return {
            "state": resident() - before,
            "resident": most,
            "peak": allocated(state, batches(cfg, ranks)),
        }


def allocated(state, rows: Sequence) -> int:
    """The most that weights, moments and all tensors of a step take together, bytes."""
    from torch.profiler import ProfilerActivity, profile

    from stackproof.distributed.tensors import local_part
    from stackproof.train.step import train_step

    moments = [t for fields in state.optimizer.state.values() for t in fields.values()]
    tensors = (*state.model.parameters(), *moments)
    held = most = sum(local_part(t).numel() * t.element_size() for t in tensors)
    state.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        train_step(state, rows)
    events = measured.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    for _, n_bytes in changes:
        held += n_bytes
        most = max(most, held)
    return most


def divided(cfg, ranks):
    """The state of a run at its start, divided among its ranks."""
    import torch

    from stackproof.train.state import divide, state_around

    loader = SimpleNamespace(rank=0, world_size=1, rows=1, cursor=0)
    state = state_around(cfg, VOCAB, loader, torch.device("cpu"))
    divide(state, ranks)
    return state


def train(state, ranks) -> int:
    """Take the steps. Returns what was resident at most after the first, bytes."""
    from stackproof.train.step import train_step

    for step in range(STEPS):
        if step == 1:  # the first makes the moments
            resident()
            Path("/proc/self/clear_refs").write_text("5")
        train_step(state, batches(state.cfg, ranks))
    return child.status_bytes("VmHWM")


def batches(cfg, ranks) -> Sequence:
    """The micro-batches of this rank, of random tokens."""
    import torch

    from stackproof.data.data_loader import Batch

    n = cfg.accumulation(ranks.sizes.n_data_ranks)
    ids = torch.randint(VOCAB, (n, 1, TOKENS + 1))
    return [Batch(row[:, :-1], row[:, 1:], (i,), 0, i, i + 1) for i, row in enumerate(ids)]


def resident() -> int:
    """Resident memory of this process, bytes, after freed memory was returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return child.status_bytes("VmRSS")


def compared(name: str, ranks) -> dict[str, int]:
    """Measured figures of the rank with the most, and the planned ones, bytes."""
    from stackproof.train.rank_plan import Cluster, plan

    cfg, n_ranks = configured(name), math.prod(MESHES[name][0].values())
    answers = ranks.run("rank_memory:held", name, n_ranks=n_ranks)
    for answer in answers:
        if answer.raised:
            raise SystemExit(answer.raised)
    planned = plan(cfg, VOCAB, n_ranks, Cluster.of(cfg, {}))["memory_bytes"]
    return {
        "measured_state": max(a.value["state"] for a in answers),
        "planned_state": sum(planned[part] for part in STATE),
        "measured_peak": max(a.value["peak"] for a in answers),
        "measured_resident": max(a.value["resident"] for a in answers),
        "planned_peak": planned["peak"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(MESHES), default=list(MESHES))
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from stackproof.museum.ranks import pool

    record = open_record(options, "memory of each rank, measured over planned")
    figures, outside, found = {}, [], {}
    columns = ("state MiB", "planned", "ratio", "peak MiB", "planned", "ratio", "resident")
    print(f"{'':26}" + "".join(f"{column:>11}" for column in columns))
    with pool() as ranks:
        for name in options.only:
            found[name] = used = compared(name, ranks)
            line, key = f"{name:26}", metric_key(name)
            for part in ("state", "peak"):
                measured, planned = used[f"measured_{part}"], used[f"planned_{part}"]
                ratio = measured / planned
                line += f"{measured / 2**20:>11.0f}{planned / 2**20:>11.0f}{ratio:>11.2f}"
                figures[f"measured_over_planned_{part}_{key}"] = (ratio, "1")
            figures |= {f"{what}_bytes_{key}": (n, "bytes") for what, n in used.items()}
            off = abs(used["measured_state"] / used["planned_state"] - 1)
            outside += [name] if off > LIMIT else []
            print(f"{line}{used['measured_resident'] / 2**20:>11.0f}", flush=True)
    print(f"states outside of the plan ± {LIMIT:.0%}: {', '.join(outside) or 'none'}")
    write_json(options.json, {"machine": facts(("torch",)), "bytes": found})
    close_record(record, options.run_dir, [], figures)
    print(json.dumps(facts(("torch",))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
