"""Starting several processes of one command on this machine, by torch's elastic agent."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence

from stackproof.spec.errors import EXIT_CODES, RankLost

# Set for the processes that the agent starts.
THREADS = "OMP_NUM_THREADS"
RESTARTS = "STACKPROOF_RESTARTS"
# A process was lost: a restart may succeed. It would repeat an error of use, data or a gate, and
# undo a request to stop.
LOST = (1, RankLost.exit_code)
STOPPING_S = 600  # for the step and the save of ranks that a signal to the launcher stops


def is_worker() -> bool:
    """Whether torchrun, or `launch`, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def n_started() -> int:
    """How many processes the launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often `launch` or torchrun has restarted the processes of this run."""
    return sum(int(os.environ.get(n, "0")) for n in (RESTARTS, "TORCHELASTIC_RESTART_COUNT"))


def launch(arguments: Sequence[str], n_processes: int, *, max_restarts: int) -> int:
    """Run `python -m stackproof ARGUMENTS` in several processes until all have ended. If one is
    lost, the others are ended and all are started again, up to `max_restarts` times. Returns the
    exit code of the rank that ended first.
    """
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // n_processes)))
    for attempt in range(max_restarts + 1):
        os.environ[RESTARTS] = str(attempt)
        code = _start(arguments, n_processes)
        if code not in LOST:
            break
    return code


def _start(arguments: Sequence[str], n_processes: int) -> int:
    """One start of all processes, by an agent that does not restart: torch's restarts after every
    exit code. Returns the exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
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
            return exit_code(failure.exitcode for failure in e.failures.values())
        except SignalException as e:
            return _stopped_by(e.sigval)
    return 0


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
