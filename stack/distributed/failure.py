"""How the ranks of a run end together: each announces its error in the store that torchrun shares,
and those that lose a rank find out which one it was, and where it stood.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from stackproof.distributed.output import output_of
from stackproof.distributed.started import next_command
from stackproof.spec.errors import EnvironmentUnfit, RankLost, StackproofError

SURVIVORS_S = 5.0  # that the ranks which noticed a loss wait for one another
COLLECTIVE_ERRORS = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting")


class Survivor(Protocol):
    """What the search for a lost rank needs of one that is left. `store` is the part of this start
    in that of the launcher.
    """

    rank: int
    world_size: int
    store: dist.PrefixStore
    run_dir: Path


def place_of(rank: int) -> str:
    """Key of the place where a rank is."""
    return f"stackproof/at/{rank}"


def _end_of(rank: int) -> str:
    return f"stackproof/ended/{rank}"


def document(error: BaseException) -> dict[str, Any]:
    """An error as it is sent to the other ranks."""
    what = error.what if isinstance(error, StackproofError) else f"{type(error).__name__}: {error}"
    code = EnvironmentUnfit.exit_code if isinstance(error, OSError) else 1
    return {"what": what[:2000], "exit_code": getattr(error, "exit_code", code)}


def announce(store: dist.Store, rank: int, error: BaseException) -> None:
    """State in the store that a rank ends with this error, unless that names the loss of another,
    which is the cause.
    """
    if isinstance(error, RankLost):
        return
    try:
        store.set(_end_of(rank), json.dumps(document(error)))
    except RuntimeError:  # the store is gone with its host, and all ranks with it
        return


def ended(store: dist.Store, rank: int) -> dict[str, Any] | None:
    """What a rank announced, or None."""
    key = _end_of(rank)
    return json.loads(store.get(key)) if store.check([key]) else None


def of_a_collective(error: BaseException) -> bool:
    """Whether an exception is that of a collective operation which lost a rank."""
    if isinstance(error, StackproofError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in COLLECTIVE_ERRORS)


def find(ranks: Survivor) -> RankLost | None:
    """The error of a rank whose operation with others failed: what another rank has announced, or
    its launcher, or else the ranks that do not answer, with the place where each of them was. None
    if all answer.
    """
    try:
        return _find(ranks)
    except dist.DistError as e:
        return without_launcher(e, ranks.run_dir)


def without_launcher(error: dist.DistError, run_dir: Path) -> RankLost:
    """The error of a rank that does not reach the store of its launcher."""
    return RankLost(
        "the launcher of the ranks does not answer: it has ended, or its machine",
        value=str(error).splitlines()[0],
        next_step=next_command(run_dir),
    )


def _find(ranks: Survivor) -> RankLost | None:
    store, every = ranks.store, range(ranks.world_size)
    store.set(f"stackproof/alive/{ranks.rank}", b"1")
    until = time.monotonic() + SURVIVORS_S
    while True:
        for other in every:
            if other != ranks.rank and (end := ended(store, other)):
                return lost(ranks, other, end)
        without = [r for r in every if not store.check([f"stackproof/alive/{r}"])]
        if time.monotonic() > until or not without:
            break
        time.sleep(0.05)
    return silent(ranks, without, last_operation()) if without else None


def lost(ranks: Survivor, rank: int, end: dict[str, Any]) -> RankLost:
    """The error of the ranks that lost one which had announced its own."""
    error = RankLost(
        f"rank {rank} ended: {end['what']}",
        next_step=f"its traceback is in {output_of(ranks.run_dir, rank)}",
    )
    error.exit_code = end["exit_code"]
    return error


def silent(ranks: Survivor, others: Sequence[int], operation: str) -> RankLost:
    """The error of a rank whose operation failed since other ranks do not answer. Of several, some
    may only wait for the lost one.
    """
    places = ", ".join(f"rank {rank} {_place(ranks.store, rank)}" for rank in others)
    cause = "" if len(others) == 1 else ", of which one at least is lost"
    return RankLost(
        f"an operation of several ranks did not return; without an answer{cause}: {places}",
        value=operation,
        allowed="an answer of every rank within parallel.timeout_s",
        next_step=(
            f"look at the machine of that rank and at {output_of(ranks.run_dir, others[0])}, "
            f"then {next_command(ranks.run_dir)}"
        ),
    )


def _place(store: dist.Store, rank: int) -> str:
    known = store.check([place_of(rank)])
    return f"at {store.get(place_of(rank)).decode() if known else 'start'}"


def last_operation() -> str:
    """The last collective operation of this process by torch's flight recorder."""
    import torch._C._distributed_c10d as c10d

    recorded = json.loads(c10d._dump_fr_trace_json(True, False) or b"{}")
    entries = [e for e in recorded.get("entries", ()) if e.get("state") != "completed"]
    if not entries:
        return "the flight recorder holds no operation"
    last = entries[-1]
    return (
        f"{last['profiling_name']}, number {last['collective_seq_id']} of group "
        f"{last['process_group'][1]}, sizes {last['input_sizes']}"
    )
