"""`stack export`, `stack import`: models for other libraries and from them."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from stackproof.cli.options import Checkpoint, Json, RecordDir, examples
from stackproof.cli.output import print_facts, print_gates, print_line
from stackproof.cli.paths import folder_at, tokenizer_at
from stackproof.cli.recording import Claim, OpenRecord, open_record
from stackproof.spec.errors import GateFailed, IntegrityError, UsageError

NOT_COVERED = (
    "lengths and tokens other than those compared",
    "speed, and arithmetic narrower than float32",
    "other versions of transformers than the one in the environment",
)
EXPORTED = Claim(
    "export",
    "This folder holds these weights, and transformers computes the same as the model, as far as "
    "the gates below pass.",
    NOT_COVERED,
)
IMPORTED = Claim(
    "import",
    "This run directory holds the weights of this folder, and computes the same as transformers, "
    "as far as the gates below pass.",
    NOT_COVERED,
)
UNREAD = (
    "transformers is not installed, so the logits were NOT compared: pip install "
    "'stackproof[hf]', then do it again"
)

app = Typer()
EXAMPLES = examples(
    "stack export runs/pocket-1 --out hf/pocket",
    "stack export runs/pocket-1 --out hf/half --dtype bfloat16",
)


@app.command(epilog=EXAMPLES)
def export(
    model: Checkpoint,
    out: Annotated[Path, Option(help="The folder to write; it must be new or empty.")],
    to: Annotated[str, Option(help="The format: hf.")] = "hf",
    dtype: Annotated[
        str, Option(help="Dtype of the stored weights: float32 or bfloat16.")
    ] = "float32",
    max_shard_bytes: Annotated[
        int, Option(min=1, help="Largest weight file, bytes of tensors.")
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
    from stackproof.contracts.card import CardFacts
    from stackproof.contracts.subject import Subject
    from stackproof.evidence.file_lock import refuse_occupied
    from stackproof.export import huggingface
    from stackproof.export.card import training_only, write_card
    from stackproof.model.build import n_parameters

    refuse_occupied(out, "--out")
    opened = open_model(model)
    parent = opened.state["record"]
    config = opened.cfg.to_dict() | {"export": {"to": to, "dtype": dtype}}
    record = _open(EXPORTED, config, run_dir=run_dir, json=json, parents=(parent,))
    record.input(opened.weights_file, opened.run_dir)
    record.input(opened.run_dir / "tokenizer.json", opened.run_dir)
    step = int(opened.state["step"])
    record.judge(Subject(opened=opened.shown(step)))
    trained = {"step": step, "parent": parent, "run": _record_of(opened.run_dir, parent)}

    def card(folder: Path, made: huggingface.Exported) -> None:
        verdicts = {"gates": made.gates, "rounding": made.rounding}
        facts = CardFacts(opened.cfg.model, export=record.builder.id, **trained, **verdicts)
        form = {"architecture": made.kind.architecture, "dtype": dtype}
        write_card(folder, facts, n_params=n_parameters(opened.model), **form)

    try:
        made = huggingface.export(
            opened.model,
            opened.tokenizer,
            out,
            record.keeper,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            card=card,
        )
    except GateFailed as e:
        _refuse(record, e, out)
    for name, value in made.rounding.items():
        unit = "logits" if "error" in name else "share of positions"
        record.builder.metric(name, value, unit, better="lower")
    for file in made.files:
        record.output((out / file).resolve(), Path.cwd())
    document = {
        "path": str(out),
        "architecture": made.kind.architecture,
        "step": step,
        "dtype": dtype,
        "files": list(made.files),
        "not_carried": training_only(opened.cfg.model),
        **made.rounding,
    }
    _close("Export", record, document)


@app.command(
    "import",
    epilog=examples("stack import downloads/SmolLM2-135M --out runs/smol --max-seq-len 1024"),
)
def import_(
    folder: Annotated[
        Path,
        Argument(
            metavar="FOLDER", help="A folder with config.json, safetensors and tokenizer.json."
        ),
    ],
    out: Annotated[Path, Option(help="The run directory to write; it must be new or empty.")],
    tokenizer: Annotated[
        Path | None, Option(help="A tokenizer.json in place of the folder's.")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        Option(
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

    folder_at(
        folder,
        "FOLDER",
        allowed="a Hugging Face folder: config.json, safetensors and tokenizer.json",
        next_step="download all files of the model, and give their folder",
    )
    if tokenizer is not None:
        tokenizer_at(tokenizer)
    refuse_occupied(out, "--out")
    source = reading.open_folder(folder, max_seq_len=max_seq_len)
    file = tokenizer or folder / "tokenizer.json"
    settings = {} if tokenizer else vocabulary.settings(folder)
    end_of_text = hugging_face.end_of_text(source.document, settings)
    made, notes = vocabulary.from_file(file, source.vocab_size, end_of_text)
    cfg = imported(source.cfg, out.resolve() / "tokenizer.json")
    record = _open(IMPORTED, cfg.to_dict(), run_dir=None, json=json)
    for read in (*source.files, file):
        record.input(read)
    model = reading.load_weights(source)
    try:
        with huggingface.readable(source) as readable:
            record.keeper.artifact(Subject(exported=parity.Compared(model, readable)))
    except GateFailed as e:
        _refuse(record, e, out)
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
    _close("Import", record, document, finish=finish)


def _open(claim: Claim, config: dict, **options: Any) -> OpenRecord:
    """A record. Where the other library is not installed, its gates cannot look."""
    from stackproof.export.parity import version

    record = open_record(claim, config, transformers=version(), **options)
    record.unasked = () if version() else ("export.logit-parity", "export.folder")
    return record


def _record_of(run_dir: Path, record_id: str) -> Any:
    """The record of the run, if it is in the run directory and has this id."""
    from stackproof.spec.records import read_record

    path = run_dir / "metadata.json"
    return record if path.is_file() and (record := read_record(path)).id == record_id else None


def _refuse(record: OpenRecord, error: GateFailed, out: Path) -> None:
    """Write the record of a failed gate. Raises IntegrityError."""
    refusal = IntegrityError(
        f"{error.what}; {out} was not written",
        value=f"record {record.builder.id} in {record.directory}",
        allowed="a folder from which transformers computes the same logits",
        next_step=f"stack gates show {error.gate_id}",
    )
    record.close(error.what, error=refusal)


def _close(title: str, record: OpenRecord, document: dict, **options: Any) -> None:
    """Write the record. A comparison that did not run is stated and does not count as passed."""
    gates = record.keeper.results()
    document["gates"] = [{"id": g.id, "verdict": g.verdict} for g in gates]
    unread = any(g.verdict == "not_run" for g in gates)

    def show(document: dict) -> None:
        print_facts(title, document, "gates", "record", "record_dir")
        print_gates(gates)
        if unread:
            print_line(UNREAD, style="yellow")

    reason = UNREAD if unread else "every gate passed"
    record.close(reason, document, show, directory_key="record_dir", **options)
