"""Where the processes of one run print: rank 0 on the terminal, each other rank into a file of its
own, to which restarts append.
"""

import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stackproof.spec.errors import Stopped
from stackproof.spec.files import open_to_append, require_own

RANKS, OUTPUT = "ranks", "output.log"


def rank_folder(run_dir: Path, rank: int) -> Path:
    """The folder of a rank below that of its run."""
    return run_dir / RANKS / f"{rank:05d}"


def output_of(run_dir: Path, rank: int) -> Path:
    """The file with the output of a rank; of rank 0, with its tracebacks."""
    return rank_folder(run_dir, rank) / OUTPUT


def divide_output(run_dir: Path, rank: int, start: int) -> None:
    """From now on, what this process and its libraries print goes to the file of its rank, unless
    it is rank 0; the stack of a crash is part of it. `start` counts the starts of the launcher.
    """
    faulthandler.enable()
    if rank == 0:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(OSError), _opened(run_dir, rank) as descriptor:  # else it stays on the terminal
        os.write(descriptor, f"--- rank {rank}, start {start}, process {os.getpid()}\n".encode())
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)


@contextmanager
def traceback_kept(run_dir: Path, rank: int | None) -> Iterator[None]:
    """Append the traceback of an exception that ends the block to the file of the rank; with None,
    of a run of one process, nothing. A run that a signal has stopped has none.
    """
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if rank is not None:
            text = "".join(traceback.format_exception(error))
            with suppress(OSError), _opened(run_dir, rank) as descriptor:
                os.write(descriptor, text.encode(errors="backslashreplace"))
        raise


@contextmanager
def _opened(run_dir: Path, rank: int) -> Iterator[int]:
    """The descriptor of a rank's file, at its end."""
    folder = rank_folder(run_dir, rank)
    for path in (run_dir, folder.parent, folder):
        require_own(path)
    folder.mkdir(parents=True, exist_ok=True)
    with open_to_append(folder / OUTPUT) as f:
        yield f.fileno()
