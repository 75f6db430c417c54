"""The plan of a run on many ranks, for `stack train --nproc N --dry-run`."""

import os
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from stackproof.cli.output import listed, print_line
from stackproof.config import RunConfig
from stackproof.spec.errors import UsageError

OTHER_MESHES = 5  # printed; the JSON document has all
SLOWER_MIN = 1.1  # of a step than on the cheapest mesh, from which on a plan states it


def planned(
    cfg: RunConfig, vocab_size: int, world_size: int, assumed: Sequence[str], probed_flops: float
) -> dict[str, Any]:
    """The plan as a JSON-ready document. Raises UsageError for an assumption that is unknown or has
    a value which is not allowed.

    If the ranks are processes on this CPU, each has an equal part of `probed_flops`, what all cores
    of it reach per second.
    """
    from stackproof.train.rank_plan import Cluster, plan

    changes = dict(text.partition("=")[::2] for text in assumed)
    given, origin = "flops_per_s" in changes, "data sheet"
    own = {}
    if not given and on_this_cpu(cfg, world_size):
        own = {"flops_per_s": probed_flops / world_size}
        origin = f"measured on this CPU in float32, divided among {world_size} ranks"
    try:
        cluster = Cluster.of(cfg, own | changes)
    except ValidationError as e:
        error = e.errors()[0]
        name = ".".join(map(str, error["loc"]))
        fields = (f"{n} ({field.description})" for n, field in Cluster.model_fields.items())
        unknown = error["type"] == "extra_forbidden"
        raise UsageError(
            f"--assume {name}: {'there is no such assumption' if unknown else error['msg']}",
            value=f"{name}={changes[name]}",
            allowed=", ".join(fields),
            next_step="--assume NAME=VALUE",
        ) from e
    document = plan(cfg, vocab_size, world_size, cluster)
    return document | {"flops_per_s_origin": "--assume" if given else origin}


def on_this_cpu(cfg: RunConfig, world_size: int) -> bool:
    """Whether the planned ranks are processes on this machine's CPU: where the configuration
    chooses it, or where this machine has no GPU and a core for each rank.
    """
    from stackproof.train.device import resolve_device

    chosen = cfg.device == "cpu" or world_size <= (os.cpu_count() or 1)
    return chosen and resolve_device(cfg.device).type == "cpu"


def quantity(name: str, value: float | str) -> str:
    """A quantity with thousands separated, bytes also in GiB."""
    if isinstance(value, str):
        return value
    return f"{value:,}" + (f" ({value / 2**30:.3g} GiB)" if name.endswith("_bytes") else "")


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan as comment lines, like the other quantities of a dry run."""
    print_line(
        f"# {plan['world_size']} ranks: {_mesh(plan['mesh'])}; micro-batches of "
        f"{plan['micro_batch_rows']} rows, accumulation {plan['accumulation']}"
    )
    for part, n_bytes in plan["memory_bytes"].items():
        print_line(f"# rank_{part}_bytes: {quantity('_bytes', n_bytes)}")
    for c in plan["collectives"]:
        print_line(
            f"# {c['operation']} of {c['of']} over {c['dimension']}: {c['per_step']} per step of "
            f"{c['n_bytes']:,} bytes, {c['step_bytes']:,} bytes together; each rank sends "
            f"{c['sent_bytes']:,}"
        )
    print_line(
        "# The times below are predictions from these assumptions, not measurements. "
        "--assume NAME=VALUE changes one."
    )
    print_line(f"# assumed: {listed(plan['assumptions'])}")
    print_line(f"# flops_per_s is from: {plan['flops_per_s_origin']}")
    print_line(f"# predicted seconds of a step: {listed(plan['predicted_s'])}")
    print_line(f"# predicted tokens per second: {plan['predicted_tokens_per_s']:.3g}")
    print_line(
        f"# predicted seconds of all steps: {plan['predicted_run_s']:,.0f}, without evaluation, "
        "gates and checkpoints"
    )
    print_line(f"# this mesh fits into the memory of a rank: {'yes' if plan['fits'] else 'no'}")
    if (best := plan["cheapest"]) is None:
        print_line("# no mesh of so many ranks fits")
    else:
        flags = " ".join(f"--set parallel.{name}={n}" for name, n in best["mesh"].items())
        print_line(f"# cheapest mesh that fits: {_summary(best)}: {flags}")
        slower = plan["predicted_s"]["step"] / best["step_s"]
        if slower >= SLOWER_MIN:
            print_line(f"# a step on the mesh of the plan takes {slower:.3g} times as long")
    others = [m for m in plan["meshes"] if m != best]
    for other in others[:OTHER_MESHES]:
        print_line(f"# another mesh: {_summary(other)}{'' if other['fits'] else ', does not fit'}")
    if (more := len(others) - OTHER_MESHES) > 0:
        print_line(f"# {more} more meshes: --json states all")


def _mesh(sizes: dict[str, int]) -> str:
    return " × ".join(f"{name} {n}" for name, n in sizes.items())


def _summary(mesh: dict[str, Any]) -> str:
    peak = mesh["peak_bytes"] / 2**30
    return f"{_mesh(mesh['mesh'])}, {mesh['step_s']:.3g} s, peak {peak:.3g} GiB"
