"""What a path on the command line must name before anything is opened:
bad input is a matter of usage, damage is not.
"""

from pathlib import Path
from typing import Annotated

import typer

from stackproof.spec.errors import UsageError

MODEL = "a run directory or a step folder"
RUN = "a run directory, the folder that --run-dir named"
DATA_SET, BUILDS_ONE = "a folder with manifest.json", "stack data build SRC… --out DIR makes one"
MAKES_ONE = "stack train --run-dir DIR makes one"
PICKLES = (b"\x80", b"PK")  # how a pickle begins, and the zip archive that torch.save lays one in


def folder_at(path: Path, what: str, *, allowed: str, next_step: str) -> Path:
    """The path, if a folder is there. `what` names the argument.
    Raises UsageError where nothing is, or a file.
    """
    if not path.is_dir():
        raise _wrong(
            path,
            what,
            "is a file, and it has to be a folder" if path.exists() else "names nothing",
            allowed,
            next_step,
        )
    return path


def file_at(path: Path, what: str, *, allowed: str, next_step: str) -> Path:
    """The path, if something is there that is no folder. Raises UsageError otherwise."""
    if path.is_dir() or not path.exists():
        raise _wrong(
            path,
            what,
            "is a folder, and it has to be a file" if path.exists() else "names nothing",
            allowed,
            next_step,
        )
    return path


def model_at(path: Path) -> Path:
    """The folder that MODEL names. Raises UsageError where nothing is, or a file;
    a pickle is left to be refused as unsafe.
    """
    if path.is_file() and path.open("rb").read(2).startswith(PICKLES):
        return path
    return folder_at(path, "MODEL", allowed=MODEL, next_step=MAKES_ONE)


def text_at(path: Path, what: str = "--text") -> Path:
    return file_at(path, what, allowed="a UTF-8 file", next_step=f"give {what} the path of a text")


def tokenizer_at(path: Path, what: str = "--tokenizer") -> Path:
    return file_at(
        path,
        what,
        allowed="a tokenizer.json",
        next_step="give the tokenizer.json of a run or of a folder of Hugging Face",
    )


def bundle_at(path: Path, what: str) -> Path:
    return folder_at(
        path,
        what,
        allowed="a folder with repro.json",
        next_step="RUN/repro holds one per gate that turned red",
    )


def untaken(run_dir: Path | None) -> Path | None:
    """The folder a record is to be written to.
    Raises UsageError where one lies already: a record is never written over.
    """
    if run_dir is not None and (run_dir / "metadata.json").exists():
        raise UsageError(
            f"--run-dir already holds a record: {run_dir}",
            value=(run_dir / "metadata.json").absolute(),
            allowed="a folder without metadata.json",
            next_step="another --run-dir, or leave it out",
        )
    return run_dir


RecordDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", help="Folder of the record. Default: runs/<record id>.", callback=untaken
    ),
]


def _wrong(path: Path, what: str, why: str, allowed: str, next_step: str) -> UsageError:
    return UsageError(
        f"{what} {why}: {path}", value=path.absolute(), allowed=allowed, next_step=next_step
    )
