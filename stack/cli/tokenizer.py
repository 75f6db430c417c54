"""`stack tokenizer train | show`."""

from json import dumps
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from stackproof.cli.options import Json, examples
from stackproof.cli.output import emit, print_facts, print_line
from stackproof.cli.paths import tokenizer_at
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import remedy, write_atomically

app = Typer(
    name="tokenizer",
    help="Tokenizers: train byte-level BPE, inspect any tokenizer.json.",
    no_args_is_help=True,
)


@app.command(
    epilog=examples(
        "stack tokenizer train books/ --out tokenizer.json --vocab-size 32000 --special '<|user|>'"
    )
)
def train(
    sources: Annotated[
        list[str],
        Argument(metavar="SRC…", help="Files, folders and globs of text, .jsonl or .parquet."),
    ],
    out: Annotated[Path, Option(help="The tokenizer.json to write; an existing file is refused.")],
    vocab_size: Annotated[
        int, Option(min=258, help="Entries, including the 256 bytes and the control tokens.")
    ] = 32_000,
    special: Annotated[
        list[str] | None, Option(help="A control token besides the end of text. Repeatable.")
    ] = None,
    text_field: Annotated[
        str, Option(help="Key of the text in .jsonl, column in .parquet.")
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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, tokenizer.to_bytes())
    except OSError as e:
        raise DataError(
            f"the tokenizer could not be written: {e}",
            next_step=f"{remedy(e)}, or choose another --out",
        ) from e
    document = {"path": str(out), "documents": seen[0], "bytes": seen[1], **_facts(tokenizer)}
    if not emit(document, json):
        print_facts("Tokenizer", document)
        if tokenizer.vocab_size < vocab_size:
            print_line(
                f"the text is too small for --vocab-size: it gives {tokenizer.vocab_size:,} "
                "entries",
                style="yellow",
            )


@app.command()
def show(
    path: Annotated[Path, Argument(metavar="FILE", help="A tokenizer.json.")], json: Json = False
) -> None:
    """Show a tokenizer.json: size, end-of-text token, control tokens, hash, and the library that
    encodes batches.
    """
    from stackproof.data.tokenizer import load_tokenizer

    document = {"path": str(path), **_facts(load_tokenizer(tokenizer_at(path, "FILE")))}
    if not emit(document, json):
        print_facts("Tokenizer", document)


def _facts(tokenizer) -> dict:
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "control_tokens": {str(i): tokenizer.literal(i) for i in sorted(tokenizer.control_ids)},
        "sha256": tokenizer.sha256,
        "encoder": getattr(tokenizer, "encoder", "stackproof"),
    }
