"""Arguments and options that several verbs share, and the examples in their help."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from stackproof.spec.errors import UsageError

Json = Annotated[
    bool, Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
Checkpoint = Annotated[
    Path, Argument(metavar="MODEL", help="A run directory or a checkpoint folder.")
]
Evidence = Annotated[
    Path | None, Option(help="Evidence folder. Default: ./evidence, else the checkout's.")
]
Plugins = Annotated[
    list[str] | None,
    Option(
        "--plugin",
        help="Allow this plug-in of the recorded configuration, module:function, to be imported. "
        "Repeatable.",
    ),
]
Sets = Annotated[list[str] | None, Option("--set", help="Change one value: a.b=v. Repeatable.")]


def without_record(run_dir: Path | None) -> Path | None:
    """Raises UsageError if the folder holds a record: records are never overwritten."""
    if run_dir is not None and (run_dir / "metadata.json").exists():
        raise UsageError(
            f"--run-dir already holds a record: {run_dir}",
            value=(run_dir / "metadata.json").absolute(),
            allowed="a folder without metadata.json",
            next_step="choose another --run-dir, or leave it out",
        )
    return run_dir


RecordDir = Annotated[
    Path | None,
    Option(help="Folder of the record. Default: runs/<record id>.", callback=without_record),
]


def examples(*commands: str) -> str:
    """The epilog of a verb's help."""
    return "Examples: " + " · ".join(commands)
