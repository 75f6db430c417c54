"""Starting several processes of one command on this machine, and the variables that
state their start. Imports no torch.
"""

import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stackproof.distributed.output import RANKS, output_of
from stackproof.spec.errors import EXIT_CODES, RankLost

# Set for the processes that `launch` starts.
THREADS = "OMP_NUM_THREADS"
RESTARTS = "STACKPROOF_RESTARTS"  # how many came before
LOST_RANK = "STACKPROOF_LOST_RANK"  # the end that made the latest one necessary
# A process was lost: a restart may succeed. It would repeat an error of use, data or a gate, and
# undo a request to stop.
LOST = (1, RankLost.exit_code)


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


def launch(
    arguments: Sequence[str],
    n_processes: int,
    run_dir: Path,
    *,
    max_restarts: int,
    note: Callable[[str], None],
) -> int:
    """Run `python -m stackproof ARGUMENTS` in several processes until all have ended. If one is
    lost, the others are ended and all are started again, up to `max_restarts` times. `note` prints
    a line. Returns the exit code of the rank that ended first.

    Raises RankLost if rank 0 has stated no error.
    """
    from stackproof.distributed.supervisor import Supervisor

    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // n_processes)))
    supervisor, restart = Supervisor(), 0
    with supervisor.listening():
        while True:
            os.environ[RESTARTS] = str(restart)
            failed = supervisor.run(arguments, n_processes)
            code = exit_code(end.code for end in failed) if failed else 0
            if supervisor.stop or code not in LOST or restart == max_restarts:
                break
            restart += 1
            os.environ[LOST_RANK] = json.dumps(asdict(failed[0]))
            note(f"{failed[0]}; restart {restart} of {max_restarts}")
    if supervisor.stop:
        if failed and failed[0].code < 0:
            note("stopped before the ranks had started")
        return code
    if error := first_lost(failed, run_dir, n_processes):
        raise error
    if failed and failed[0].code < 0:
        note(str(failed[0]))
    return code


def exit_code(codes: Iterable[int]) -> int:
    """The exit code of a launch from those of its failed ranks, in the order in which they ended;
    negative ones are signals. The others end because of the first one, which counts.
    """
    first = next(iter(codes))
    if -first in (signal.SIGTERM, signal.SIGINT):  # before the rank handled signals
        return 130 if -first == signal.SIGINT else 75
    return first if first in EXIT_CODES else RankLost.exit_code


def first_lost(failed: Sequence[Ended], run_dir: Path, n_processes: int) -> RankLost | None:
    """The error that names the first of the failed ranks, given in the order in which they ended;
    None if rank 0 has stated one on its terminal, or no rank has failed.
    """
    code = exit_code(end.code for end in failed) if failed else 0
    if any(end.rank == 0 and end.code == code for end in failed) or not failed:
        return None
    first = failed[0]
    begun = (run_dir / "run.json").is_file()
    again = f"{resume_command(run_dir, n_processes)} continues from the last checkpoint"
    error = RankLost(
        f"{first}, and rank 0 has not stated why",
        next_step=f"read {output_of(run_dir, first.rank) if first.rank else run_dir / RANKS}; "
        + (again if begun else "no step was taken: give the command again"),
    )
    error.exit_code = code
    return error
