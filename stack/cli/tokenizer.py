"""`stack tokenizer train | show`."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from stackproof.cli.output import Json, emit, stdout, table
from stackproof.cli.paths import tokenizer_at
from stackproof.spec.errors import DataError, UsageError

app = typer.Typer(
    help="Tokenizers: train byte-level BPE, inspect any tokenizer.json.", no_args_is_help=True
)


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="tokenizer")


@app.command(
    epilog=(
        "Example: stack tokenizer train books/ --out tokenizer.json --vocab-size 32000 --special "
        "'<|user|>'"
    )
)
def train(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC…", help="Files, folders and globs of text, .jsonl or .parquet."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The tokenizer.json to write; an existing file is refused."),
    ],
    vocab_size: Annotated[
        int,
        typer.Option(
            "--vocab-size", min=258, help="Entries, including the 256 bytes and the control tokens."
        ),
    ] = 32_000,
    special: Annotated[
        list[str] | None,
        typer.Option("--special", help="A control token besides the end of text. Repeatable."),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--text-field", help="Key of the text in .jsonl, column in .parquet.")
    ] = "text",
    json: Json = False,
) -> None:
    """Train byte-level BPE on all text of the sources. Equal text gives an equal file."""
    from stackproof.config import Files
    from stackproof.data import corpus
    from stackproof.data.tokenizer import train_bpe

    if out.exists():
        raise UsageError(f"{out} exists", next_step="choose another --out, or delete it")
    cfg = Files(paths=tuple(sources), text_field=text_field)
    seen = [0, 0]

    def texts():
        for document in corpus.read_documents(cfg):
            seen[0] += 1
            seen[1] += len(document.text.encode())
            yield document.text

    tokenizer = train_bpe(vocab_size, texts(), tuple(special or ()))
    if not seen[0]:
        raise DataError(
            "the sources hold no document",
            value=dumps(sources),
            next_step="check the paths and --text-field",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    document = {"path": str(out), "documents": seen[0], "bytes": seen[1], **_facts(tokenizer)}
    if not emit(document, json):
        stdout.print(table("Tokenizer", ["what", "value"], [[k, v] for k, v in document.items()]))
        if tokenizer.vocab_size < vocab_size:
            stdout.print(
                f"the text is too small for --vocab-size: it gives {tokenizer.vocab_size:,} "
                "entries",
                style="yellow",
            )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A tokenizer.json.")],
    json: Json = False,
) -> None:
    """Show a tokenizer.json: size, end-of-text token, control tokens, hash, and the library that
    encodes batches.
    """
    from stackproof.data.tokenizer import load_tokenizer

    document = {"path": str(path), **_facts(load_tokenizer(tokenizer_at(path, "FILE")))}
    if not emit(document, json):
        stdout.print(table("Tokenizer", ["what", "value"], [[k, v] for k, v in document.items()]))


def _facts(tokenizer) -> dict:
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "control_tokens": {str(i): tokenizer.literal(i) for i in sorted(tokenizer.control_ids)},
        "sha256": tokenizer.sha256,
        "encoder": getattr(tokenizer, "encoder", "stackproof"),
    }
