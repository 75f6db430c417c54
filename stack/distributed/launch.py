"""Starting several processes of one command on this machine."""

import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from stackproof.distributed.output import RANKS, output_of
from stackproof.distributed.started import LOST_RANK, RESTARTS, Ended, next_command
from stackproof.distributed.supervisor import Supervisor
from stackproof.spec.errors import EXIT_CODES, RankLost

# A process was lost: a restart may succeed. It would repeat an error of use, data or a gate, and
# undo a request to stop.
LOST = (1, RankLost.exit_code)


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
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
    error = RankLost(
        f"{first}, and rank 0 has not stated why",
        next_step=f"read {output_of(run_dir, first.rank) if first.rank else run_dir / RANKS}, then "
        f"{next_command(run_dir, n_processes)}",
    )
    error.exit_code = code
    return error
