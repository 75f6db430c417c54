"""The start that all ranks join, and whether an earlier start has begun the run. The launcher's
store outlives the ranks, and torchrun counts the restarts of each node apart, so that neither is
enough to distinguish the ranks of one start from those that an earlier one has lost.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from stackproof.distributed.started import RESTARTS
from stackproof.spec.errors import RankLost

POLL_S = 0.05
STARTS = "stackproof/starts"
BEGUN = "stackproof/begun"


@dataclass(frozen=True)
class Launcher:
    """The launcher of this process, which also restarts it. `store` is that of torchrun's agent;
    None without torchrun.
    """

    store: dist.Store | None = None

    def has_begun(self) -> bool:
        """Whether the run of this folder was begun by an earlier start of this launcher. Only rank
        0 has the answer. `stack train --nproc` refuses an occupied folder before its first start.
        """
        if os.environ.get(RESTARTS, "0") != "0":
            return True
        return self.store is not None and self.store.check([BEGUN])

    def note_begun(self) -> None:
        """State that this start begins the run, which has locked its folder."""
        if self.store is not None:
            self.store.set(BEGUN, b"1")


NO_STORE = Launcher()


def common_start(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta
) -> tuple[str, int]:
    """The name of the start that all ranks join now, and on rank 0 its number in this store, from
    1; on the others 0.

    Each rank writes a number drawn for this start. Rank 0 answers each number with its own, until
    all ranks have confirmed. An answer to the number of a lost rank is read by none. Raises
    RankLost if a rank does not answer within `timeout`.
    """
    drawn = uuid4().hex
    if rank:
        store.set(_number_of(rank), drawn)
        try:
            start = store.get(_answer_to(drawn)).decode()
        except dist.DistStoreError as e:
            raise _missing([0], timeout) from e
        store.set(f"{start}/{rank}", b"1")
        return start, 0
    start, missing = f"stackproof/start/{drawn}", list(range(1, world_size))
    number, until = store.add(STARTS, 1), time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    while missing := [r for r in missing if not store.check([f"{start}/{r}"])]:
        for other in (r for r in missing if store.check([_number_of(r)])):
            if (its := store.get(_number_of(other)).decode()) not in answered:
                store.set(_answer_to(its), start)
                answered.add(its)
        if time.monotonic() > until:
            raise _missing(missing, timeout)
        time.sleep(POLL_S)
    return start, number


def _number_of(rank: int) -> str:
    return f"stackproof/number/{rank}"


def _answer_to(drawn: str) -> str:
    return f"stackproof/answer/{drawn}"


def _missing(ranks: list[int], timeout: timedelta) -> RankLost:
    return RankLost(
        f"ranks that the launcher has started did not join: {', '.join(map(str, ranks[:8]))}",
        value=f"no answer within {timeout.total_seconds():g} s (parallel.timeout_s)",
        allowed="an answer of every rank",
        next_step="look at their output, and whether their machines reach the rendezvous endpoint",
    )
