"""Checks of path arguments before any file is opened. A wrong path is a UsageError."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackproof.spec.errors import UsageError

MODEL = "a run directory or a step folder"
RUN = "a run directory, the folder given to --run-dir"
DATA_SET, BUILDS_ONE = "a folder with manifest.json", "stack data build SRC… --out DIR makes one"
MAKES_ONE = "stack train --run-dir DIR makes one"
PICKLES = (b"\x80", b"PK")  # first bytes of a pickle, and of the zip archive of torch.save


def folder_at(path: Path, what: str, *, allowed: str, next_step: str) -> Path:
    """The path, if it is a folder. Raises UsageError otherwise; `what` names the argument."""
    if not path.is_dir():
        why = "is a file and must be a folder" if path.exists() else "names nothing"
        raise _wrong(path, what, why, allowed, next_step)
    return path


def file_at(path: Path, what: str, *, allowed: str, next_step: str) -> Path:
    """The path, if it is a file. Raises UsageError otherwise."""
    if path.is_dir() or not path.exists():
        why = "is a folder and must be a file" if path.exists() else "names nothing"
        raise _wrong(path, what, why, allowed, next_step)
    return path


def model_at(path: Path) -> Path:
    """The folder of MODEL. Raises UsageError for another path. A pickle passes here and is refused
    later as unsafe.
    """
    if path.is_file() and path.open("rb").read(2).startswith(PICKLES):
        return path
    return folder_at(path, "MODEL", allowed=MODEL, next_step=MAKES_ONE)


def text_at(path: Path) -> Path:
    return file_at(path, "--text", allowed="a UTF-8 file", next_step="give the path of a text")


def tokenizer_at(path: Path, what: str = "--tokenizer") -> Path:
    next_step = "give the tokenizer.json of a run or of a Hugging Face folder"
    return file_at(path, what, allowed="a tokenizer.json", next_step=next_step)


def bundle_at(path: Path, what: str) -> Path:
    next_step = "RUN/repro holds one per failed runtime gate"
    return folder_at(path, what, allowed="a folder with repro.json", next_step=next_step)


def _wrong(path: Path, what: str, why: str, allowed: str, next_step: str) -> UsageError:
    return UsageError(
        f"{what} {why}: {path}", value=path.absolute(), allowed=allowed, next_step=next_step
    )


def refuse_unused(beside: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option with a value: it has no effect with `beside`."""
    if given := next((name for name, value in options.items() if value), None):
        raise UsageError(
            f"{given} has no effect with {beside}", next_step=f"leave out {given}, or see --help"
        )
