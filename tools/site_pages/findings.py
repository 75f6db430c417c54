"""Findings: causes of failures, with the records that show them."""

from tools.site_pages.render import Page, page
from tools.site_pages.world import World


def findings_page(world: World) -> Page:
    """All findings, newest first."""
    found = sorted(world.findings, key=lambda f: f.date, reverse=True)
    return page("findings.md", "Findings", "findings.md.j2", world=world, findings=found)
