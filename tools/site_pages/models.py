"""Model cards, rendered from the registry and the records it names;
a fact without a record stops the build.
"""

from stackproof.spec.records import Record
from stackproof.spec.registry import REQUIRED_RECORDS, Release
from tools.site_pages.markup import (
    Page,
    bullets,
    code,
    esc,
    fenced,
    metric_text,
    number,
    optional,
    prose,
    table,
)
from tools.site_pages.runs import chart_of
from tools.site_pages.world import World


def models_index(world: World) -> Page:
    """All releases of the registry."""
    page = Page("models/index.md", "Models")
    page.add("Released models. Their numbers are read from the records they stand on.")
    if not world.releases:
        return page.add("The registry is empty: no model has been released.")
    rows = [
        [
            page.link(code(m.id), f"models/{m.id}.md"),
            m.status,
            number(m.n_params),
            esc(m.license),
            esc(m.recipe),
        ]
        for m in world.releases
    ]
    return page.add(table(["model", "status", "parameters", "licence", "recipe"], rows))


def model_page(world: World, model: Release) -> Page:
    """One model card."""
    page = Page(f"models/{model.id}.md", model.id)
    records = {kind: world.record(record_id) for kind, record_id in model.records.items()}
    missing = [kind for kind in REQUIRED_RECORDS if kind not in records]
    page.add(
        f"{page.link('Models', 'models/index.md')} · {model.series} · **{model.status}**",
        f"No record for: {', '.join(missing)}." if missing else "",
        "## Intended use",
        "What its records support, and nothing beyond:",
        bullets(f"{prose(r.claim)} ({page.run(r.id)})" for r in records.values()),
        "## Limitations",
        bullets(_limitations(records, page)) or "Its records name none.",
        "## Facts",
        _facts(model),
        "## Data",
        _data(model, records),
        "## Metrics",
        _metrics(records, page),
    )
    if "train" in records and (chart := chart_of(world, records["train"])):
        page.add("## Loss", chart)
    page.add(
        "## Records",
        table(
            ["kind", "record", "status"],
            [[k, page.run(r.id), r.status] for k, r in records.items()],
        ),
    )
    rerun = [
        f"git checkout {model.commit}",
        *(f"stack evidence rerun {r.id}" for r in records.values() if r.kind == "train"),
        "stack evidence verify",
    ]
    return page.add("## How to reproduce", fenced("\n".join(rerun), "sh"))


def _limitations(records: dict[str, Record], page: Page) -> list[str]:
    seen: dict[str, str] = {}
    for record in records.values():
        for text in record.not_covered:
            seen.setdefault(text, record.id)
    return [f"{prose(text)} ({page.run(record_id)})" for text, record_id in seen.items()]


def _facts(model: Release) -> str:
    rows = [
        ["parameters", number(model.n_params)],
        ["licence", esc(model.license)],
        ["recipe", code(model.recipe)],
        ["commit", code(model.commit)],
        ["tag", code(model.tag) if model.tag else "none"],
        ["trained by", esc(model.researcher)],
        ["weights sha256", code(model.weights_sha256)],
        ["tokenizer sha256", code(model.tokenizer_sha256)],
        ["card in the repository", code(model.card)],
    ]
    return table(["", ""], rows)


def _data(model: Release, records: dict[str, Record]) -> str:
    inputs = [a for r in records.values() for a in r.inputs]
    unique = {a.sha256: a for a in inputs}
    rows = [
        [
            esc(a.name),
            code(a.sha256),
            number(a.bytes),
            optional(a.tokens),
            esc(a.license or "not stated"),
        ]
        for a in unique.values()
    ]
    stated = f"Licence of the data: {esc(model.data_license)}."
    return (
        f"{stated}\n\n{table(['input', 'sha256', 'bytes', 'tokens', 'licence'], rows)}"
        if rows
        else stated
    )


def _metrics(records: dict[str, Record], page: Page) -> str:
    rows = [
        [code(name), metric_text(m), optional(m.n), m.better, page.run(r.id)]
        for r in records.values()
        for name, m in sorted(r.metrics.items())
    ]
    return (
        table(["metric", "value", "n", "better", "record"], rows)
        if rows
        else "Its records hold no metric."
    )
