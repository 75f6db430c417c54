"""Options, inputs, records and tables that the trace commands share."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from stackproof.cli.load_model import TraceModel
from stackproof.cli.options import Json, RecordDir
from stackproof.cli.output import print_line, stdout
from stackproof.cli.recording import Claim, OpenRecord, open_record
from stackproof.spec.canonical import leaves
from stackproof.spec.errors import UsageError

DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog."
Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A run directory, a checkpoint, a Hugging Face folder or a .gguf file; "
        "MODEL@bfloat16, @float64, @reference or @compiled selects the compute mode.",
    ),
]


@dataclass(frozen=True)
class Request:
    """The options that several commands share."""

    prompt: Annotated[str | None, Option(help=f"Text to read. Default: {DEFAULT_PROMPT!r}.")] = None
    input_ids: Annotated[str | None, Option(help="Token ids instead of a text: 1,2,3.")] = None
    points: Annotated[
        list[str] | None,
        Option(help="Only these points; * matches any part of a name. Repeatable."),
    ] = None
    tokens: Annotated[
        Literal["all", "last"], Option(help="Statistics over all tokens, or the last one.")
    ] = "all"
    backward: Annotated[
        bool, Option("--backward", help="Also gradients of the mean next-token loss.")
    ] = False
    expect: Annotated[
        list[str] | None,
        Option(help="A prediction to judge: 'layers.3.ffn.swiglu.std < 0.1'. Repeatable."),
    ] = None
    csv: Annotated[Path | None, Option(help="Also write the table of all points to this file.")] = (
        None
    )
    run_dir: RecordDir = None
    json: Json = False

    def ids(self, model: TraceModel) -> list[int]:
        """The ids to run. Raises UsageError for an empty list, or ids that the model cannot
        process.
        """
        if self.input_ids is not None:
            if self.prompt is not None:
                raise UsageError(
                    "--prompt and --input-ids both give the tokens",
                    next_step="leave one of them out",
                )
            try:
                ids = [int(i) for i in self.input_ids.split(",")]
            except ValueError as e:
                raise UsageError(
                    "these are not token ids",
                    value=self.input_ids,
                    allowed="numbers with commas: 1,2,3",
                ) from e
        else:
            ids = encode(DEFAULT_PROMPT if self.prompt is None else self.prompt, model)
        return checked(ids, model)

    def expected(self, figures: Sequence[str]) -> list[Any]:
        """The predictions, parsed. Raises UsageError for another form or an unknown statistic."""
        from stackproof.trace import expect

        return [expect.parse(e, figures) for e in self.expect or ()]

    def open(self, claim: Claim, models: Sequence[TraceModel], **options: Any) -> OpenRecord:
        """Open the record: models, tokens and options are its configuration,
        model files its inputs.
        """
        from stackproof.contracts.subject import Subject
        from stackproof.export.parity import version

        shared = {
            "prompt": self.prompt,
            "input_ids": self.input_ids,
            "points": list(self.points or ()),
            "tokens": self.tokens,
        }
        sides = {f"side_{i}": {"title": m.title, "config": m.config} for i, m in enumerate(models)}
        record = open_record(
            claim,
            {"trace": shared | {"expect": list(self.expect or ())} | options} | sides,
            run_dir=self.run_dir,
            json=self.json,
            parents=dict.fromkeys(p for m in models for p in m.parents),
            transformers=version(),
        )
        for file, root in {f: m.root for m in models for f in m.files}.items():
            record.input(file, root)
        opened = [(m.opened, m.facts["step"]) for m in models if m.opened is not None]
        for one, step in opened:
            record.judge(Subject(opened=one.shown(step)), step=step)
        if not opened:
            record.unasked = ("checkpoint.opened",)
        return record

    def close(
        self, record: OpenRecord, document: dict[str, Any], show: Callable[[dict[str, Any]], None]
    ) -> None:
        """Write the points as series, the document as trace.json, the CSV file if requested, and
        the record.
        """
        from stackproof.spec.canonical import canonical_json
        from stackproof.spec.files import write_atomically

        gradients = document.get("gradients", {})
        series = {"points.jsonl": document["points"], "chain.jsonl": document.get("chain")}
        series |= {
            "gradients.jsonl": [*gradients.get("points", ()), *gradients.get("parameters", ())]
        }
        for name, rows in series.items():
            if rows:
                record.write_series(name, rows)
        write_atomically(record.path("trace.json"), canonical_json(document))
        record.output(record.path("trace.json"), record.directory)
        if self.csv is not None:
            self.csv.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.csv, _csv(document["points"]))
            record.output(self.csv.resolve(), Path.cwd())
        record.close("traced", document, show)


def takes(*shared: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add these options of Request, --run-dir and --json to a command, which receives them as its
    argument `request`.
    """
    names = (*shared, "run_dir", "json")
    taken = {f.name: f for f in fields(Request) if f.name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**options: Any) -> None:
            command(request=Request(**{name: options.pop(name) for name in taken}), **options)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "request"]
        options = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for f in taken.values()
        ]
        run.__signature__ = inspect.Signature(
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
        )
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def place_of(point: Any) -> dict[str, Any]:
    """A point in a document."""
    named = {k: getattr(point, k) for k in ("layer", "slot", "operation")}
    return {"point": point.name} | named


def statistics_of(measured: Any, row: Any, *more: str) -> dict[str, Any]:
    """A measured point in a document, with the judgement of its row of the profile; null without a
    row.
    """
    keys = ("ratio_to_previous", "robust_z", "baseline", "anomalous", *more, "cascade")
    figures = {"stats": measured.stat.as_dict(), "support": asdict(measured.stat.support)}
    return place_of(measured.point) | figures | {k: getattr(row, k, None) for k in keys}


def judged(
    expected: Sequence[Any], lines: list[dict[str, Any]], unseen: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The predictions about statistics, judged by the points of a document."""
    from stackproof.trace import expect

    figures = {
        line["point"]: line["stats"] | {k: line[k] for k in expect.OF_LAYERS} for line in lines
    }
    return [asdict(j) for j in expect.judge(expected, figures, [*figures, *unseen])]


def encode(text: str, model: TraceModel) -> list[int]:
    """The ids of a text. Raises UsageError if the model has no tokenizer."""
    if model.encode is None:
        raise UsageError(
            f"{model.title} has no tokenizer.json, so it cannot encode a text",
            next_step="give --input-ids 1,2,3",
        )
    return model.encode(text)


def checked(ids: list[int], model: TraceModel) -> list[int]:
    """The ids. Raises UsageError if the list is empty, too long, or has ids outside the
    vocabulary.
    """
    if not ids:
        raise UsageError(
            "the text has no tokens", allowed="at least one token", next_step="--prompt 'a text'"
        )
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        raise UsageError(
            "ids outside the vocabulary", value=ids[:12], allowed=f"0 to {model.vocab_size - 1}"
        )
    if len(ids) > model.max_seq_len:
        raise UsageError(
            "the text exceeds the context",
            value=f"{len(ids)} tokens",
            allowed=f"at most {model.max_seq_len}",
        )
    return ids


def _csv(lines: list[dict[str, Any]]) -> bytes:
    """One line per point; nested values become several columns."""
    import csv
    import io

    flat = [{k: _cell_text(v) for k, v in leaves(line) if k != "support.point"} for line in lines]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(k for line in flat for k in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def _cell_text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def precise(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def show_expectations(document: dict[str, Any]) -> None:
    for one in document["expectations"]:
        print_line(f"{one['verdict']:10} {one['text']}  found {number(one['found'])}")


def show_heat_map(cells: dict[tuple[int, str], float | None], title: str, high: float) -> None:
    """Print layers by slots; values from half of `high` and from `high` on are marked by sign and
    colour.
    """
    from rich.text import Text

    slots = list(dict.fromkeys(s for _, s in cells if not s.startswith("experts.")))
    layers = sorted({layer for layer, _ in cells})
    if not layers:
        return
    print_line(
        f"\n{title}: layers down, slots across; · below {high / 2:g}, ▒ from there, █ from "
        f"{high:g} in size; N is NaN"
    )
    for i, slot in enumerate(slots):
        print_line("    " + "│ " * i + f"┌ {slot}")
    for layer in layers:
        line = Text(f"{layer:3d} ")
        for slot in slots:
            line.append(*_cell(cells.get((layer, slot)), high))
        stdout.print(line)


def _cell(value: float | None, high: float) -> tuple[str, str]:
    if value is None:
        return "  ", ""
    if math.isnan(value):
        return "N ", "red"
    return (
        ("█ ", "red")
        if abs(value) >= high
        else ("▒ ", "yellow")
        if abs(value) >= high / 2
        else ("· ", "dim")
    )
