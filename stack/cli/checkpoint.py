"""`stack checkpoint convert`."""

import os
from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from stackproof.cli.options import Checkpoint, Json, examples
from stackproof.cli.output import emit, print_facts
from stackproof.cli.paths import model_at
from stackproof.spec.errors import DataError, UsageError

app = Typer(name="checkpoint", help="Checkpoints: other layouts.", no_args_is_help=True)
LAYOUTS = ("single", "sharded")


@app.callback()
def checkpoint() -> None:
    """A command of its own for each verb, also while there is one."""


@app.command(
    epilog=examples(
        "stack checkpoint convert runs/pocket-8 --out single/pocket-8",
        "stack checkpoint convert single/pocket-8 --out sharded/pocket-8 --layout sharded",
    )
)
def convert(
    model: Checkpoint,
    out: Annotated[Path, Option(help="The folder to write; it must be new or empty.")],
    layout: Annotated[
        str,
        Option(
            help="single: model.safetensors and state.safetensors; sharded: as several ranks "
            "write it, in one part."
        ),
    ] = "single",
    json: Json = False,
) -> None:
    """Write a checkpoint in another layout, with its tokenizer. Every value and the state document
    stay as they are. All commands read both layouts, and --fork begins at either.
    """
    from stackproof.evidence.file_lock import aside, refuse_occupied
    from stackproof.spec.canonical import sha256_bytes
    from stackproof.spec.files import read_bytes, sync, write_atomically
    from stackproof.train import checkpoint

    if layout not in LAYOUTS:
        raise UsageError(
            "--layout is unknown", value=layout, allowed=", ".join(LAYOUTS), next_step="correct it"
        )
    folder = checkpoint.find(model_at(model))
    refuse_occupied(out, "--out")
    loaded = checkpoint.load(folder)
    tokenizer = folder.parent.parent / "tokenizer.json"
    data = read_bytes(tokenizer) if tokenizer.is_file() else None
    if data is not None and sha256_bytes(data) != loaded.state["tokenizer_sha256"]:
        raise DataError(
            f"{tokenizer} is not the tokenizer of this model",
            allowed=f"sha256 {loaded.state['tokenizer_sha256'][:12]}…",
            next_step="restore the tokenizer.json of the run",
        )
    with aside(out) as folder:
        snapshot = checkpoint.snapshot_of(loaded, layout)
        name = checkpoint.write(folder / "checkpoints", snapshot, checkpoint.verify).name
        if data is not None:
            write_atomically(folder / "tokenizer.json", data)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
        sync(out.parent)
    written = out / "checkpoints" / name
    document = {
        "path": str(written),
        "layout": layout,
        "step": loaded.state["step"],
        "bytes": sum(path.stat().st_size for path in checkpoint.files_of(written)),
        "tokenizer": data is not None,
    }
    if not emit(document, json):
        print_facts("Checkpoint", document)
