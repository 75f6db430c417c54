"""`stack export`, `stack import`: models for other libraries and from them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from stackproof.cli.output import MARKS, Json, measured_text, stdout, table
from stackproof.cli.paths import folder_at, tokenizer_at
from stackproof.cli.recording import OpenRecord, RecordDir, open_record
from stackproof.spec.errors import GateFailed, IntegrityError, UsageError

EXPORT_CLAIM = (
    "This folder holds these weights, and transformers computes the same as the model, as far as "
    "the gates below pass."
)
IMPORT_CLAIM = (
    "This run directory holds the weights of this folder, and computes the same as transformers, "
    "as far as the gates below pass."
)
NOT_COVERED = (
    "lengths and tokens other than those compared",
    "speed, and arithmetic narrower than float32",
    "other versions of transformers than the one in the environment",
)
UNREAD = (
    "transformers is not installed, so the logits were NOT compared: pip install "
    "'stackproof[hf]', then do it again"
)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run directory or a checkpoint folder.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "export",
        epilog=(
            "Examples: stack export runs/pocket-1 --out hf/pocket · stack export runs/pocket-1 "
            "--out hf/half --dtype bfloat16"
        ),
    )(export)
    app.command(
        "import",
        epilog="Example: stack import downloads/SmolLM2-135M --out runs/smol --max-seq-len 1024",
    )(import_)


def export(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="The folder to write; it must be new or empty.")
    ],
    to: Annotated[str, typer.Option("--to", help="The format: hf.")] = "hf",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the stored weights: float32 or bfloat16.")
    ] = "float32",
    max_shard_bytes: Annotated[
        int, typer.Option("--max-shard-bytes", min=1, help="Largest weight file, bytes of tensors.")
    ] = 5 * 2**30,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Write a model as a Hugging Face folder, and compare its logits with those of transformers.
    Writes a record.
    """
    if to != "hf" or dtype not in ("float32", "bfloat16"):
        raise UsageError(
            "unknown export format",
            value=f"--to {to} --dtype {dtype}",
            allowed="--to hf with --dtype float32 or bfloat16",
        )
    from stackproof.cli.load_model import open_model
    from stackproof.evidence.file_lock import refuse_occupied
    from stackproof.export import huggingface
    from stackproof.export.card import card, training_only
    from stackproof.model.build import n_parameters

    refuse_occupied(out, "--out")
    opened = open_model(model)
    parent = opened.state["record"]
    config = opened.cfg.to_dict() | {"export": {"to": to, "dtype": dtype}}
    record, keeper = _open("export", config, EXPORT_CLAIM, (parent,), run_dir, json)
    record.input(opened.folder / "model.safetensors", opened.run_dir)
    record.input(opened.run_dir / "tokenizer.json", opened.run_dir)
    run, export_id = _record_of(opened.run_dir, parent), record.builder.id
    facts = {
        "n_params": n_parameters(opened.model),
        "dtype": dtype,
        "run": run,
        "parent": parent,
        "export": export_id,
    }
    try:
        made = huggingface.export(
            opened.model,
            opened.tokenizer,
            out,
            keeper,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            card=lambda exported: card(exported, opened.cfg.model, **facts),
        )
    except GateFailed as e:
        _refuse(record, keeper, e, out)
    for name, value in made.rounding.items():
        record.builder.metric(
            name, value, "logits" if "error" in name else "share of positions", better="lower"
        )
    for file in made.files:
        record.output((out / file).resolve(), Path.cwd())
    document = {
        "path": str(out),
        "architecture": made.kind.architecture,
        "dtype": dtype,
        "files": list(made.files),
        "not_carried": training_only(opened.cfg.model),
        **made.rounding,
    }
    _close("Export", record, keeper, document)


def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A folder with config.json, safetensors and tokenizer.json."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The run directory to write; it must be new or empty."),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A tokenizer.json in place of the folder's.")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len",
            min=2,
            help="Context length, tokens, below that of the folder; only for rotary positions.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Import a Hugging Face folder as a run directory, and compare its logits with those of
    transformers. Writes a record into it.
    """
    from stackproof.contracts.subject import Subject
    from stackproof.evidence.file_lock import refuse_occupied
    from stackproof.export import huggingface, parity, reading, vocabulary
    from stackproof.export.import_model import write_run
    from stackproof.model import hugging_face
    from stackproof.recipes.imported import imported

    needed = "a Hugging Face folder: config.json, safetensors and tokenizer.json"
    folder_at(
        folder,
        "FOLDER",
        allowed=needed,
        next_step="download all files of the model, and give their folder",
    )
    if tokenizer is not None:
        tokenizer_at(tokenizer)
    refuse_occupied(out, "--out")
    source = reading.open_folder(folder, max_seq_len=max_seq_len)
    settings = {} if tokenizer else vocabulary.settings(folder)
    made, notes = vocabulary.from_file(
        tokenizer or folder / "tokenizer.json",
        source.vocab_size,
        hugging_face.end_of_text(source.document, settings),
    )
    cfg = imported(source.cfg, out.resolve() / "tokenizer.json")
    record, keeper = _open("import", cfg.to_dict(), IMPORT_CLAIM, (), None, json)
    for file in (*source.files, tokenizer or folder / "tokenizer.json"):
        record.input(file)
    model = reading.load_weights(source)
    try:
        with huggingface.readable(source) as readable:
            keeper.artifact(Subject(exported=parity.Compared(model, readable)))
    except GateFailed as e:
        _refuse(record, keeper, e, out)
    document = {
        "run_dir": str(out),
        "architecture": source.kind.architecture,
        "n_params": sum(p.numel() for p in model.parameters()),
        "vocab_size": made.vocab_size,
        "renamed_tensors": source.renamed,
        "not_carried": list(source.aside),
        "tokenizer": notes,
    }
    record.builder.metric("n_params", document["n_params"], "parameters")
    described = {"folder": str(folder)} | {
        k: document[k] for k in ("architecture", "renamed_tensors", "not_carried", "tokenizer")
    }
    record.directory = out
    finish = partial(write_run, out, cfg, model, made, record.builder, described)
    _close("Import", record, keeper, document, finish)


def _open(
    kind: str, config: dict, claim: str, parents: tuple[str, ...], run_dir: Path | None, json: bool
) -> tuple[OpenRecord, Any]:
    """A record, and the gates of its kind."""
    from stackproof.contracts.keeper import Gatekeeper
    from stackproof.export.parity import version

    record = open_record(
        kind,
        config,
        claim,
        NOT_COVERED,
        run_dir=run_dir,
        json=json,
        parents=parents,
        transformers=version(),
    )
    return record, Gatekeeper(record.builder.spec, kind=kind)


def _record_of(run_dir: Path, record_id: str) -> Any:
    """The record of the run, if it is in the run directory and has this id."""
    from stackproof.spec.records import read_record

    path = run_dir / "metadata.json"
    return record if path.is_file() and (record := read_record(path)).id == record_id else None


def _refuse(record: OpenRecord, keeper: Any, error: GateFailed, out: Path) -> None:
    """Write the record of a failed gate. Raises IntegrityError."""
    record.gates = keeper.results()
    refusal = IntegrityError(
        f"{error.what}; {out} was not written",
        value=f"record {record.builder.id} in {record.directory}",
        allowed="a folder from which transformers computes the same logits",
        next_step=f"stack gates show {error.gate_id}",
    )
    record.close(error.what, error=refusal)


def _close(
    title: str,
    record: OpenRecord,
    keeper: Any,
    document: dict,
    finish: Callable[..., Any] | None = None,
) -> None:
    """Write the record. A comparison that did not run is stated and does not count as passed."""
    record.gates = keeper.results()
    document["gates"] = [{"id": g.id, "verdict": g.verdict} for g in record.gates]
    unread = any(g.verdict == "not_run" for g in record.gates)

    def show(document: dict) -> None:
        rows = [[k, v] for k, v in document.items() if k not in ("gates", "record", "record_dir")]
        stdout.print(table(title, ["what", "value"], rows))
        rows = [
            [g.id, MARKS[g.verdict], g.message or measured_text(dict(g.measured))]
            for g in record.gates
        ]
        stdout.print(table("Gates", ["gate", "verdict", "measured"], rows))
        if unread:
            stdout.print(UNREAD, style="yellow")

    record.close(
        UNREAD if unread else "every gate passed",
        document,
        show,
        finish=finish,
        directory_key="record_dir",
    )
