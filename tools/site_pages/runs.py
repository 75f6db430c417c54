"""Pages of the ledger: the table of records and one page per record."""

import shlex

from stackproof.spec.archive import Archived
from stackproof.spec.records import Artefact, Record
from tools.site_pages import traces
from tools.site_pages.chart import Curve, Flag, loss_chart, thin
from tools.site_pages.data import draws, sources
from tools.site_pages.markup import (
    Page,
    bullets,
    code,
    esc,
    ev,
    fenced,
    folded,
    number,
    optional,
    pairs,
    pretty_json,
    prose,
    short_hash,
    table,
    verdict,
)
from tools.site_pages.probes import probes
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
    """Names of the metrics worth showing in one line: known ones first,
    else the first few the record holds.
    """
    known = [n for n in HEADLINE if n in record.metrics]
    return (known or sorted(record.metrics))[:3]


def runs_index(world: World) -> Page:
    """All accepted records, newest first."""
    page = Page("runs/index.md", "Runs")
    page.add(
        "Every accepted record, newest first. A record is never edited; a wrong one is superseded "
        "by a later one."
    )
    if not world.records and not world.unread:
        return page.add("The ledger is empty: no record has been accepted yet.")
    rows = []
    for r in reversed(world.records.values()):
        metrics = "<br>".join(f"{code(n)} {ev(r, n)}" for n in headline(r)) or "–"
        status = (
            f"superseded by {page.run(world.superseded[r.id])}"
            if r.id in world.superseded
            else r.status
        )
        rows.append(
            [page.run(r.id), r.kind, status, esc(r.finished_at[:16].replace("T", " ")), metrics]
        )
    rows += [
        [page.run(a.record), a.record.partition("-")[0], "archived", "–", "–"]
        for a in reversed(world.unread)
    ]
    return page.add(table(["record", "kind", "status", "finished (UTC)", "metrics"], rows))


def archived_page(archived: Archived) -> Page:
    """What is known of an archived record where the build has no git history to read it from."""
    page = Page(f"runs/{archived.record}.md", archived.record)
    page.add(page.link("All runs", "runs/index.md"), _where(archived))
    page.add("This site was built without that history; the record is not verified.")
    files = [[code(name), code(sha256)] for name, sha256 in archived.files.items()]
    return page.add("## Files", table(["file", "sha256"], files))


def _where(archived: Archived) -> str:
    folder = code(f"evidence/{archived.record}")
    return f"Archived: its files are in git history, commit {code(archived.commit)}, {folder}."


def run_page(world: World, record: Record) -> Page:
    """Everything one record says, and how to run it again."""
    page = Page(f"runs/{record.id}.md", record.id)
    if record.id in world.superseded:
        page.add(
            f"**Superseded by {page.run(world.superseded[record.id])}.** It is kept, and "
            "discharges nothing."
        )
    if record.id in world.ledger.archive:
        page.add(_where(world.ledger.archive.by_record[record.id]))
    page.add(
        f"{page.link('All runs', 'runs/index.md')} · {record.kind} · {record.status}",
        f"> {prose(record.claim)}",
        _facts(record),
    )
    page.add(
        "## What it does not cover",
        bullets(prose(t) for t in record.not_covered) or "The record names nothing.",
    )
    if chart := chart_of(world, record):
        page.add("## Loss", chart)
    page.add(*sources(world, record), *draws(world, record))
    page.add(*probes(world, record))
    page.add(
        *_metrics(record), *_gates(record, page), *_kills(record, page), *_samples(world, record)
    )
    page.add(*traces.sections(world, record))
    page.add("## How to repeat it", *_repeat(record), "## Configuration", *_config(record))
    page.add(
        "## Environment",
        table(
            ["fact", "value"], [[code(k), number(v)] for k, v in sorted(record.environment.items())]
        ),
    )
    page.add(
        "## Files",
        _artefacts("in", record.inputs),
        _artefacts("out", record.outputs),
        _series(record),
    )
    parents = [
        page.run(p)
        if p in world.records or p in world.ledger.archive
        else f"{code(p)} (not in the ledger)"
        for p in record.parents
    ]
    page.add("## Parents", bullets(parents) or "None.")
    return page.add(
        "## The record", folded("metadata.json", pretty_json(record.to_bytes()), "json")
    )


def _facts(record: Record) -> str:
    tree = "dirty" if record.code.dirty else "clean"
    rows = [
        ["end", f"{record.status}: {esc(record.end_reason)}, exit code {record.exit_code}"],
        ["time", f"{esc(record.started_at)} to {esc(record.finished_at)}"],
        ["cost", f"{number(record.wall_s)} s wall, {number(record.device_s)} s device"],
        ["code", f"{code(record.code.commit)}, {tree}"],
        ["spec", f"{esc(record.spec.version)}, {short_hash(record.spec.sha256)}"],
        ["compute", record.compute],
        ["record sha256", code(record.sha256)],
    ]
    return table(["", ""], rows)


def chart_of(world: World, record: Record) -> str:
    """Training and held-out loss with what happened on the way; empty without a metrics series."""
    lines = world.series(record, "metrics.jsonl", "step")
    stderr = {x["step"]: x["val_stderr_nats"] for x in lines if x.get("val_stderr_nats")}
    curves = [
        Curve("train loss", _points(lines, "loss_nats"), "nats/token"),
        Curve(
            "held-out loss ± stderr", _points(lines, "val_loss_nats"), "nats/token", "dot", stderr
        ),
    ]
    title = f"Loss of {record.id} over steps"
    return loss_chart(
        title,
        curves,
        _events(world, record, lines),
        x_label="optimizer step",
        y_label="loss, nats per token",
    )


def _points(lines: list[dict], key: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]


def _events(world: World, record: Record, lines: list[dict]) -> list[Flag]:
    """Evaluations, red gates, verified checkpoints, resumes and the end,
    each from its own series.
    """
    flags = [
        Flag(x["step"], "E", f"evaluation at step {x['step']}")
        for x in lines
        if x.get("val_loss_nats") is not None
    ]
    for entry in world.series(record, "gates.jsonl", "gate", "verdict"):
        gate, step = entry["gate"], entry.get("step")
        if step is not None and entry["verdict"] == "fail":
            flags.append(
                Flag(step, "F", f"{gate} turned red at step {step}: {entry.get('message', '')}")
            )
        elif step is not None and entry["verdict"] == "pass" and gate.startswith("checkpoint."):
            flags.append(Flag(step, "C", f"checkpoint at step {step}, verified by {gate}"))
    for entry in world.series(record, "events.jsonl", "event"):
        if entry["event"] in EVENT_LETTERS:
            flags.append(
                Flag(
                    entry["step"],
                    EVENT_LETTERS[entry["event"]],
                    f"{entry['event']} at step {entry['step']}",
                )
            )
    if lines:
        flags.append(
            Flag(
                lines[-1]["step"],
                "S",
                f"{record.status} after step {lines[-1]['step']}: {record.end_reason}",
            )
        )
    return flags


def _metrics(record: Record) -> list[str]:
    if not record.metrics:
        return []
    rows = []
    for name, m in sorted(record.metrics.items()):
        n = optional(m.n)
        stderr = optional(m.stderr)
        rows.append([code(name), number(m.value), esc(m.unit), n, stderr, m.better])
    return ["## Metrics", table(["metric", "value", "unit", "n", "stderr", "better"], rows)]


def _gates(record: Record, page: Page) -> list[str]:
    if not record.gates:
        return []
    rows = []
    for g in record.gates:
        waiver = (
            f"<br>waived until {esc(g.waiver.expires)}: {esc(g.waiver.reason)}" if g.waiver else ""
        )
        first = optional(g.first_failure_step)
        heartbeat = optional(g.heartbeat_last_step)
        measured = pairs(g.measured) + (f"<br>{esc(g.message)}" if g.message else "")
        rows.append(
            [
                page.gate(g.id),
                verdict(g.verdict) + waiver,
                number(g.checks),
                heartbeat,
                first,
                measured,
                pairs(g.limits),
            ]
        )
    return [
        "## Gates",
        table(
            [
                "gate",
                "verdict",
                "checks",
                "last heartbeat, step",
                "first red, step",
                "measured",
                "limits",
            ],
            rows,
        ),
    ]


def _kills(record: Record, page: Page) -> list[str]:
    if not record.kills:
        return []
    rows = [
        [
            page.gate(k.gate),
            page.plant(k.plant),
            k.outcome,
            k.control,
            esc(k.latency),
            f"{number(k.seconds)} s",
            pairs(k.measured),
        ]
        for k in record.kills
    ]
    return [
        "## Kills",
        table(["gate", "plant", "outcome", "control", "latency", "time", "measured"], rows),
    ]


def _samples(world: World, record: Record) -> list[str]:
    samples = world.series(record, "samples.jsonl", "step", "text", "score")
    if not samples:
        return []
    shown = thin(samples, MAX_SAMPLES)
    rows = [
        [number(s["step"]), number(s["score"]), pairs(s.get("parts") or {}), _sample_text(s)]
        for s in shown
    ]
    count = (
        ""
        if len(shown) == len(samples)
        else f" {len(shown)} of {len(samples)} shown, evenly spaced."
    )
    intro = (
        f"Text drawn from the model during the run, with the coherence score of the audit.{count}"
    )
    return ["## Samples", intro, table(["step", "score", "parts", "text"], rows)]


def _sample_text(sample: dict) -> str:
    text = str(sample["text"])
    cut = text[:MAX_SAMPLE_CHARACTERS] + ("…" if len(text) > MAX_SAMPLE_CHARACTERS else "")
    return f'<span class="sample"><b>{esc(sample.get("prompt", ""))}</b>{esc(cut)}</span>'


def _repeat(record: Record) -> list[str]:
    lines = [f"git checkout {record.code.commit}", shlex.join(record.command)]
    if record.kind == "train":
        lines.append(f"stack evidence rerun {record.id}")
    note = (
        "The tree was dirty: the commit alone does not give the same code."
        if record.code.dirty
        else ""
    )
    return [note, fenced("\n".join(lines), "sh")]


def _config(record: Record) -> list[str]:
    overrides = table(
        ["changed key", "value", "from"],
        [[code(o.key), code(o.value), esc(o.source)] for o in record.overrides],
    )
    rows = [[code(k), code(v)] for k, v in _leaves(record.config)]
    return [
        f"sha256 {code(record.config_sha256)}",
        overrides if record.overrides else "No value differs from its default.",
        table(["key", "resolved value"], rows) if rows else "",
    ]


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves: list[tuple[str, object]] = []
    for key, value in tree.items():
        leaves += (
            _leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else [(prefix + key, value)]
        )
    return leaves


def _artefacts(direction: str, artefacts: tuple[Artefact, ...]) -> str:
    if not artefacts:
        return f"No file {direction}."
    rows = [
        [
            esc(a.name),
            code(a.path),
            code(a.sha256),
            number(a.bytes),
            optional(a.tokens),
            esc(a.license or "–"),
        ]
        for a in artefacts
    ]
    return table([f"{direction}put", "path", "sha256", "bytes", "tokens", "licence"], rows)


def _series(record: Record) -> str:
    return (
        table(["series", "sha256"], [[code(s.path), code(s.sha256)] for s in record.series])
        if record.series
        else ""
    )
