"""The plan of a run on many ranks, for `stack train --nproc N --dry-run`."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from stackproof.cli.output import listed, print_line
from stackproof.config import RunConfig
from stackproof.spec.errors import UsageError

OTHER_MESHES = 5  # printed; the JSON document has all


def planned(
    cfg: RunConfig, vocab_size: int, world_size: int, assumed: Sequence[str]
) -> dict[str, Any]:
    """The plan as a JSON-ready document. Raises UsageError for an assumption that is unknown or has
    a value which is not allowed.
    """
    from stackproof.train.rank_plan import Cluster, plan

    changes = dict(text.partition("=")[::2] for text in assumed)
    try:
        cluster = Cluster.of(cfg, changes)
    except ValidationError as e:
        error = e.errors()[0]
        name = ".".join(map(str, error["loc"]))
        fields = (f"{n} ({field.description})" for n, field in Cluster.model_fields.items())
        raise UsageError(
            f"--assume {name}: {error['msg']}",
            value=f"{name}={changes[name]}",
            allowed=", ".join(fields),
            next_step="--assume NAME=VALUE",
        ) from e
    return plan(cfg, vocab_size, world_size, cluster)


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan as comment lines, like the other quantities of a dry run."""
    print_line(
        f"# {plan['world_size']} ranks: {_mesh(plan['mesh'])}; micro-batches of "
        f"{plan['micro_batch_rows']} rows, accumulation {plan['accumulation']}"
    )
    for part, n_bytes in plan["memory_bytes"].items():
        print_line(f"# rank_{part}_bytes: {n_bytes:,}")
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
    print_line(f"# predicted seconds of a step: {listed(plan['predicted_s'])}")
    print_line(f"# predicted tokens per second: {plan['predicted_tokens_per_s']:.3g}")
    print_line(f"# this mesh fits into the memory of a rank: {'yes' if plan['fits'] else 'no'}")
    if (best := plan["cheapest"]) is None:
        print_line("# no mesh of so many ranks fits")
    else:
        flags = " ".join(f"--set parallel.{name}={n}" for name, n in best["mesh"].items())
        print_line(f"# cheapest mesh that fits: {_summary(best)}: {flags}")
    for other in [m for m in plan["meshes"] if m != best][:OTHER_MESHES]:
        print_line(f"# another mesh: {_summary(other)}{'' if other['fits'] else ', does not fit'}")


def _mesh(sizes: dict[str, int]) -> str:
    return " × ".join(f"{name} {n}" for name, n in sizes.items())


def _summary(mesh: dict[str, Any]) -> str:
    return f"{_mesh(mesh['mesh'])}, {mesh['step_s']:.3g} s, peak {mesh['peak_bytes']:,} bytes"
