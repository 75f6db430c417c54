"""Model cards, from the registry and the records that it names."""

from stackproof.spec.registry import REQUIRED_RECORDS, Release
from tools.site_pages.render import Page, page
from tools.site_pages.runs import chart_of
from tools.site_pages.world import World


def models_index(world: World) -> Page:
    """All releases of the registry."""
    return page("models/index.md", "Models", "models.md.j2", releases=world.releases)


def model_page(world: World, model: Release) -> Page:
    """A model card. Raises IntegrityError if the ledger lacks a record that the registry names."""
    records = {kind: world.record(record_id) for kind, record_id in model.records.items()}
    not_covered: dict[str, str] = {}
    for record in records.values():
        for text in record.not_covered:
            not_covered.setdefault(text, record.id)
    return page(
        f"models/{model.id}.md",
        model.id,
        "model.md.j2",
        model=model,
        records=records,
        missing=[kind for kind in REQUIRED_RECORDS if kind not in records],
        not_covered=not_covered,
        inputs={a.sha256: a for r in records.values() for a in r.inputs}.values(),
        chart=chart_of(world, records["train"]) if "train" in records else "",
    )
