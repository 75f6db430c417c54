"""What a model card states, read back from the written file: every figure of it, with its value."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackproof.contracts.export import header_of, n_entries
from stackproof.contracts.export_documents import NAMES
from stackproof.spec.canonical import read_json
from stackproof.spec.records import GateResult, Metric, Record
from stackproof.spec.visible import without_markup

SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
FACTS, GATES = ("what", "value"), ("gate", "verdict", "measured")
LEFT = "used in training only, not in the file"
METRICS = ("metric", "value", "unit", "n")

Columns = tuple[str, ...]


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from: the `model` section, the optimizer step of the weights, the ids
    of the records of the run and of the export, the verdicts on the folder, what narrower weights
    changed, and the record of the run, None where it is not beside the weights.
    """

    model: Any
    step: int
    parent: str
    export: str
    gates: Sequence[GateResult]
    rounding: Mapping[str, float]
    run: Record | None


def card_faults(folder: Path, facts: CardFacts) -> list[str]:
    """What README.md of a folder leaves out or states otherwise. The number of parameters, their
    type and the architecture are those of the files beside it.
    """
    text = (folder / "README.md").read_text("utf-8")
    tables = _tables(text)
    return [
        *_facts_faults(folder, text, tables, facts),
        *_gates_faults(text, tables, facts.gates),
        *_run_faults(text, tables, facts),
    ]


def _tables(text: str) -> dict[Columns, list[Columns]]:
    """Rows of each table, by its columns. Raises ValueError for two tables with one heading."""
    found: dict[Columns, list[Columns]] = {}
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in block.split("\n")]
        columns, _, *rest = [row for row in rows if row]
        if columns in found:
            raise ValueError(f"the card has two tables of {', '.join(columns)}")
        found[columns] = rest
    return found


def _facts_faults(
    folder: Path, text: str, tables: Mapping[Columns, list[Columns]], facts: CardFacts
) -> Iterator[str]:
    entries = [e for p in sorted(folder.glob("*.safetensors")) for e in header_of(p).values()]
    dtypes = sorted({NAMES.get(e["dtype"], e["dtype"]) for e in entries})
    n_params = sum(n_entries(e["shape"]) for e in entries)
    (architecture,) = read_json(folder / "config.json")["architectures"]
    stated = re.findall(r"^A language model of ([\d,]+) parameters, .* as `(\w+)`\.$", text, re.M)
    if stated != [(f"{n_params:,}", architecture)]:
        yield f"parameters and architecture are {stated}, not {n_params:,} and {architecture}"
    truth = {
        "optimizer step": str(facts.step),
        **{name: str(getattr(facts.model, name)) for name in SIZES},
        "weights": ", ".join(dtypes),
        **{name: f"{value:.3g}" for name, value in facts.rounding.items()},
        "record of the run": f"`{facts.parent}`",
        "record of this export": f"`{facts.export}`",
    }
    held = [row for row in tables.get(FACTS, []) if row[0] != LEFT]
    yield from _other_rows("fact", held, [(name, value) for name, value in truth.items()])
    recipe = facts.run.config.get("recipe", facts.parent) if facts.run else facts.parent
    if re.findall(r"^# (.*)$", text, re.M)[:1] != [without_markup(recipe)]:
        yield f"the title is not {recipe}"
    if facts.run is not None and facts.run.id != facts.parent:
        yield f"the record of the run is {facts.run.id}, not {facts.parent}"


def _gates_faults(
    text: str, tables: Mapping[Columns, list[Columns]], gates: Sequence[GateResult]
) -> Iterator[str]:
    truth = [
        (
            f"`{g.id}`",
            g.verdict,
            without_markup(g.message or ", ".join(f"{k} {v}" for k, v in g.measured.items())),
        )
        for g in gates
    ]
    yield from _other_rows("gate", tables.get(GATES, []), truth)
    unread = any(g.verdict == "not_run" for g in gates)
    if ("**The logits were not compared**" in text) != unread:
        yield "whether the logits were compared is not what the verdicts state"


def _run_faults(
    text: str, tables: Mapping[Columns, list[Columns]], facts: CardFacts
) -> Iterator[str]:
    run, rows = facts.run, tables.get(METRICS)
    if run is None:
        if rows is not None or "is not beside its checkpoint" not in text:
            yield "it has figures of a run without a record"
        return
    last = run.metrics.get("steps")
    if last is not None and last.value != facts.step:
        note = f"after step {last.value}. These are those after step {facts.step},"
        if rows is not None or note not in " ".join(text.split()):
            yield f"the note that the record is of step {last.value}, not {facts.step}, is missing"
        return
    truth = [(name, *_figure(metric)) for name, metric in sorted(run.metrics.items())]
    yield from _other_rows("metric", rows or [], truth)
    verdicts = Counter(g.verdict for g in run.gates)
    counts = ", ".join(f"{verdicts[v]} {v}" for v in ("pass", "fail", "not_run") if verdicts[v])
    version = without_markup(run.spec.version)
    stated = [
        without_markup(run.claim),
        f"Status `{run.status}`, gates: {counts or 'none'}, code `{run.code.commit[:12]}`, spec "
        f"{version}, compute {run.compute}.",
        *(f"- {without_markup(f'{a.name} ({a.license})')}" for a in run.inputs if a.license),
        *(f"- {without_markup(limit)}" for limit in run.not_covered),
    ]
    lines = text.splitlines()
    yield from (f"it lacks the line {line!r}" for line in stated if line not in lines)


def _figure(metric: Metric) -> Columns:
    """Value, unit and sample count of a metric as a card states them."""
    value = metric.value
    shown = f"{value:,.4f}" if isinstance(value, float) else without_markup(value)
    return shown, without_markup(metric.unit), "" if metric.n is None else str(metric.n)


def _other_rows(what: str, found: Sequence[Columns], truth: Sequence[Columns]) -> Iterator[str]:
    """Rows that a table lacks, or that it has besides."""
    # cells have lost the spaces at their ends
    wanted = Counter(tuple(cell.strip() for cell in row) for row in truth)
    held = Counter(found)
    yield from (f"it lacks the {what} {' | '.join(row)}" for row in (wanted - held))
    yield from (f"it states the {what} {' | '.join(row)}" for row in (held - wanted))
