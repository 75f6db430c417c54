"""Starting several processes of one command on this machine, by torch's elastic agent."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stackproof.distributed.output import RANKS, output_of
from stackproof.spec.errors import EXIT_CODES, RankLost

# Set for the processes that the agent starts.
THREADS = "OMP_NUM_THREADS"


def is_worker() -> bool:
    """Whether torchrun, or `launch`, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def n_started() -> int:
    """How many processes the launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often the agent has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    """The number of this process among those that the launcher has started."""
    return int(os.environ.get("RANK", "0"))


def launch(arguments: Sequence[str], n_processes: int, run_dir: Path, *, max_restarts: int) -> int:
    """Run `python -m stackproof ARGUMENTS` in several processes until all have ended. If one fails,
    the agent ends the others and starts all again, up to `max_restarts` times. Returns the exit
    code of rank 0, or that of the rank which failed first.

    Raises RankLost if rank 0 has stated no error.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks state their errors themselves, and the agent repeats them without a cause.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // n_processes)))
    with tempfile.TemporaryDirectory(prefix="stackproof-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="stackproof",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "stackproof", *arguments)
        except ChildFailedError as e:
            failures = sorted(e.failures.items(), key=lambda item: item[1].timestamp)
            codes = {r: failure.exitcode for r, failure in failures}
            if error := first_lost(codes, run_dir):
                raise error from None
            return exit_code(codes)
        except SignalException as e:
            return 75 if e.sigval.name == "SIGTERM" else 130
    return 0


def exit_code(codes: Mapping[int, int]) -> int:
    """The exit code of a launch from those of its failed ranks; negative ones are signals."""
    documented = [codes[rank] for rank in sorted(codes) if codes[rank] in EXIT_CODES]
    return documented[0] if documented else RankLost.exit_code


def first_lost(codes: Mapping[int, int], run_dir: Path) -> RankLost | None:
    """The error that names the first of the failed ranks, given in the order in which they ended;
    None if rank 0 has stated one on its terminal.
    """
    if codes.get(0) in EXIT_CODES:
        return None
    first, code = next(iter(codes.items()))
    error = RankLost(
        f"rank {first} ended first, and rank 0 has stated no error",
        value=f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}",
        next_step=f"read {output_of(run_dir, first) if first else run_dir / RANKS}; stack train "
        f"--resume {run_dir} continues from the last checkpoint",
    )
    error.exit_code = exit_code(codes)
    return error
