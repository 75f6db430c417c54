"""Starting several processes of one command on this machine, by torch's elastic agent."""

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from stackproof.distributed.output import RANKS, output_of
from stackproof.distributed.parent import LAUNCHER
from stackproof.distributed.started import LOST_RANK, RESTARTS, Ended, next_command
from stackproof.spec.errors import EXIT_CODES, RankLost

# A process was lost: a restart may succeed. It would repeat an error of use, data or a gate, and
# undo a request to stop.
LOST = (1, RankLost.exit_code)
STOPPING_S = 600  # for the step and the save of ranks that a signal to the launcher stops


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
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # The ranks state their errors themselves, and the agent repeats them without a cause.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.pop(LOST_RANK, None)
    try:
        for restart in range(max_restarts + 1):
            os.environ[RESTARTS] = str(restart)
            failed = _start(arguments, n_processes)
            if not failed:
                return 0
            if (code := exit_code(end.code for end in failed)) not in LOST:
                break
            if restart < max_restarts:
                os.environ[LOST_RANK] = json.dumps(asdict(failed[0]))
                note(f"{failed[0]}; restart {restart + 1} of {max_restarts}")
    except SignalException as e:
        return _stopped_by(e.sigval)
    finally:
        for name in (LAUNCHER, RESTARTS, LOST_RANK):  # other launchers may be started from here
            os.environ.pop(name, None)
    if error := first_lost(failed, run_dir, n_processes):
        raise error
    if failed[0].code < 0:
        note(str(failed[0]))
    return code


def _start(arguments: Sequence[str], n_processes: int) -> list[Ended]:
    """One start of all processes, by an agent that does not restart: torch's restarts after every
    exit code. Returns the ends of the ranks that failed, in the order in which they ended. The
    agent states it in whole seconds; within one, a rank that stated its own error is the first, and
    then one that a signal ended.
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
            ends = [(f.timestamp, Ended(rank, f.pid, f.exitcode)) for rank, f in e.failures.items()]
            return [end for _, end in sorted(ends, key=lambda e: (e[0], order_of(e[1].code)))]
    return []


def order_of(code: int) -> int:
    """Of ends within one second, which comes first: a stated error, then a signal, then what
    follows from them, as the SIGTERM of the agent does.
    """
    if code in EXIT_CODES and code not in (*LOST, 75, 130):
        return 0
    return 1 if code < 0 and -code != signal.SIGTERM else 2


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


def first_lost(failed: Sequence[Ended], run_dir: Path, n_processes: int) -> RankLost | None:
    """The error that names the first of the failed ranks, given in the order in which they ended;
    None if rank 0 has stated one on its terminal, or no rank has failed.
    """
    code = exit_code(end.code for end in failed) if failed else 0
    if any(end.rank == 0 and end.code == code for end in failed) or not failed:
        return None
    first = failed[0]
    error = RankLost(
        f"{first}, and rank 0 has not stated why",
        next_step=f"read {output_of(run_dir, first.rank) if first.rank else run_dir / RANKS}, then "
        f"{next_command(run_dir, n_processes)}",
    )
    error.exit_code = code
    return error
