"""The page of findings: from symptom to cure, with figures read from the records."""

from pathlib import Path

import pytest

from stackproof.spec.findings import Finding
from tools.site_pages.findings import findings_page
from tools.site_pages.world import load_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world():
    return load_world(ROOT, ROOT / "evidence")


def test_every_finding_is_told_with_both_figures(world):
    text = findings_page(world).text().replace("&#95;", "_")
    assert world.findings and all(
        f"## {f.id}" in text and f"runs/{f.negative}.md" in text for f in world.findings
    )
    assert (
        "<code>loss_partition_equivalence_alarms</code> = 4 in" in text.replace("&#95;", "_")
        and "= 0 in" in text
        and "Ruled out: " in text
    )
    assert "<code>model_gradient_alarms</code> = 0 in" in text, (
        "a suspect with the figure that cleared it"
    )
    assert "not discharged" not in text


def test_what_was_gone_around_is_said_to_be(world, monkeypatch):
    first = world.findings[0].model_dump() | {"route_around": True, "fix": None, "positive": None}
    monkeypatch.setitem(vars(world), "findings", [Finding.model_validate(first)])
    text = findings_page(world).text()
    assert (
        "Worked around, not fixed: its gates are not discharged" in text and "Fixed in" not in text
    )
    link = {"hypothesis": "the moon", "evidence": f"{first['negative']}#E4"}
    monkeypatch.setitem(
        vars(world), "findings", [Finding.model_validate(first | {"ruled_out": [link]})]
    )
    text = findings_page(world).text()
    assert "Ruled out: the moon (" in text and ", link E4 of its chain)" in text
    monkeypatch.setitem(vars(world), "findings", [])
    assert "None is recorded." in findings_page(world).text()
