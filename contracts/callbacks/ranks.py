"""The processes that train together, in a run of another trainer."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from stackproof.spec.errors import ConfigError

# Variables by which launchers state how many processes they have started. SLURM_NTASKS is none of
# them: a batch script has it too, which SLURM starts once for any number of tasks.
STARTED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
JOIN_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """This process and those that it trains with. `n_started` processes were started by the
    launcher. Documents are exchanged in a gloo group of their own, so that they never mix with the
    operations of training.
    """

    rank: int = 0
    world_size: int = 1
    n_started: int = 1
    group: Any = None

    @classmethod
    def joined(cls) -> "Ranks":
        """The ranks of torch's default process group. All processes must call this together.

        Raises ConfigError if one of them does not within `JOIN_TIMEOUT`.
        """
        n_started, dist = max(1, _stated(STARTED, 1)), torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(_stated(RANK, 0), 1, n_started)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        try:
            meeting = dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT)
            dist.barrier(meeting)
            dist.destroy_process_group(meeting)
        except RuntimeError as e:
            raise ConfigError(
                f"not every process has opened the gates within {JOIN_TIMEOUT}",
                value=f"rank {rank} of {world_size}: {e}",
                allowed="the same callbacks in all processes",
                next_step="add the callback, or the block `gated`, on every rank",
            ) from e
        return cls(rank, world_size, max(n_started, world_size), dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log and the record."""
        return self.rank == 0

    def gathered(self, document: Any) -> list[Any]:
        """The documents of all ranks, in order of rank. All processes must call this together."""
        if self.world_size == 1:
            return [document]
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, document, group=self.group)
        return found

    def left(self) -> "Ranks":
        """This process alone, its group destroyed, if the trainer has not destroyed all."""
        if self.group is not None:
            with suppress(ValueError):
                torch.distributed.destroy_process_group(self.group)
        return replace(self, world_size=1, group=None)


ALONE = Ranks()


def _stated(names: tuple[str, ...], default: int) -> int:
    """The number in the first of these variables that is set."""
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)
