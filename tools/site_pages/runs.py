"""Pages of the ledger: the table of records and a page for each record."""

import shlex
from collections.abc import Iterator

from jinja2 import UndefinedError
from markupsafe import Markup

from stackproof.spec import rank_log
from stackproof.spec.archive import Archived
from stackproof.spec.canonical import leaves
from stackproof.spec.errors import IntegrityError
from stackproof.spec.records import Record
from tools.site_pages import traces
from tools.site_pages.chart import Curve, Flag, loss_chart, thin
from tools.site_pages.data import draws, sources
from tools.site_pages.markup import pretty_json
from tools.site_pages.mutants import mutants
from tools.site_pages.probes import probes
from tools.site_pages.render import Page, page, render
from tools.site_pages.world import World

HEADLINE = (
    "val_bits_per_byte",
    "bits_per_byte",
    "val_loss_nats",
    "loss_nats",
    "train_loss_nats",
    "killed",
    "tokens_per_s",
)
EVENT_LETTERS = {"resumed": "R", "nonfinite": "N"}
MAX_SAMPLES = 16
MAX_SAMPLE_CHARACTERS = 320


def headline(record: Record) -> list[str]:
    """Three metrics for one line: those of `HEADLINE`, else the first ones of the record."""
    known = [n for n in HEADLINE if n in record.metrics]
    return (known or sorted(record.metrics))[:3]


def runs_index(world: World) -> Page:
    """All accepted records, newest first."""
    return page("runs/index.md", "Runs", "runs.md.j2", world=world, headline=headline)


def archived_page(archived: Archived) -> Page:
    """An archived record of which the checkout lacks the git history."""
    return page(f"runs/{archived.record}.md", archived.record, "archived.md.j2", archived=archived)


def run_page(world: World, record: Record) -> Page:
    """A record with everything beside it, and the commands that repeat it.

    Raises IntegrityError if a series beside it has another form than its kind.
    """
    try:
        return _run_page(world, record)
    except (TypeError, ValueError, LookupError, AttributeError, UndefinedError) as e:
        raise IntegrityError(
            f"a series of record {record.id} cannot be shown",
            value=f"{type(e).__name__}: {e}",
            allowed="series as this version writes them",
            next_step="supersede the record, or report a bug if the command wrote this record",
        ) from e


def _run_page(world: World, record: Record) -> Page:
    archive = world.ledger.archive
    samples = world.series(record, "samples.jsonl", "step", "text", "score")
    repeat = [f"git checkout {record.code.commit}", shlex.join(record.command)]
    if record.kind == "train":
        repeat.append(f"stack evidence rerun {record.id}")
    return page(
        f"runs/{record.id}.md",
        record.id,
        "run.md.j2",
        record=record,
        superseded_by=world.superseded.get(record.id),
        archived=archive.by_record.get(record.id),
        archived_series={n: x for (r, n), x in archive.by_file.items() if r == record.id},
        unread_series=[n for r, n in world.ledger.unread_series() if r == record.id],
        chart=chart_of(world, record),
        data=[sources(world, record), draws(world, record), ranks(world, record)],
        findings=[
            probes(world, record) + mutants(world, record),
            traces.sections(world, record),
        ],
        samples=thin(samples, MAX_SAMPLES),
        n_samples=len(samples),
        max_characters=MAX_SAMPLE_CHARACTERS,
        repeat="\n".join(repeat),
        config=list(leaves(record.config)),
        parents=[(p, p in world.records or p in archive) for p in record.parents],
        document=pretty_json(record.to_bytes()),
    )


def ranks(world: World, record: Record) -> Markup:
    """The mesh of a run on several processes, and what steps take on each rank."""
    table = rank_log.rank_table(world.series(record, rank_log.FILE, "step", "event"))
    if table is None:
        return Markup()
    values = {"mesh": table.mesh, "rows": table.rows(), "n_profiled": table.n_profiled}
    return render("ranks.md.j2", **values)


def chart_of(world: World, record: Record) -> Markup:
    """Training and held-out loss with the events of the run; empty without a metrics series."""
    lines = world.series(record, "metrics.jsonl", "step")
    stderr = {x["step"]: x["val_stderr_nats"] for x in lines if x.get("val_stderr_nats")}
    held_out = _points(lines, "val_loss_nats")
    curves = [
        Curve("train loss", _points(lines, "loss_nats"), "nats/token"),
        Curve("held-out loss ± stderr", held_out, "nats/token", "dot", stderr),
    ]
    labels = {"x_label": "optimizer step", "y_label": "loss, nats per token"}
    flags = list(_flags(world, record, lines))
    return loss_chart(f"Loss of {record.id} over steps", curves, flags, **labels)


def _points(lines: list[dict], key: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]


def _flags(world: World, record: Record, lines: list[dict]) -> Iterator[Flag]:
    """Evaluations, red gates, verified checkpoints, resumes and the end of a run."""
    for line in lines:
        if line.get("val_loss_nats") is not None:
            yield Flag(line["step"], "E", f"evaluation at step {line['step']}")
    for entry in world.series(record, "gates.jsonl", "gate", "verdict"):
        gate, step = entry["gate"], entry.get("step")
        if step is not None and entry["verdict"] == "fail":
            yield Flag(step, "F", f"{gate} turned red at step {step}: {entry.get('message', '')}")
        elif step is not None and entry["verdict"] == "pass" and gate.startswith("checkpoint."):
            yield Flag(step, "C", f"checkpoint at step {step}, verified by {gate}")
    for entry in world.series(record, "events.jsonl", "event"):
        letter = EVENT_LETTERS.get(entry["event"])
        if letter and entry.get("step") is not None:
            yield Flag(entry["step"], letter, f"{entry['event']} at step {entry['step']}")
    if lines:
        step = lines[-1]["step"]
        yield Flag(step, "S", f"{record.status} after step {step}: {record.end_reason}")
