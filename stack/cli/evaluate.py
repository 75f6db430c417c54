"""`stack evaluate`, `stack sample`, `stack inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stackproof.cli.load_model import OpenedModel
from stackproof.cli.output import Json, emit, stdout, table
from stackproof.cli.paths import model_at, refuse_unused, text_at
from stackproof.cli.recording import OpenRecord, RecordDir, open_record
from stackproof.spec.errors import DataError, UsageError

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run directory or a checkpoint folder.")
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", help="Another tokenizer.json; refused unless it is the pinned one."
    ),
]
CLAIM = "These weights give this code length on this text, every byte scored exactly once."
NOT_COVERED = (
    "other texts",
    "the smaller context of the first tokens of the text",
)
EVALUATIONS = (
    "stack evaluate runs/pocket-1",
    "stack evaluate runs/pocket-1 --suite domains --every-checkpoint",
    "stack evaluate runs/pocket-1 --suite mine.toml --earlier runs/audit-1 --grades graded.jsonl",
)


def register(app: typer.Typer) -> None:
    app.command("evaluate", epilog="Examples: " + " · ".join(EVALUATIONS))(evaluate)
    app.command("sample")(sample)
    app.command("inspect")(inspect)


def evaluate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A UTF-8 text file. Default: the run's held-out split."),
    ] = None,
    tokenizer: TokenizerFile = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", help="Run a suite of prompts instead, greedily: domains, or a TOML file."
        ),
    ] = None,
    every_checkpoint: Annotated[
        bool,
        typer.Option(
            "--every-checkpoint", help="With --suite: run it on all checkpoints of the run."
        ),
    ] = False,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--earlier",
            help="With --suite: folder of an earlier audit of this run, to include its steps.",
        ),
    ] = None,
    grades: Annotated[
        Path | None,
        typer.Option(
            "--grades",
            help="With --suite: a copy of audits.jsonl with human grades.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Rows per forward. Default: 8. The result does not depend on it.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=1, help="Tokens from one window to the next. Default: half the context."
        ),
    ] = None,
    strict_oov: Annotated[
        bool,
        typer.Option("--strict-oov", help="Exit with code 3 if the tokenizer dropped a character."),
    ] = False,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Measure bits per byte and per character of a text, or run a suite of prompts. Writes a
    record.
    """
    if suite is not None:
        from stackproof.cli.audit import audit_models

        refuse_unused(
            "--suite",
            {
                "--text": text,
                "--batch-size": batch_size,
                "--stride": stride,
                "--strict-oov": strict_oov,
            },
        )
        options = {"every_checkpoint": every_checkpoint, "earlier": earlier or (), "grades": grades}
        return audit_models(
            model, suite=suite, tokenizer=tokenizer, run_dir=run_dir, json=json, **options
        )
    refuse_unused(
        "an evaluation without --suite",
        {"--every-checkpoint": every_checkpoint, "--earlier": earlier, "--grades": grades},
    )
    from stackproof.cli.load_model import open_model
    from stackproof.evaluate.bits_per_byte import evaluate_text

    opened = open_model(model, tokenizer)
    parents, seq_len = (opened.state["record"],), opened.cfg.model.max_seq_len
    record = open_record(
        "evaluate",
        opened.cfg.to_dict(),
        CLAIM,
        NOT_COVERED,
        run_dir=run_dir,
        json=json,
        parents=parents,
    )
    texts, source = _texts(text, opened, record)
    result = evaluate_text(
        opened.model,
        opened.tokenizer,
        texts,
        seq_len=seq_len,
        stride=min(stride or max(1, seq_len // 2), seq_len),
        batch_size=batch_size or 8,
    )
    document = _metrics(record, result) | {"text": source, "checkpoint": str(opened.folder)}
    reason, error, dropped = "scored every byte", None, result.dropped_chars
    if strict_oov and dropped:
        reason = f"{dropped} characters outside the vocabulary"
        error = DataError(
            "the text holds characters that are not in the vocabulary",
            value=f"{dropped} of {result.chars + dropped} characters",
            next_step=(
                "drop --strict-oov to score the rest (they are counted), or train with a byte or "
                "bpe tokenizer"
            ),
        )
    record.close(reason, document, _show, error=error)


def _show(document: dict) -> None:
    rows = [
        [k, f"{v:,.4f}" if isinstance(v, float) else v]
        for k, v in document.items()
        if k not in ("record", "run_dir")
    ]
    stdout.print(table(f"{document['checkpoint']} on {document['text']}", ["what", "value"], rows))


def _metrics(record: OpenRecord, result: Any) -> dict:
    """The numbers of an evaluation, for the document; also written into the record."""
    names = (
        "bits_per_byte bits_per_char loss_nats total_nats bytes chars tokens dropped_chars "
        "dropped_bytes"
    ).split()
    units = {
        "bits_per_byte": "bits per byte",
        "bits_per_char": "bits per character",
        "loss_nats": "nats per token",
        "total_nats": "nats",
    }
    counts = {
        "bits_per_byte": result.bytes,
        "bits_per_char": result.chars,
        "loss_nats": result.tokens,
    }
    for name in names:
        better = "lower" if name in units else "neither"
        record.builder.metric(
            name, getattr(result, name), units.get(name, name), n=counts.get(name), better=better
        )
    return {name: getattr(result, name) for name in names}


def _texts(text: Path | None, opened: OpenedModel, record: OpenRecord) -> tuple[list[str], str]:
    """The documents to score and their description. Adds the inputs to the record."""
    from stackproof.spec.records import Artefact

    record.input(opened.folder / "model.safetensors", opened.run_dir)
    record.input(opened.run_dir / "tokenizer.json", opened.run_dir)
    if text is not None:
        try:
            content = text_at(text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(
                f"cannot read the text {text}: {e}",
                allowed="a UTF-8 file",
                next_step="give --text another file",
            ) from e
        if not content:
            raise DataError(
                f"the text {text} is empty",
                next_step="give --text another file",
            )
        record.input(text)
        return [content], str(text)
    from stackproof.data.prepare import prepare

    dataset = prepare(opened.cfg.data)
    if dataset.tokenizer.sha256 != opened.tokenizer.sha256:
        raise DataError(
            "the corpus of the run has changed, so its held-out split is not available",
            next_step="give --text FILE",
        )
    record.builder.inputs += [Artefact(**entry) for entry in dataset.inputs()]
    return list(dataset.validation_texts()), f"held-out split of {opened.cfg.data.corpus.kind}"


def sample(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "The ",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Keep the k most likely tokens; 0 keeps all.")
    ] = 50,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", min=0.0, max=1.0, help="Keep the smallest set with this probability."
        ),
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.01, help="Above 1 repeats less.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The same seed gives the same text.")
    ] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="How many samples.")] = 1,
    tokenizer: TokenizerFile = None,
    json: Json = False,
) -> None:
    """Generate a continuation of a prompt, and print it with its coherence score."""
    from stackproof.cli.load_model import open_model
    from stackproof.contracts.coherence import coherence
    from stackproof.evaluate.sampling import generate
    from stackproof.train.rng import generator

    if not 0 < top_p <= 1:
        raise UsageError("--top-p is a probability", value=top_p, allowed="above 0, at most 1")
    opened = open_model(model, tokenizer)
    encoding = opened.tokenizer.encode(prompt)
    samples = []
    for index in range(count):
        ids = generate(
            opened.model,
            [opened.tokenizer.eos_id, *encoding.ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            generator=generator(seed, "cli-sample", index),
            eos_id=opened.tokenizer.eos_id,
        )
        text = opened.tokenizer.decode([i for i in ids if i != opened.tokenizer.eos_id])
        score = coherence(text, opened.cfg.sample.language)
        samples.append(
            {
                "prompt": prompt,
                "text": text,
                "tokens": len(ids),
                "seed": seed,
                "index": index,
                "coherence": score.score,
            }
        )
    if not emit(
        {
            "samples": samples,
            "dropped_prompt_chars": encoding.dropped_chars,
            "checkpoint": str(opened.folder),
        },
        json,
    ):
        if encoding.dropped_chars:
            stdout.print(
                f"{encoding.dropped_chars} character(s) of the prompt are outside the vocabulary "
                "and were left out",
                style="yellow",
            )
        for one in samples:
            stdout.print(one["prompt"] + one["text"], markup=False)
            stdout.print(
                f"— {one['tokens']} tokens, coherence {one['coherence']:.0f}/100", style="dim"
            )


def inspect(model: Model, json: Json = False) -> None:
    """Show architecture, tensors, counts and checksum of a checkpoint. Exit code 5 if it is
    INVALID.
    """
    from stackproof.spec.errors import CheckpointError
    from stackproof.spec.formulas import parameter_count
    from stackproof.train import checkpoint

    document = _described(checkpoint.find(model_at(model)))
    if document["checksum"] == "VALID":
        document["n_params_formula"] = parameter_count(document["model"], document["vocab_size"])
    if not emit(document, json):
        head = [[k, v] for k, v in document.items() if k not in ("tensors", "model")]
        stdout.print(table("Checkpoint", ["what", "value"], head))
        if "tensors" in document:
            rows = [
                [t["name"], "×".join(map(str, t["shape"])), t["dtype"], f"{t['numel']:,}"]
                for t in document["tensors"]
            ]
            stdout.print(table("Tensors", ["name", "shape", "dtype", "parameters"], rows))
    if document["checksum"] == "INVALID":
        raise CheckpointError(
            "checksum INVALID: " + document["problem"],
            value=document["value"],
            next_step="resume from an older step folder",
        )


def _described(folder: Path) -> dict:
    """Architecture, tensors, counts and checksum of a step folder.
    A damaged folder is reported as INVALID.
    """
    import json

    from stackproof.config import recorded_config
    from stackproof.spec.errors import CheckpointError
    from stackproof.train import checkpoint

    try:
        loaded = checkpoint.load(folder)
    except CheckpointError as e:
        return {
            "path": str(folder),
            "checksum": "INVALID",
            "problem": e.what,
            "value": None if e.value is None else str(e.value),
        }
    tensors = [
        {
            "name": n,
            "shape": list(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "numel": t.numel(),
        }
        for n, t in loaded.model.items()
    ]
    return {
        "path": str(folder),
        "checksum": "VALID",
        "architecture": recorded_config(loaded.state["config"]).model.summary(),
        "step": loaded.state["step"],
        "tokens_seen": loaded.state["tokens_seen"],
        "vocab_size": loaded.state["vocab_size"],
        "model": loaded.state["config"]["model"],
        "n_params": sum(t["numel"] for t in tensors),
        "n_tensors": len(tensors),
        "bytes": sum((folder / f).stat().st_size for f in (*checkpoint.FILES, "manifest.json")),
        "sha256": json.loads((folder / "manifest.json").read_bytes())["files"]["model.safetensors"][
            "sha256"
        ],
        "best": checkpoint.pointed(folder.parent, "best") == folder,
        "tensors": tensors,
    }
