"""Starting several processes of one command on this machine, by torch's elastic agent."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stackproof.distributed.output import RANKS, output_of
from stackproof.spec.errors import EXIT_CODES, RankLost

# Set for the processes that the agent starts.
THREADS = "OMP_NUM_THREADS"
RESTARTS = "STACKPROOF_RESTARTS"  # how many came before
# A process was lost: a restart may succeed. It would repeat an error of use, data or a gate, and
# undo a request to stop.
LOST = (1, RankLost.exit_code)
STOPPING_S = 600  # for the step and the save of ranks that a signal to the launcher stops


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


def launch(arguments: Sequence[str], n_processes: int, run_dir: Path, *, max_restarts: int) -> int:
    """Run `python -m stackproof ARGUMENTS` in several processes until all have ended. If one is
    lost, the others are ended and all are started again, up to `max_restarts` times. Returns the
    exit code of the rank that ended first.

    Raises RankLost if rank 0 has stated no error.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # The ranks state their errors themselves, and the agent repeats them without a cause.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // n_processes)))
    try:
        for attempt in range(max_restarts + 1):
            os.environ[RESTARTS] = str(attempt)
            codes = _start(arguments, n_processes)
            if not codes:
                return 0
            if exit_code(codes.values()) not in LOST:
                break
    except SignalException as e:
        return _stopped_by(e.sigval)
    if error := first_lost(codes, run_dir):
        raise error
    return exit_code(codes.values())


def _start(arguments: Sequence[str], n_processes: int) -> dict[int, int]:
    """One start of all processes, by an agent that does not restart: torch's restarts after every
    exit code. Returns the exit codes of the ranks that failed, in the order in which they ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="stackproof-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="stackproof",
            max_restarts=0,
            shutdown_timeout=STOPPING_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "stackproof", *arguments)
        except ChildFailedError as e:
            failures = sorted(e.failures.items(), key=lambda item: item[1].timestamp)
            return {rank: failure.exitcode for rank, failure in failures}
    return {}


def exit_code(codes: Iterable[int]) -> int:
    """The exit code of a launch from those of its failed ranks, in the order in which they ended;
    negative ones are signals. The agent ends the others by SIGTERM, so that the first one counts.
    """
    first = next(iter(codes))
    if -first in (signal.SIGTERM, signal.SIGINT):  # before the rank handled signals
        return _stopped_by(-first)
    return first if first in EXIT_CODES else RankLost.exit_code


def _stopped_by(number: int) -> int:
    return 130 if number == signal.SIGINT else 75


def first_lost(codes: Mapping[int, int], run_dir: Path) -> RankLost | None:
    """The error that names the first of the failed ranks, given in the order in which they ended;
    None if rank 0 has stated one on its terminal.
    """
    if codes.get(0) == exit_code(codes.values()):
        return None
    first, code = next(iter(codes.items()))
    error = RankLost(
        f"rank {first} ended first, and rank 0 has not stated why",
        value=f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}",
        next_step=f"read {output_of(run_dir, first) if first else run_dir / RANKS}; stack train "
        f"--resume {run_dir} continues from the last checkpoint",
    )
    error.exit_code = exit_code(codes.values())
    return error
