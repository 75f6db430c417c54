"""What was found to be wrong, from symptom to cure, with the records that show it."""

from stackproof.spec.findings import Finding, RuledOut
from tools.site_pages.markup import Page, bullets, code, esc
from tools.site_pages.world import World


def findings_page(world: World) -> Page:
    """All findings, newest first."""
    page = Page("findings.md", "Findings")
    page.add(
        "Causes that were found in this project, each with a record that shows the failure and "
        "one without it."
    )
    for finding in sorted(world.findings, key=lambda f: f.date, reverse=True):
        _finding(page, world, finding)
    return page if world.findings else page.add("None is recorded.")


def _finding(page: Page, world: World, finding: Finding) -> None:
    told = [
        f"Symptom: {esc(finding.symptom)}",
        f"Cause: {esc(finding.cause)}",
        f"Mechanism: {esc(finding.mechanism)}",
        f"Gates: {', '.join(page.link(code(g), f'gates/{g}.md') for g in finding.gates)}",
        (
            f"Shown by: {code(finding.metric)} "
            f"{_figure(page, world, finding.negative, finding.metric)}"
        ),
        f"Gone in: {code(finding.metric)} {_figure(page, world, finding.positive, finding.metric)}"
        if finding.positive
        else "",
        f"Mended in {code(finding.fix[:12])}"
        if finding.fix
        else "**Gone around, not mended: its gates are not discharged.**",
        f"It comes back red in {code(finding.falsifier)}",
        *(f"Ruled out: {esc(r.hypothesis)} ({_cleared(page, r)})" for r in finding.ruled_out),
    ]
    page.add(f"## {esc(finding.id)}", f"{finding.date}", bullets([t for t in told if t]))


def _cleared(page: Page, suspect: RuledOut) -> str:
    """What cleared a suspect; the rule FINDING-SHOWN holds the figure against the record."""
    figure = f"{code(suspect.metric)} = {suspect.value:g} in " if suspect.metric else ""
    return figure + _cited(page, suspect.evidence)


def _cited(page: Page, cited: str) -> str:
    record, _, link = cited.partition("#")
    return page.run(record) + (f", link {link} of its chain" if link else "")


def _figure(page: Page, world: World, cited: str, metric: str) -> str:
    return f"= {world.record(cited.partition('#')[0]).metric(metric)} in {_cited(page, cited)}"
