"""`stack trace`: the points of a model with their statistics, against another one, and the
operation that is guilty of a difference.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stackproof.cli import probing
from stackproof.cli.output import Json, emit, stdout, table
from stackproof.cli.paths import RecordDir
from stackproof.spec.errors import UsageError

PROMPT = "The quick brown fox jumps over the lazy dog."
CLAIM = "Given these tokens, this model computes values with these statistics at these points."
NOT_COVERED = ("other tokens", "points that are listed as unseen")
EXAMPLES = (
    "stack trace runs/pocket-1",
    "stack trace runs/pocket-1 --against hf/pocket --bisect",
    "stack trace runs/pocket-1 --against self@bfloat16",
    "stack trace runs/pocket-1 --weights --against runs/pocket-1/checkpoints/step-00000200",
    "stack trace hf/llama --prompt 'What is 2+2?' --expect 'layers.3.ffn.swiglu.std < 0.1'",
    *probing.EXAMPLES,
)
SHOWN = ("std", "rms", "absmax", "kurtosis", "top_token_energy_frac", "frac_zero")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, besides the model."""

    prompt: str | None
    input_ids: str | None
    points: tuple[str, ...]
    tokens: str
    csv: Path | None
    run_dir: Path | None
    expect: tuple[str, ...]
    json: bool


def register(app: typer.Typer) -> None:
    app.command("trace", epilog="Examples: " + " · ".join(EXAMPLES))(trace)


def trace(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A run directory, a checkpoint, a folder of Hugging Face or a .gguf file. "
            "MODEL@bfloat16, @float64, @reference or @compiled computes it so.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help=f"Text to read. Default: {PROMPT!r}.")
    ] = None,
    input_ids: Annotated[
        str | None, typer.Option("--input-ids", help="Token ids instead of a text: 1,2,3.")
    ] = None,
    points: Annotated[
        list[str] | None,
        typer.Option("--points", help="Only these points; * stands for any part of a name."),
    ] = None,
    tokens: Annotated[
        str,
        typer.Option("--tokens", help="Statistics over all tokens, or the last one: all or last."),
    ] = "all",
    backward: Annotated[
        bool,
        typer.Option(
            "--backward",
            help="Gradients of the mean next-token loss as well; with --against compared.",
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help=(
                "Compare with this MODEL, taken as right; self@WAY is the same one computed "
                "another way."
            ),
        ),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="With --against: find the guilty operation by putting right values in."
        ),
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            help=(
                "With --bisect: a command that is given a safetensors file of logits; exit 0 is "
                "good, 1 is bad."
            ),
        ),
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(
            "--swap",
            help=(
                "Try a cure: layers.3.ffn=reference, =float32 or another precision, =eager where "
                "it is compiled."
            ),
        ),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect", help="A prediction, judged after: 'layers.3.ffn.swiglu.std < 0.1'."
        ),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help=(
                "The parameters instead of a forward; with --against, their change since that "
                "checkpoint."
            ),
        ),
    ] = False,
    nonfinite: probing.Nonfinite = False,
    repro: probing.Repro = None,
    device: probing.Device = None,
    base: probing.Base = None,
    lens: probing.Lens = None,
    lens_file: probing.LensFile = None,
    lens_steps: probing.LensSteps = probing.FITTED,
    text: probing.Text = None,
    ablate: probing.Ablate = None,
    ablate_with: probing.AblateWith = "zero",
    sample: probing.Sample = 0,
    patch: probing.Patch = None,
    source: probing.From = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the figures of all points to this file.")
    ] = None,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Statistics of every point of a forward, what is out of line in them, where two models part,
    and what hangs on a value.

    Writes a record.
    """
    asked = Asked(
        prompt, input_ids, tuple(points or ()), tokens, csv, run_dir, tuple(expect or ()), json
    )
    if probe := probing.asked(locals()):
        return probing.probe(probe, model, asked)
    if model is None:
        raise UsageError(
            "stack trace needs a MODEL, or --repro BUNDLE", next_step="stack trace runs/pocket-1"
        )
    if weights:
        from stackproof.cli.weights import of_weights

        probing.refuse_beside(  # nothing is run, so what says how to run says nothing
            "--weights",
            {
                "--prompt": prompt,
                "--input-ids": input_ids,
                "--points": points,
                "--backward": backward,
                "--bisect": bisect,
            }
            | {"--check": check, "--swap": swap, "--tokens": tokens != "all"},
        )
        return of_weights(model, against, asked)
    if tokens not in ("all", "last"):
        raise UsageError(
            "there are no such tokens", value=f"--tokens {tokens}", allowed="all or last"
        )
    if backward and tokens == "last":
        raise UsageError(
            "the last token has no next one, so the loss has no gradient there",
            value="--tokens last --backward",
            allowed="one of them",
        )
    if against is not None or swap:
        from stackproof.cli.differ import differ

        if tokens != "all":
            raise UsageError(
                "a comparison is of all tokens",
                value=f"--tokens {tokens}",
                next_step="leave it out",
            )
        return differ(
            model,
            against,
            asked,
            backward=backward,
            bisecting=bisect,
            check=check,
            swaps=tuple(swap or ()),
        )
    if bisect or check:
        raise UsageError(
            "there is nothing to bisect",
            value="--bisect" if bisect else "--check",
            next_step="give --against MODEL as well",
        )
    _single(model, asked, backward)


def _single(text: str, asked: Asked, backward: bool) -> None:
    """One model by itself."""
    from stackproof.cli.subjects import open_subject
    from stackproof.trace import expect, side
    from stackproof.trace import trace as traced
    from stackproof.trace.profile import profile

    expected = [expect.parse(e, [*expect.FIGURES, *expect.OF_LAYERS]) for e in asked.expect]
    subject = open_subject(text)
    ids = ids_of(asked, subject)
    one = side(subject.model, subject.way)
    builder = builder_of("trace", CLAIM, NOT_COVERED, [subject], asked, ids=ids, backward=backward)
    with one.around():
        found = traced(
            one.model,
            _tensor(ids),
            asked.points or one.names,
            backward=backward,
            tokens=asked.tokens,
            where=one.where,
        )
    judged = profile(found)
    rows = {r.point: r for r in judged.rows}
    lines = [_line(t, rows.get(t.point.name)) for t in found.points]
    figures = {
        line["point"]: line["stats"] | {k: line[k] for k in expect.OF_LAYERS} for line in lines
    }
    document = {
        "model": subject.title,
        **subject.facts,
        "input_ids": ids,
        "points": lines,
        "first_anomaly": None if judged.first_anomaly is None else asdict(judged.first_anomaly),
        "gains": [asdict(g) for g in judged.gains],
        "verdict": judged.verdict,
        "unseen": list(found.unseen),
        "loss_nats": found.loss_nats,
        "expectations": [
            asdict(j) for j in expect.judge(expected, figures, [*figures, *found.unseen])
        ],
    }
    builder.metric("points", len(lines), "points")
    builder.metric(
        "anomalous_points",
        sum(r.anomalous and not r.massive for r in judged.rows),
        "points",
        n=len(lines),
        better="lower",
    )
    builder.metric(
        "massive_points", sum(bool(r.massive) for r in judged.rows), "points", n=len(lines)
    )
    write(builder, document, asked)
    if not emit(document, asked.json):
        _show(document, judged)


def _line(t: Any, row: Any) -> dict[str, Any]:
    """One point of the document."""
    judged = {
        k: getattr(row, k, None)
        for k in ("ratio_to_previous", "robust_z", "baseline", "anomalous", "massive", "cascade")
    }
    support = asdict(t.stat.support)
    line = {
        "point": t.point.name,
        "layer": t.point.layer,
        "slot": t.point.slot,
        "operation": t.point.operation,
    }
    line |= {"stats": t.stat.as_dict(), "support": support, **judged}
    return line if t.grad is None else line | {"grad": t.grad.as_dict()}


def ids_of(asked: Asked, subject: Any) -> list[int]:
    """The ids to run. Raises UsageError for none, for ids outside the vocabulary and for
    more than the context holds.
    """
    if asked.input_ids is not None:
        if asked.prompt is not None:
            raise UsageError(
                "--prompt and --input-ids say the same thing", next_step="leave one of them out"
            )
        try:
            ids = [int(i) for i in asked.input_ids.split(",")]
        except ValueError as e:
            raise UsageError(
                "these are no token ids",
                value=asked.input_ids,
                allowed="numbers with commas: 1,2,3",
            ) from e
    elif subject.encode is None:
        raise UsageError(
            f"{subject.title} has no tokenizer.json beside it, so a text cannot be read",
            next_step="give --input-ids 1,2,3",
        )
    else:
        ids = subject.encode(PROMPT if asked.prompt is None else asked.prompt)
    if not ids:
        raise UsageError(
            "there is nothing to read",
            value=repr(asked.prompt),
            allowed="a text of at least one token",
            next_step="--prompt 'a text'",
        )
    if min(ids) < 0 or max(ids) >= subject.vocab_size:
        raise UsageError(
            "ids outside the vocabulary", value=ids[:12], allowed=f"0 to {subject.vocab_size - 1}"
        )
    if len(ids) > subject.max_seq_len:
        raise UsageError(
            "the text exceeds the context",
            value=f"{len(ids)} tokens",
            allowed=f"at most {subject.max_seq_len}",
        )
    return ids


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def builder_of(
    kind: str,
    claim: str,
    not_covered: tuple[str, ...],
    subjects: list[Any],
    asked: Asked,
    **options: Any,
) -> Any:
    """The record of a trace: models, tokens and options are its configuration,
    their files its inputs.
    """
    from stackproof.export.parity import version
    from stackproof.spec.building import RecordBuilder, artefact
    from stackproof.spec.canonical import to_jsonable
    from stackproof.spec.gates import load_spec
    from stackproof.spec.provenance import environment

    said = {
        "prompt": asked.prompt,
        "input_ids": asked.input_ids,
        "points": list(asked.points),
        "tokens": asked.tokens,
    }
    models = {f"side_{i}": {"title": s.title, "config": s.config} for i, s in enumerate(subjects)}
    builder = RecordBuilder(
        kind=kind,
        spec=load_spec(),
        config=to_jsonable({"trace": said | {"expect": list(asked.expect)} | options} | models),
        claim=claim,
        not_covered=not_covered,
        environment=environment(transformers=version()),
        parents=tuple(dict.fromkeys(p for s in subjects for p in s.parents)),
    )
    files = {f: s.root for s in subjects for f in s.files}
    builder.inputs = [artefact(f.resolve(), root=root.resolve()) for f, root in files.items()]
    return builder


def write(builder: Any, document: dict[str, Any], asked: Asked) -> None:
    """Write the series that the document holds, trace.json, the CSV if wanted, and the record; the
    document then says where.
    """
    from stackproof.spec.building import artefact, write_atomically
    from stackproof.spec.canonical import canonical_json, to_jsonable

    directory = asked.run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    gradients = document.get("gradients", {})
    series = {"points.jsonl": document["points"], "chain.jsonl": document.get("chain")}
    series |= {"gradients.jsonl": [*gradients.get("points", ()), *gradients.get("parameters", ())]}
    series = {name: lines for name, lines in series.items() if lines}
    for name, lines in series.items():
        write_atomically(
            directory / name, b"".join(canonical_json(to_jsonable(line)) + b"\n" for line in lines)
        )
    write_atomically(directory / "trace.json", canonical_json(to_jsonable(document)))
    builder.outputs = [artefact(directory / "trace.json", root=directory)]
    if asked.csv is not None:
        asked.csv.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(asked.csv, _csv(document["points"]))
        builder.outputs.append(artefact(asked.csv.resolve(), root=Path.cwd()))
    record = builder.finish(
        directory, status="completed", end_reason="traced", exit_code=0, series=tuple(series)
    )
    document |= {"record": record.id, "run_dir": str(directory)}


def _csv(lines: list[dict[str, Any]]) -> bytes:
    """One line per point; what is a table in the document is several columns."""
    import csv
    import io

    flat = [{k: v for k, v in _flat(line) if k != "support.point"} for line in lines]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(k for line in flat for k in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def _flat(table: dict[str, Any], before: str = "") -> Any:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield (
                f"{before}{key}",
                " ".join(map(str, value)) if isinstance(value, list | tuple) else value,
            )


def _show(document: dict[str, Any], judged: Any) -> None:
    """Tables for people: figures, heat map, verdict."""
    import math

    from stackproof.trace.profile import RATIO, ROBUST_Z

    lines = document["points"]
    rows = [
        [
            line["point"]
            + (
                " ◀"
                if line["anomalous"] and not line["massive"]
                else " massive"
                if line["massive"]
                else ""
            ),
            *(f"{line['stats'][f]:.4g}" for f in SHOWN),
            f"{line['stats']['argmax'][0]}:{line['stats']['argmax'][1]}"
            if line["stats"]["argmax"]
            else "",
            number(line["ratio_to_previous"]),
            number(line["robust_z"]),
        ]
        for line in lines
    ]
    columns = ["point", *SHOWN, "peak token:channel", "÷ layer before", "robust z"]
    if document["loss_nats"] is not None:
        columns += ["gradient rms", "gradient absmax"]
        for row, line in zip(rows, lines):
            row += [f"{line['grad'][k]:.4g}" if line.get("grad") else "" for k in ("rms", "absmax")]
    loss = "" if document["loss_nats"] is None else f", loss {document['loss_nats']:.4f} nats"
    stdout.print(
        table(f"{document['model']}, {len(document['input_ids'])} tokens{loss}", columns, rows)
    )
    if any(r.robust_z is not None for r in judged.rows):
        heat(
            {
                (r.layer, r.slot): r.robust_z if math.isfinite(r.std) else math.nan
                for r in judged.rows
            },
            "robust z of std",
            ROBUST_Z,
        )
    else:
        heat(
            {(r.layer, r.slot): _steps(r) for r in judged.rows},
            "std over that of the layer before, powers of two",
            math.log2(RATIO),
        )
    for one in document["expectations"]:
        stdout.print(
            f"{one['verdict']:10} {one['text']}  found {number(one['found'])}", markup=False
        )
    stdout.print(document["verdict"], markup=False)
    stdout.print(
        f"record {document['run_dir']}/metadata.json  ({document['record']})", markup=False
    )


def _steps(row: Any) -> float | None:
    """Without enough layers for a z: the step from the layer before, in powers of two."""
    import math

    ratio = row.ratio_to_previous
    return math.log2(ratio) if ratio is not None and ratio > 0 and math.isfinite(ratio) else None


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def heat(cells: dict[tuple[int, str], float | None], what: str, high: float) -> None:
    """A map of layers by slots: colour from what is usual to what is not,
    in a terminal and as signs elsewhere.
    """
    import math

    from rich.text import Text

    slots = list(dict.fromkeys(s for _, s in cells if not s.startswith("experts.")))
    layers = sorted({layer for layer, _ in cells})
    if not layers:
        return
    stdout.print(
        f"\n{what}: layers down, slots across; · below {high / 2:g}, ▒ from there, █ from "
        f"{high:g}, in size; N no number"
    )
    for i, slot in enumerate(slots):
        stdout.print("    " + "│ " * i + f"┌ {slot}", markup=False)
    for layer in layers:
        line = Text(f"{layer:3d} ")
        for slot in slots:
            value = cells.get((layer, slot))
            size = -1.0 if value is None else abs(value)
            sign, style = (
                ("N ", "red")
                if math.isnan(size)
                else ("█ ", "red")
                if size >= high
                else ("▒ ", "yellow")
                if size >= high / 2
                else ("· ", "dim")
            )
            line.append("  " if size < 0 else sign, style=style)
        stdout.print(line)
