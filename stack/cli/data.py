"""`stack data build | show | verify | overlap | report`."""

import os
import sys
import time
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from stackproof.cli.output import MARKS, Json, emit, measured_text, stderr, stdout, table
from stackproof.cli.paths import BUILDS_ONE, DATA_SET, folder_at
from stackproof.spec.errors import DataError, UsageError

app = typer.Typer(
    help="Build data sets from text of many sources, verify them, compare them with evaluation "
    "sets.",
    no_args_is_help=True,
)
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that stack data build wrote.")
]
PLAIN_LINE_EVERY_S = 5.0
EXAMPLES = [
    "stack data build notes/ --out data/notes",
    "stack data build mixture.toml --out data/mix",
    "stack data build 'shards/*.jsonl.zst' --out data/web --text-field content --vocab-size 32000",
]


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="data")


@app.command(epilog="Examples: " + " · ".join(EXAMPLES))
def build(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="One mixture .toml, or files, folders and globs."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the data set. An interrupted build resumes here."),
    ],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", min=258, help="Train a BPE tokenizer of this size. Default: 1024."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Use this tokenizer.json instead of training one."),
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            "--documents", help="Unit of one document: file (default), paragraph or line."
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field", help="Key of the text in .jsonl, column in .parquet. Default: text."
        ),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", help="Language of the text, en by default. Repeatable."),
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence of the text, for the record.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Evaluation set to exclude from the data. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value: split.validation_frac=0.01. Repeatable."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes. Default: all cores.")
    ] = None,
    json: Json = False,
) -> None:
    """Read, filter, deduplicate and tokenise text, write shards, and account for every document.
    Writes a record.
    """
    from stackproof.data import account, prepare
    from stackproof.data import build as builder

    cfg = _config(
        sources,
        vocab_size,
        tokenizer,
        documents,
        text_field,
        language,
        license,
        against,
        tuple(set_ or ()),
    )
    record, started = account.open_record(cfg), time.perf_counter()
    fresh = not (out / "manifest.json").is_file()
    try:
        builder.build(
            cfg, out, workers=workers or os.cpu_count() or 1, on_progress=_Bar(quiet=json)
        )
    except KeyboardInterrupt:
        stderr.print(
            f"\nstopped; finished parts are in {out / '.work'}; the same command resumes the build",
            markup=False,
        )
        raise
    except OSError as e:
        raise UsageError(
            f"cannot write to {out}: {e.strerror}",
            allowed="a writable folder",
            next_step="another --out",
        ) from e
    seconds = time.perf_counter() - started
    dataset = prepare.open_folder(out, cfg)
    results, failure = account.judge(dataset)
    if fresh or not (out / "metadata.json").is_file():
        account.write_record(record, cfg, dataset, results, seconds)
    (out / "report.html").write_text(account.page(dataset.manifest, results), "utf-8")
    if not emit(_document(out, dataset.manifest, results), json):
        _show(dataset.manifest, results)
        stdout.print(f"record {out / 'metadata.json'}, page {out / 'report.html'}", markup=False)
        if all(r.verdict != "fail" for r in results):
            stdout.print(f"next  stack train --data {out}", markup=False)
    if failure is not None:
        raise failure


def _config(
    sources,
    vocab_size,
    tokenizer,
    documents,
    text_field,
    language,
    license,
    against,
    sets: tuple[str, ...],
):
    """The `data` section of a configuration from the command line."""
    from stackproof.config import load_config, load_mixture
    from stackproof.recipes import recipe

    base = recipe("pocket")
    said: list[str] = []
    flags = {"documents": documents, "text_field": text_field, "license": license}
    if tokenizer is not None and vocab_size is not None:
        raise UsageError(
            "--tokenizer and --vocab-size exclude each other",
            next_step="leave out --vocab-size: the tokenizer defines it",
        )
    if len(sources) > 1 and any(s.endswith(".toml") for s in sources):
        raise UsageError(
            "a mixture file cannot be combined with other sources",
            next_step="add the other sources to it, as [[source]] tables",
        )
    if len(sources) == 1 and sources[0].endswith(".toml"):
        if said_flags := [
            f"--{k.replace('_', '-')}" for k, v in {**flags, "language": language}.items() if v
        ]:
            raise UsageError(
                f"{said_flags[0]} cannot be combined with a mixture file",
                next_step="write the value into its [[source]] table",
            )
        base = base.model_copy(update={"data": load_mixture(Path(sources[0]))})
    else:
        said += ["corpus.kind=files", f"corpus.paths={dumps(sources)}"]
        said += [
            f"corpus.{key}={dumps(value)}" for key, value in flags.items() if value is not None
        ]
        said += [f"corpus.languages={dumps(language)}"] if language else []
    if tokenizer is not None:
        said += ["tokenizer.kind=file", f"tokenizer.path={dumps(str(tokenizer))}"]
    elif vocab_size is not None:
        said += ["tokenizer.kind=bpe", f"tokenizer.vocab_size={vocab_size}"]
    said += [f"decontaminate={dumps([str(p) for p in against])}"] if against else []
    return load_config(base, sets=tuple(f"data.{s.removeprefix('data.')}" for s in (*said, *sets)))[
        0
    ].data


class _Bar:
    """Progress of a build: a bar with MB/s, drops and time left on a terminal,
    a line every few seconds elsewhere.
    """

    def __init__(self, *, quiet: bool):
        self.live = sys.stderr.isatty() and not quiet
        self.stage, self.started, self.last_line_s = "", 0.0, 0.0

    def __call__(self, progress: Any) -> None:
        if progress.stage != self.stage:
            if self.live and self.stage:
                stderr.print()
            self.stage, self.started, self.last_line_s = (
                progress.stage,
                time.monotonic(),
                -PLAIN_LINE_EVERY_S,
            )
        now = time.monotonic()
        done = progress.done_bytes >= progress.total_bytes
        if not self.live and now - self.last_line_s < PLAIN_LINE_EVERY_S and not done:
            return
        self.last_line_s = now
        stderr.print(
            self._line(progress, now - self.started),
            end="\r" if self.live else "\n",
            markup=False,
            soft_wrap=True,
        )

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


def _show(manifest: dict, results: list) -> None:
    from stackproof.data import account, receipts

    rows = receipts.table(manifest["sources"])
    shown = [
        [
            r["source"],
            f"{r['in']:,}",
            f"{r['out']:,}",
            f"{r['dropped']:,}",
            f"{r['dropped_frac']:.1%}",
        ]
        for r in rows
    ]
    stdout.print(table("Documents", ["source", "in", "out", "dropped", "share"], shown))
    drops = [
        [s["name"], reason, f"{row['documents']:,}", row["example"] or "–"]
        for s in manifest["sources"]
        for reason, row in sorted(s["receipt"]["dropped"].items())
    ]
    if drops:
        stdout.print(table("Dropped", ["source", "reason", "documents", "the first"], drops))
    declared = [
        [
            s["name"],
            s["license"],
            ",".join(s["languages"]),
            s["weight"],
            s["cap"],
            s["floor"],
            *(f"{n:,}" for n in s["tokens"].values()),
        ]
        for s in manifest["sources"]
    ]
    stdout.print(
        table(
            "Sources",
            [
                "source",
                "licence",
                "languages",
                "weight",
                "cap",
                "floor",
                "train tokens",
                "held-out",
            ],
            declared,
        )
    )
    for line in account.notices(manifest):
        stdout.print(line, markup=False)
    t = manifest["tokenizer"]
    facts = (
        f"tokenizer {t['kind']}, {t['vocab_size']:,} entries, sha256 {t['sha256'][:12]}…, encoded "
        f"by {t['encoder']}"
    )
    stdout.print(facts, markup=False)
    if results:
        gates = [
            [g.id, MARKS[g.verdict], g.message or measured_text(dict(g.measured))] for g in results
        ]
        stdout.print(table("Gates", ["gate", "verdict", "measured"], gates))


def _open(folder: Path, verify: str = "size"):
    from stackproof.config import DataConfig
    from stackproof.data.prepare import open_folder

    if not (
        folder_at(folder, "DIR", allowed=DATA_SET, next_step=BUILDS_ONE) / "manifest.json"
    ).is_file():
        raise DataError(
            f"{folder} holds no data set",
            value=folder.absolute(),
            allowed=DATA_SET,
            next_step=BUILDS_ONE,
        )
    return open_folder(folder, DataConfig(verify=verify))


@app.command()
def show(folder: Folder, json: Json = False) -> None:
    """Show sources, dropped documents by reason, shares, splits and tokenizer."""
    manifest = _open(folder).manifest
    if not emit(_document(folder, manifest, []), json):
        _show(manifest, [])


@app.command()
def verify(folder: Folder, json: Json = False) -> None:
    """Hash every shard and run every gate that needs only a data set.
    Exit code 3 for damage, 4 for a failed gate.
    """
    from stackproof.data import account

    dataset = _open(folder, "full")
    account.require_recorded(folder)
    results, failure = account.judge(dataset)
    if not emit(_document(folder, dataset.manifest, results), json):
        _show(dataset.manifest, results)
    if failure is not None:
        raise failure


@app.command()
def overlap(
    folder: Folder,
    against: Annotated[
        list[Path], typer.Option("--against", help="An evaluation set: .jsonl or text. Repeatable.")
    ],
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field", help="Key of a text in .jsonl. Repeatable. Default: all keys with text."
        ),
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
        stdout.print(
            table(
                f"Overlap by {found['gram_words']} words",
                ["source", "documents", "with shared words"],
                rows,
            )
        )
        stdout.print(
            f"{found['evaluation_texts_touched']:,} of {found['evaluation_texts_long_enough']:,} "
            "evaluation texts share words with the data; the canary was "
            f"{'found' if found['canary_found'] else 'NOT FOUND'}",
            markup=False,
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
        Path | None,
        typer.Option("--out", help="Where to write the page. Default: DIR/report.html."),
    ] = None,
    json: Json = False,
) -> None:
    """Write an HTML report of a data set: sources, drops by reason, examples, gates."""
    from stackproof.data import account

    dataset = _open(folder)
    results, _ = account.judge(dataset)
    path = out or folder / "report.html"
    path.write_text(account.page(dataset.manifest, results), "utf-8")
    if not emit({"page": str(path), **_document(folder, dataset.manifest, results)}, json):
        stdout.print(f"wrote {path}", markup=False)
