"""How the ranks of a run end together: each announces its error in the store that torchrun shares,
and those that lose a rank find out which one it was, and where it stood.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stackproof.distributed.output import output_of
from stackproof.spec.errors import RankLost, StackproofError

SURVIVORS_S = 5.0  # that the ranks which noticed a loss wait for one another
COLLECTIVE_ERRORS = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting")


def place_of(rank: int) -> str:
    """Key of the place where a rank is."""
    return f"stackproof/at/{rank}"


def _end_of(rank: int) -> str:
    return f"stackproof/ended/{rank}"


def document(error: BaseException) -> dict[str, Any]:
    """An error as it is sent to the other ranks."""
    what = error.what if isinstance(error, StackproofError) else f"{type(error).__name__}: {error}"
    return {"what": what[:2000], "exit_code": getattr(error, "exit_code", 1)}


def announce(store: dist.Store, rank: int, error: BaseException) -> None:
    """State in the store that a rank ends with this error."""
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


def find(store: dist.Store, rank: int, world_size: int) -> RankLost | None:
    """The error of a rank whose collective operation failed: what another rank has announced, or
    else the ranks that do not answer, with the place where each of them was. None if all answer.
    """
    store.set(f"stackproof/alive/{rank}", b"1")
    until = time.monotonic() + SURVIVORS_S
    while True:
        for other in range(world_size):
            if other != rank and (end := ended(store, other)):
                return lost(other, end)
        silent = [r for r in range(world_size) if not store.check([f"stackproof/alive/{r}"])]
        if time.monotonic() > until or not silent:
            break
        time.sleep(0.05)
    return _silent(store, silent, last_operation()) if silent else None


def lost(rank: int, end: dict[str, Any]) -> RankLost:
    """The error of the ranks that lost one which had announced its own."""
    error = RankLost(
        f"rank {rank} ended: {end['what']}",
        next_step=f"its traceback is in {output_of(Path('RUN'), rank)}",
    )
    error.exit_code = end["exit_code"]
    return error


def _silent(store: dist.Store, ranks: Sequence[int], operation: str) -> RankLost:
    places = []
    for rank in ranks:
        known = store.check([place_of(rank)])
        places.append(f"rank {rank} at {store.get(place_of(rank)).decode() if known else 'start'}")
    return RankLost(
        f"a collective operation did not return; without an answer: {', '.join(places)}",
        value=operation,
        allowed="an answer of every rank within parallel.timeout_s",
        next_step=(
            f"look at the machine of that rank and at {output_of(Path('RUN'), ranks[0])}; stack "
            "train --resume continues from the last checkpoint"
        ),
    )


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
