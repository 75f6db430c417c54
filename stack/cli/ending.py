"""How a command ends: every exception as a documented error, or as a bug."""

import errno
import os
import select
import signal
import sys
import traceback
import warnings

import typer

from stackproof.cli.output import note
from stackproof.spec.errors import (
    DataError,
    EnvironmentUnfit,
    StackproofError,
    UsageError,
)
from stackproof.spec.files import remedy
from stackproof.spec.visible import visible

TRAIN_EXTRA = ("torch", "numpy", "safetensors", "tokenizers", "rensa")
# Newer versions of typer include a copy of click, older ones depend on it; the errors of both
# derive from this class.
ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
# Of the machine, whatever the path; any other error of a file is one of the path that was given.
OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY),
)
# Of torch, which raises RuntimeError for them.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calc")


def prepare_streams() -> None:
    """Characters that standard output cannot encode, and control characters in warnings, appear as
    escapes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _warning_line


def _warning_line(message, category, filename, lineno, line=None) -> str:
    return f"{visible(filename)}:{lineno}: {category.__name__}: {visible(message)}\n"


def documented(error: BaseException) -> StackproofError | None:
    """The documented error for an exception that reached the top; None for a bug."""
    match error:
        case StackproofError():
            return error
        case ClickException():
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "stack"
            return UsageError(error.format_message(), next_step=f"{command} --help")
        case ModuleNotFoundError(name=name) if name in TRAIN_EXTRA:
            return _missing(name)
        case MemoryError():
            return _no_memory(error)
        case RuntimeError() if any(text in str(error) for text in NO_MEMORY):
            return _no_memory(error)
        case RecursionError():
            return DataError(
                "the input is nested too deeply",
                value=str(error) or None,
                next_step="flatten the file that the command reads",
            )
        case OSError():
            return _of_file(error)
        case ValueError() if "embedded null" in str(error):
            return UsageError("a path holds a NUL character", next_step="correct the argument")
    if type(error).__name__ == "PanicException":  # of a library in Rust, a BaseException
        return DataError(
            "a library stopped at its input",
            value=f"{error}",
            next_step="check the tokenizer and the texts that the command reads",
        )
    return None


def _missing(name: str) -> StackproofError:
    return EnvironmentUnfit(
        f"this command needs {name}, which is not installed",
        allowed=(
            "the light install reads and verifies evidence; training and models need the [train] "
            "extra"
        ),
        next_step="pip install 'stackproof[train]', then stack doctor",
    )


def _no_memory(error: BaseException) -> StackproofError:
    first_line = next(iter(str(error).splitlines()), "")
    return EnvironmentUnfit(
        "the command needs more memory than this machine has",
        value=first_line or None,
        next_step="give it smaller input or a smaller configuration",
    )


def _of_file(error: OSError) -> StackproofError:
    path = "" if error.filename is None else os.fsdecode(error.filename)
    what = f"cannot use {path}: {error.strerror}" if path else error.strerror or str(error)
    if error.errno in OF_THE_MACHINE:
        return EnvironmentUnfit(what, next_step=f"{remedy(error)}, then repeat the command")
    return UsageError(what, next_step=f"{remedy(error)}, or check the path in the command")


def bug(error: BaseException) -> StackproofError:
    """The error for an exception that none of the documented ones covers; prints its traceback."""
    note("".join(traceback.format_exception(error)).rstrip())
    return StackproofError(
        "this is a bug of stackproof",
        value=f"{type(error).__name__}: {error}",
        next_step="report the command, the traceback above, and the output of stack doctor",
    )


def end_if_unread() -> None:
    """End this process as SIGPIPE would, if nothing reads its standard output any more."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _is_unread(stream):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)


def _is_unread(stream) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # a stream of a test, or a closed one
        return False


def drop_unwritten() -> None:
    """Drop output that cannot be written, so that the interpreter does not fail on it at its
    end.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
