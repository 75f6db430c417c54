"""`stack evaluate`, `stack sample`."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option, Typer

from stackproof.cli.load_model import OpenedModel
from stackproof.cli.options import Checkpoint, Json, RecordDir, examples
from stackproof.cli.output import emit, print_facts, print_line
from stackproof.cli.paths import refuse_unused, text_at
from stackproof.cli.recording import Claim, OpenRecord, open_record
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import read_text

app = Typer()
MAX_SCORED_BYTES = 256 * 2**20
TokenizerFile = Annotated[
    Path | None,
    Option("--tokenizer", help="Another tokenizer.json; refused unless it is the pinned one."),
]
CLAIM = Claim(
    "evaluate",
    "These weights give this code length on this text, every byte scored exactly once.",
    ("other texts", "the smaller context of the first tokens of the text"),
)
EXAMPLES = examples(
    "stack evaluate runs/pocket-1",
    "stack evaluate runs/pocket-1 --suite domains --every-checkpoint",
    "stack evaluate runs/pocket-1 --suite mine.toml --earlier runs/audit-1 --grades graded.jsonl",
)


@app.command(epilog=EXAMPLES)
def evaluate(
    model: Checkpoint,
    text: Annotated[
        Path | None, Option(help="A UTF-8 text file. Default: the run's held-out split.")
    ] = None,
    tokenizer: TokenizerFile = None,
    suite: Annotated[
        str | None,
        Option(help="Run a suite of prompts instead, greedily: domains, or a TOML file."),
    ] = None,
    every_checkpoint: Annotated[
        bool,
        Option("--every-checkpoint", help="With --suite: run it on all checkpoints of the run."),
    ] = False,
    earlier: Annotated[
        list[Path] | None,
        Option(help="With --suite: folder of an earlier audit of this run, to include its steps."),
    ] = None,
    grades: Annotated[
        Path | None, Option(help="With --suite: a copy of audits.jsonl with human grades.")
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(min=1, help="Rows per forward. Default: 8. The result does not depend on it."),
    ] = None,
    stride: Annotated[
        int | None,
        Option(min=1, help="Tokens from one window to the next. Default: half the context."),
    ] = None,
    strict_oov: Annotated[
        bool, Option("--strict-oov", help="Exit with code 3 if the tokenizer dropped a character.")
    ] = False,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Measure bits per byte and per character of a text, or run a suite of prompts. Writes a
    record.
    """
    if suite is not None:
        from stackproof.cli.audit import audit_models

        of_texts = {"--text": text, "--batch-size": batch_size, "--stride": stride}
        refuse_unused("--suite", of_texts | {"--strict-oov": strict_oov})
        return audit_models(
            model,
            suite=suite,
            tokenizer=tokenizer,
            every_checkpoint=every_checkpoint,
            earlier=earlier or (),
            grades=grades,
            run_dir=run_dir,
            json=json,
        )
    refuse_unused(
        "an evaluation without --suite",
        {"--every-checkpoint": every_checkpoint, "--earlier": earlier, "--grades": grades},
    )
    from stackproof.cli.load_model import open_model
    from stackproof.contracts.subject import Subject
    from stackproof.evaluate.bits_per_byte import evaluate_text

    opened = open_model(model, tokenizer)
    seq_len = opened.cfg.model.max_seq_len
    config = opened.cfg.to_dict() | {"evaluate": {"of": "text"}}
    parents = (opened.state["record"],)
    record = open_record(CLAIM, config, run_dir=run_dir, json=json, parents=parents)
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
    document["step"] = int(opened.state["step"])
    scored = _scored(opened, text, result, record.metrics, stride)
    record.judge(Subject(opened=opened.shown(document["step"]), scored=scored))
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
    facts = {k: f"{v:,.4f}" if isinstance(v, float) else v for k, v in document.items()}
    print_facts(f"{document['checkpoint']} on {document['text']}", facts, "record", "run_dir")


def _scored(
    opened: OpenedModel, text: Path | None, score: Any, metrics: dict, stride: int | None
) -> Any:
    """What the gate of scored texts judges; the text and its size are read again."""
    from stackproof.subject.commands import Scored

    if text is None:
        dataset = _dataset(opened)
        texts, n_bytes = list(dataset.validation_texts()), dataset.validation.n_bytes
    else:
        texts, n_bytes = [read_text(text, MAX_SCORED_BYTES)], text.stat().st_size
    seq_len = opened.cfg.model.max_seq_len
    stride = seq_len // 2 or 1 if stride is None else min(stride, seq_len)
    return Scored(
        reader=opened.model,
        tokenizer=opened.tokenizer,
        texts=texts,
        declared_bytes=n_bytes,
        seq_len=seq_len,
        stride=stride,
        score=score,
        metrics=metrics,
    )


def _dataset(opened: OpenedModel) -> Any:
    """The data set of the run."""
    from stackproof.data import plugins
    from stackproof.data.prepare import prepare

    with plugins.permitted((), origin=str(opened.run_dir)):
        return prepare(opened.cfg.data)


def _metrics(record: OpenRecord, result: Any) -> dict:
    """The numbers of an evaluation, for the document; also written into the record."""
    scores = {
        "bits_per_byte": ("bits per byte", result.bytes),
        "bits_per_char": ("bits per character", result.chars),
        "loss_nats": ("nats per token", result.tokens),
        "total_nats": ("nats", None),
    }
    for name, (unit, n) in scores.items():
        record.builder.metric(name, getattr(result, name), unit, n=n, better="lower")
    counts = ("bytes", "chars", "tokens", "dropped_chars", "dropped_bytes")
    for name in counts:
        record.builder.metric(name, getattr(result, name), name)
    return {name: getattr(result, name) for name in (*scores, *counts)}


def _texts(text: Path | None, opened: OpenedModel, record: OpenRecord) -> tuple[list[str], str]:
    """The documents to score and their description. Adds the inputs to the record."""
    from stackproof.spec.records import Artefact

    record.input(opened.weights_file, opened.run_dir)
    record.input(opened.run_dir / "tokenizer.json", opened.run_dir)
    if text is not None:
        try:
            content = read_text(text_at(text), MAX_SCORED_BYTES)
        except OSError as e:
            raise DataError(
                f"cannot read the text {text}: {e}",
                allowed="a UTF-8 file",
                next_step="give --text another file",
            ) from e
        if not content:
            raise DataError(f"the text {text} is empty", next_step="give --text another file")
        record.input(text)
        return [content], str(text)
    dataset = _dataset(opened)
    if dataset.tokenizer.sha256 != opened.tokenizer.sha256:
        raise DataError(
            "the corpus of the run has changed, so its held-out split is not available",
            next_step="give --text FILE",
        )
    record.builder.inputs += [Artefact(**entry) for entry in dataset.inputs()]
    return list(dataset.validation_texts()), f"held-out split of {opened.cfg.data.corpus.kind}"


@app.command()
def sample(
    model: Checkpoint,
    prompt: Annotated[str, Option(help="Text to continue.")] = "The ",
    max_new_tokens: Annotated[int, Option(min=1)] = 128,
    temperature: Annotated[float, Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, Option(min=0, help="Keep the k most likely tokens; 0 keeps all.")] = 50,
    top_p: Annotated[
        float, Option(min=0.0, max=1.0, help="Keep the smallest set with this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[float, Option(min=0.01, help="Above 1 repeats less.")] = 1.0,
    seed: Annotated[int, Option(min=0, help="The same seed gives the same text.")] = 0,
    count: Annotated[int, Option(min=1, help="How many samples.")] = 1,
    tokenizer: TokenizerFile = None,
    json: Json = False,
) -> None:
    """Generate a continuation of a prompt, and print it with its coherence score."""
    from stackproof.cli.load_model import open_model
    from stackproof.contracts.coherence import coherence
    from stackproof.contracts.drawn import DrawOptions
    from stackproof.contracts.events import Sampled
    from stackproof.contracts.keeper import Gatekeeper
    from stackproof.contracts.subject import Subject
    from stackproof.evaluate.sampling import generate
    from stackproof.spec.gates import load_spec
    from stackproof.subject.commands import drawn
    from stackproof.train.rng import generator

    if not 0 < top_p <= 1:
        raise UsageError("--top-p is a probability", value=top_p, allowed="above 0, at most 1")
    opened = open_model(model, tokenizer)
    encoding, eos_id = opened.tokenizer.encode(prompt), opened.tokenizer.eos_id
    keeper, step = Gatekeeper(load_spec(), kind="sample"), int(opened.state["step"])
    declared = DrawOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_id)
    samples = []
    for index in range(count):
        ids = generate(
            opened.model,
            [eos_id, *encoding.ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            generator=generator(seed, "cli-sample", index),
            eos_id=eos_id,
        )
        text = opened.tokenizer.decode([i for i in ids if i != eos_id])
        score = coherence(text, opened.cfg.sample.language).score
        chance = generator(seed, "cli-sample", index)
        made = {"prompt": prompt, "text": text, "tokens": len(ids), "seed": seed, "index": index}
        shown = opened.model, opened.tokenizer, prompt, ids, made["text"]
        keeper.observe(Sampled(step, made["text"], prompt))
        keeper.observe(drawn(*shown, declared, chance, step))
        samples.append(made | {"coherence": score})
    dropped = encoding.dropped_chars
    document = {"samples": samples, "dropped_prompt_chars": dropped, "step": step}
    keeper.artifact(Subject(opened=opened.shown(document["step"])))
    if failure := keeper.unjudged("sample", {}):
        raise failure
    if not emit(document | {"checkpoint": str(opened.folder)}, json):
        if dropped:
            text = "character(s) of the prompt are outside the vocabulary and were left out"
            print_line(f"{dropped} {text}", "yellow")
        for one in samples:
            print_line(one["prompt"] + one["text"])
            print_line(f"— {one['tokens']} tokens, coherence {one['coherence']:.0f}/100", "dim")
