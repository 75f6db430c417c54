"""`stack data build | show | verify | overlap | report`."""

import glob
import os
import sys
import time
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from stackproof.cli.options import Json, examples
from stackproof.cli.output import emit, note, note_over, print_gates, print_line, print_table
from stackproof.cli.paths import BUILDS_ONE, DATA_SET, folder_at
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import remedy, write_atomically

app = Typer(
    name="data",
    help="Build data sets from text of many sources, verify them, compare them with evaluation "
    "sets.",
    no_args_is_help=True,
)
Folder = Annotated[Path, Argument(metavar="DIR", help="A folder that stack data build wrote.")]
PLAIN_LINE_EVERY_S = 5.0
EXAMPLES = examples(
    "stack data build notes/ --out data/notes",
    "stack data build mixture.toml --out data/mix",
    "stack data build 'shards/*.jsonl.zst' --out data/web --text-field content --vocab-size 32000",
)


@app.command(epilog=EXAMPLES)
def build(
    sources: Annotated[
        list[str], Argument(metavar="SRC…", help="One mixture .toml, or files, folders and globs.")
    ],
    out: Annotated[Path, Option(help="Folder of the data set. An interrupted build resumes here.")],
    vocab_size: Annotated[
        int | None, Option(min=258, help="Train a BPE tokenizer of this size. Default: 1024.")
    ] = None,
    tokenizer: Annotated[
        Path | None, Option(help="Use this tokenizer.json instead of training one.")
    ] = None,
    documents: Annotated[
        str | None, Option(help="Unit of one document: file (default), paragraph or line.")
    ] = None,
    text_field: Annotated[
        str | None, Option(help="Key of the text in .jsonl, column in .parquet. Default: text.")
    ] = None,
    language: Annotated[
        list[str] | None, Option(help="Language of the text, en by default. Repeatable.")
    ] = None,
    license: Annotated[str | None, Option(help="Licence of the text, for the record.")] = None,
    against: Annotated[
        list[Path] | None, Option(help="Evaluation set to exclude from the data. Repeatable.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Change one value: split.validation_frac=0.01. Repeatable."),
    ] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes. Default: all cores.")] = None,
    json: Json = False,
) -> None:
    """Read, filter, deduplicate and tokenise text, write shards, and account for every document.
    Writes a record.
    """
    from stackproof.data import account, plugins, prepare
    from stackproof.data import build as builder

    of_files = {"documents": documents, "text_field": text_field, "license": license}
    cfg = _config(
        sources,
        {k: v for k, v in (of_files | {"language": language or None}).items() if v is not None},
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        against=against or (),
        sets=set_ or (),
    )
    record, started = account.open_record(cfg), time.perf_counter()
    fresh = not (out / "manifest.json").is_file()
    try:
        # named by the command line, or by the mixture file that it names
        with plugins.permitted(cfg.filters):
            builder.build(
                cfg, out, workers=workers or os.cpu_count() or 1, on_progress=_Bar(quiet=json)
            )
    except KeyboardInterrupt:
        note(f"\nstopped; finished parts are in {out}/.work; the same command resumes the build")
        raise
    seconds = time.perf_counter() - started
    dataset = prepare.open_folder(out, cfg)
    results, failure = account.judge(dataset)
    try:
        if fresh or not (out / "metadata.json").is_file():
            account.write_record(record, cfg, dataset, results, seconds)
        page = account.page(dataset.manifest, results)
        write_atomically(out / "report.html", page.encode())
    except OSError as e:
        raise DataError(
            f"the record could not be written to {out}: {e}",
            next_step=f"{remedy(e)}, then give the same command again",
        ) from e
    if not _print(out, dataset.manifest, results, json):
        print_line(f"record {out / 'metadata.json'}, page {out / 'report.html'}")
        if all(r.verdict != "fail" for r in results):
            print_line(f"next  stack train --data {out}")
    if failure is not None:
        raise failure


def _config(
    sources: Sequence[str],
    of_files: dict[str, Any],
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    against: Sequence[Path],
    sets: Sequence[str],
) -> Any:
    """The `data` section of a configuration from the command line. `of_files` are the options that
    a mixture file states for each of its sources.
    """
    from stackproof.config import load_config, load_mixture
    from stackproof.recipes import recipe

    if tokenizer is not None and vocab_size is not None:
        raise UsageError(
            "--tokenizer and --vocab-size exclude each other",
            next_step="leave out --vocab-size: the tokenizer defines it",
        )
    is_mixture = any(s.endswith(".toml") for s in sources)
    if is_mixture and len(sources) > 1:
        raise UsageError(
            "a mixture file cannot be combined with other sources",
            next_step="add the other sources to it, as [[source]] tables",
        )
    if is_mixture and of_files:
        raise UsageError(
            f"--{next(iter(of_files)).replace('_', '-')} cannot be combined with a mixture file",
            next_step="write the value into its [[source]] table",
        )
    if absent := [s for s in sources if not (glob.has_magic(s) or Path(s).expanduser().exists())]:
        raise UsageError(
            f"SRC names nothing: {absent[0]}",
            value=Path(absent[0]).absolute(),
            allowed="files, folders and globs, or one mixture file",
            next_step="check the path",
        )
    base, given = recipe("pocket"), {}
    if is_mixture:
        base = base.model_copy(update={"data": load_mixture(Path(sources[0]))})
    else:
        given = {"corpus.kind": "files", "corpus.paths": list(sources)}
        given |= {"corpus." + k.replace("language", "languages"): v for k, v in of_files.items()}
    if tokenizer is not None:
        given |= {"tokenizer.kind": "file", "tokenizer.path": str(tokenizer)}
    elif vocab_size is not None:
        given |= {"tokenizer.kind": "bpe", "tokenizer.vocab_size": vocab_size}
    if against:
        given["decontaminate"] = [str(p) for p in against]
    lines = (*(f"{k}={dumps(v)}" for k, v in given.items()), *sets)
    return load_config(base, sets=tuple(f"data.{x.removeprefix('data.')}" for x in lines))[0].data


class _Bar:
    """Progress of a build: a bar with MB/s, drops and time left on a terminal,
    a line every few seconds elsewhere.
    """

    def __init__(self, *, quiet: bool):
        self.live = sys.stderr.isatty() and not quiet
        self.stage, self.started, self.last_line_s = "", 0.0, 0.0

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if progress.stage != self.stage:
            if self.live and self.stage:
                note("")
            self.stage, self.started = progress.stage, now
            self.last_line_s = -PLAIN_LINE_EVERY_S
        done = progress.done_bytes >= progress.total_bytes
        if not self.live and now - self.last_line_s < PLAIN_LINE_EVERY_S and not done:
            return
        self.last_line_s = now
        (note_over if self.live else note)(self._line(progress, now - self.started))

    def _line(self, p: Any, seconds: float) -> str:
        counts = f"{p.documents:,} documents" + (f", {p.dropped:,} dropped" if p.dropped else "")
        if not p.total_bytes:
            return f"· {p.stage:<14} {counts}"
        rate = p.done_bytes / max(seconds, 1e-9)
        left = (p.total_bytes - p.done_bytes) / rate if p.done_bytes else float("nan")
        filled = round(24 * p.done_bytes / p.total_bytes)
        eta = f"  ETA {left:.0f} s" if left == left else ""
        return (
            f"· {p.stage:<14} {'█' * filled}{'·' * (24 - filled)} {p.done_bytes / 1e6:,.1f} MB  "
            f"{rate / 1e6:.1f} MB/s  {counts}{eta}"
        )


def _document(folder: Path, manifest: dict, results: list) -> dict[str, Any]:
    from stackproof.data import receipts

    return {
        "folder": str(folder),
        "sources": receipts.table(manifest["sources"]),
        "splits": {
            k: {n: s[n] for n in ("tokens", "documents", "bytes")}
            for k, s in manifest["splits"].items()
        },
        "tokenizer": manifest["tokenizer"],
        "decontamination": manifest["decontamination"],
        "gates": [{"id": g.id, "verdict": g.verdict, "message": g.message} for g in results],
    }


def _print(folder: Path, manifest: dict, results: list, json: bool) -> bool:
    """Print a data set: as JSON, or as tables. Returns `json`."""
    from stackproof.data import account, receipts

    if emit(_document(folder, manifest, results), json):
        return True
    counts, sources = ("in", "out", "dropped"), manifest["sources"]
    rows = [
        [r["source"], *(f"{r[k]:,}" for k in counts), f"{r['dropped_frac']:.1%}"]
        for r in receipts.table(sources)
    ]
    print_table("Documents", ["source", *counts, "share"], rows)
    rows = [
        [s["name"], reason, f"{row['documents']:,}", row["example"] or "–"]
        for s in sources
        for reason, row in sorted(s["receipt"]["dropped"].items())
    ]
    if rows:
        print_table("Dropped", ["source", "reason", "documents", "the first"], rows)
    limits = ("weight", "cap", "floor")
    rows = [
        [
            *(s["name"], s["license"], ",".join(s["languages"]), *(s[k] for k in limits)),
            *(f"{n:,}" for n in s["tokens"].values()),
        ]
        for s in sources
    ]
    heads = ["source", "licence", "languages", *limits, "train tokens", "held-out"]
    print_table("Sources", heads, rows)
    t = manifest["tokenizer"]
    size = f"{t['vocab_size']:,} entries, sha256 {t['sha256'][:12]}…"
    tokenizer = f"tokenizer {t['kind']}, {size}, encoded by {t['encoder']}"
    for text in (*account.notices(manifest), tokenizer):
        print_line(text)
    if results:
        print_gates(results)
    return False


def _open(folder: Path, verify: str = "size"):
    from stackproof.config import DataConfig
    from stackproof.data.prepare import open_folder

    needed = {"allowed": DATA_SET, "next_step": BUILDS_ONE}
    if not (folder_at(folder, "DIR", **needed) / "manifest.json").is_file():
        raise DataError(f"{folder} holds no data set", value=folder.absolute(), **needed)
    return open_folder(folder, DataConfig(verify=verify))


@app.command()
def show(folder: Folder, json: Json = False) -> None:
    """Show sources, dropped documents by reason, shares, splits and tokenizer."""
    _print(folder, _open(folder).manifest, [], json)


@app.command()
def verify(folder: Folder, json: Json = False) -> None:
    """Hash every shard and run every gate that needs only a data set.
    Exit code 3 for damage, 4 for a failed gate.
    """
    from stackproof.data import account

    dataset = _open(folder, "full")
    account.require_recorded(folder)
    results, failure = account.judge(dataset)
    _print(folder, dataset.manifest, results, json)
    if failure is not None:
        raise failure


@app.command()
def overlap(
    folder: Folder,
    against: Annotated[list[Path], Option(help="An evaluation set: .jsonl or text. Repeatable.")],
    field: Annotated[
        list[str] | None,
        Option(help="Key of a text in .jsonl. Repeatable. Default: all keys with text."),
    ] = None,
    json: Json = False,
) -> None:
    """Count training documents that share a run of 13 words with an evaluation set.
    Exit code 3 if the scanner does not find the canary.
    """
    from stackproof.data import account
    from stackproof.data.files import evaluation_texts

    texts = [
        t
        for path in against
        for record in evaluation_texts(path, tuple(field or ()))
        for t in record
    ]
    found = account.overlap(_open(folder), texts)
    if not emit({"folder": str(folder), "against": [str(p) for p in against], **found}, json):
        rows = [
            [name, f"{r['documents']:,}", f"{r['hits']:,}"] for name, r in found["sources"].items()
        ]
        print_table(
            f"Overlap by {found['gram_words']} words",
            ["source", "documents", "with shared words"],
            rows,
        )
        print_line(
            f"{found['evaluation_texts_touched']:,} of {found['evaluation_texts_long_enough']:,} "
            "evaluation texts share words with the data; the canary was "
            f"{'found' if found['canary_found'] else 'NOT FOUND'}"
        )
    if not found["canary_found"]:
        raise DataError(
            "the scanner did not find the canary, an evaluation text hidden in a document, so its "
            "counts are not valid",
            value=(
                f"{found['evaluation_texts_long_enough']} texts of at least {found['gram_words']} "
                "words"
            ),
            next_step="check --against and --field",
        )


@app.command()
def report(
    folder: Folder,
    out: Annotated[
        Path | None, Option(help="Where to write the page. Default: DIR/report.html.")
    ] = None,
    json: Json = False,
) -> None:
    """Write an HTML report of a data set: sources, drops by reason, examples, gates."""
    from stackproof.data import account

    dataset = _open(folder)
    results, _ = account.judge(dataset)
    path = out or folder / "report.html"
    try:
        write_atomically(path, account.page(dataset.manifest, results).encode())
    except OSError as e:
        raise UsageError(
            f"the page could not be written: {e}",
            allowed="a file in a writable folder",
            next_step="another --out",
        ) from e
    if not emit({"page": str(path), **_document(folder, dataset.manifest, results)}, json):
        print_line(f"wrote {path}")
