"""The environment variables by which torchrun or `launch` describes a run to its processes. Imports
no torch.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

RESTARTS = "STACKPROOF_RESTARTS"  # how many came before
LOST_RANK = "STACKPROOF_LOST_RANK"  # the end that made the latest one necessary


@dataclass(frozen=True)
class Ended:
    """How a rank has ended: its process number and exit code, a negative one for a signal."""

    rank: int
    pid: int
    code: int

    def __str__(self) -> str:
        how = f"was ended by {_name_of(-self.code)}"
        if self.code >= 0:
            how = f"ended with exit code {self.code}"
        return f"rank {self.rank} (pid {self.pid}) {how}"


def _name_of(number: int) -> str:
    return next((s.name for s in signal.Signals if s == number), f"signal {number}")


def is_worker() -> bool:
    """Whether torchrun, or `launch`, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def by_torchrun() -> bool:
    """Whether an agent of torchrun has started this process and holds a store for it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def n_started() -> int:
    """How many processes the launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often `launch` or torchrun has restarted the processes of this run."""
    return sum(int(os.environ.get(n, "0")) for n in (RESTARTS, "TORCHELASTIC_RESTART_COUNT"))


def rank() -> int:
    """The number of this process among those that the launcher has started."""
    return int(os.environ.get("RANK", "0"))


def lost_rank() -> Ended | None:
    """The end of a rank after which `launch` has started this run again."""
    stated = os.environ.get(LOST_RANK)
    return Ended(**json.loads(stated)) if stated else None


def resume_command(run_dir: Path, n_processes: int | None = None) -> str:
    """The command that continues a run on as many processes: by default those of this one."""
    n = n_processes or n_started()
    if n_processes is None and n > 1 and RESTARTS not in os.environ:
        return f"torchrun … -m stackproof train --resume {run_dir}"
    return f"stack train --resume {run_dir}" + (f" --nproc {n}" if n > 1 else "")


def next_command(run_dir: Path, n_processes: int | None = None) -> str:
    """What to do after the end of a run: to continue it, or before step 1 to begin it again."""
    if (run_dir / "run.json").is_file():
        return resume_command(run_dir, n_processes)
    return "give the command again"
