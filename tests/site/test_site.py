"""The site builds strictly from any ledger, shows nothing from another host,
and refuses what it cannot trace.
"""

import html
import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from stackproof.cli.surface import surface
from stackproof.spec import ROOT, records
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import load_spec
from tests.site import small_repository
from tools.site_pages import home
from tools.site_pages.chart import Curve, Flag, loss_chart, thin
from tools.site_pages.markup import esc, ev
from tools.site_pages.runs import run_page
from tools.site_pages.world import load_world

MAX_SVG_BYTES = 60_000


def build_site(target: Path, repository: Path, evidence: Path) -> Path:
    """Build the real documents over another repository, strictly,
    as `mkdocs build --strict` does.
    """
    extra = {"repository_dir": str(repository), "evidence_dir": str(evidence), "generator": False}
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True, extra=extra)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return target


def text_of(path: Path) -> str:
    """Text of a page as a reader sees it, without tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small repository with three records and a release."""
    root = small_repository.write_repository(tmp_path_factory.mktemp("repository"))
    small_repository.add_release(root, small_repository.add_evidence(root))
    return root


@pytest.fixture(scope="module")
def site(small: Path, tmp_path_factory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"), small, small / "evidence")


@pytest.fixture(scope="module")
def empty_site(tmp_path_factory) -> Path:
    """This repository's own spec and museum over an empty ledger."""
    return build_site(tmp_path_factory.mktemp("site"), ROOT, tmp_path_factory.mktemp("evidence"))


def test_every_gate_record_and_model_has_a_page(site, small):
    for gate_id in load_spec(small).gates:
        assert (site / "gates" / f"{gate_id}.html").is_file()
    for folder in (small / "evidence").glob("*-*"):
        assert (site / "runs" / f"{folder.name}.html").is_file()
    assert (site / "models" / "pocket-1.html").is_file()


def test_an_empty_ledger_builds_too_with_a_page_for_each_gate_of_the_spec(empty_site):
    for gate_id in load_spec(ROOT).gates:
        assert (empty_site / "gates" / f"{gate_id}.html").is_file()
    assert "no record has been accepted" in (empty_site / "runs" / "index.html").read_text()
    states = json.loads((empty_site / "evidence.json").read_text())["counts"]
    assert states["discharged"] == states["proven"] == states["failed"] == 0


def test_numbers_and_states_come_from_the_records(site):
    home = (site / "index.html").read_text()
    assert "1 discharged" in home and "1 failed" in home
    assert "3.14159 ± 0.02 nats/token" in home
    assert "loss.stays-finite" in home
    found = json.loads((site / "evidence.json").read_text())
    assert found["gates"]["loss.adds-up"]["state"] == "discharged"
    assert found["gates"]["loss.stays-finite"]["state"] == "failed"
    badge = json.loads((site / "badge.json").read_text())
    assert badge["message"] == "P 1 · F 1" and "%" not in badge["message"]


def test_a_data_set_shows_what_was_dropped_of_every_source_and_why(site):
    page = text_of(site / "data" / "index.html")
    assert re.search(
        r"letters\s+CC0-1\.0\s+2\s+0\.7\s+0\.1\s+1203\s+1200\s+1\s+2\s+54\s?321\s+678", page
    ), page
    assert (
        page.index("low-diversity") < page.index("too-short")
        and "1200 documents of 1203 documents stayed" in page
    )


def test_a_run_shows_what_it_drew_of_every_source(site):
    page = text_of(site / "runs" / "train-20260131T120000Z-bbbbbbbb.html")
    assert re.search(r"letters\s+30\s+75\.0%\s+0\s+novels\s+10\s+25\.0%\s+1", page)


def test_a_run_on_several_ranks_shows_its_mesh_and_what_steps_take_on_each(site):
    page = text_of(site / "runs" / "train-20260131T120000Z-bbbbbbbb.html")
    assert "Mesh: replicate 1 × shard 2 × tensor 1" in page and "the 2 profiled steps" in page
    assert re.search(r"1\s+0, 1, 0\s+card <1>\s+0\.5\s+0\.2\s+0\.65\s+0\.7\s", page), page
    alone = text_of(site / "runs" / "evaluate-20260131T120000Z-cccccccc.html")
    assert "Mesh" not in alone and "profiled" not in alone


def test_a_benchmark_shows_ratio_spread_and_what_was_wanted(site):
    page = text_of(site / "benchmarks.html")
    assert re.search(r"slow one\s+5\.50\s+5\.10 – 6\.20\s+≥ 5: reached", page) and re.search(
        r"fast one\s+0\.80\s+0\.70 – 0\.90\s+≥ 1: missed", page
    )
    assert "2026-01-31 · a processor, 2 cores" in page and "slow-one 1.2.3" in page


def test_a_draw_of_mutants_shows_its_rate_and_what_no_gate_halted(small):
    world = load_world(small, small / "evidence")
    (record,) = (r for r in world.live if r.kind == "mutation")
    page, trend = run_page(world, record).body, str(home.BLOCKS["mutants"](world, "index.md"))
    assert "1 of 2 = 50 % | 9 – 91 %" in page and "1 of 2 = 50 % [9, 91]" in trend
    survivor, refusal = (
        page.partition(f"## {heading}")[2].partition("\n## ")[0]
        for heading in ("What no gate halted", "Refusals that name")
    )
    assert "packing:f1" in survivor and "+ b" in survivor and "packing:f0" not in survivor
    assert "packing:f2" in refusal and "packing:f3" not in refusal, "exit code 6 blames nobody"


def test_the_loss_curve_is_inline_small_and_names_its_axes_points_and_events(site):
    page = (site / "runs" / "train-20260131T120000Z-bbbbbbbb.html").read_text()
    svg = re.search(r'<svg viewBox.*?aria-label="Loss.*?</svg>', page, re.DOTALL)[0]
    assert len(svg.encode()) < MAX_SVG_BYTES
    assert "optimizer step" in svg and "loss, nats per token" in svg
    assert "held-out loss ± stderr, step 300: 4.1000 nats/token" in svg
    assert "loss.stays-finite turned red at step 40" in svg
    assert "checkpoint at step 200, verified by checkpoint.reloads; resumed at step 200" in svg
    assert "currentColor" in (site / "assets" / "stackproof.css").read_text()


def test_text_of_a_record_is_never_markup(site):
    path = site / "runs" / "train-20260131T120000Z-bbbbbbbb.html"
    page = path.read_text()
    assert "<script>alert" not in page and "A train record with <b>" not in page
    assert "<script>alert(1)</script> | `x`" in text_of(
        path
    ) and "A train record with <b>markup</b> | and a pipe." in text_of(path)


def test_museum_shows_story_and_outcome_under_an_anchor(site):
    page = (site / "museum/loss.html").read_text()
    assert 'id="loss-off-by-one"' in page
    text = text_of(site / "museum/loss.html")
    assert "Somebody *added* one." in text and "killed" in text


def test_reference_pages_are_written_from_their_sources(site):
    commands = text_of(site / "cli.html")
    for name, command in surface()["verbs"].items():
        assert f"stack {name}" in commands
        assert all(flag in commands for option in command["options"] for flag in option["flags"])
        assert all(example in commands for example in command["examples"])
    config = text_of(site / "config.html")
    assert (
        "optim.max_grad_norm" in config
        and "global L2 norm to which gradients are clipped" in config
    )
    assert "interrupted (Ctrl-C)" in text_of(site / "errors.html")


class _Resources(html.parser.HTMLParser):
    """Collects addresses a browser would load by itself."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            loads = name in ("src", "srcset", "data", "poster") or (
                name == "href" and tag in ("link", "use", "image")
            )
            if (loads and value) or (name == "style" and "url(" in (value or "")):
                self.found.append(value)


@pytest.mark.parametrize("which", ["site", "empty_site"])
def test_nothing_is_loaded_from_another_host(which, request):
    folder = request.getfixturevalue(which)
    for path in folder.rglob("*.html"):
        parser = _Resources()
        parser.feed(path.read_text())
        assert [a for a in parser.found if re.match(r"(https?:)?//", a)] == [], path
    for path in folder.rglob("*.css"):
        assert (
            re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", path.read_text()) == []
        ), path


def test_a_dead_generated_link_stops_the_build(tmp_path):
    root = small_repository.write_repository(
        tmp_path / "repository", gate_of_second_plant="loss.absent"
    )
    with pytest.raises(Abort):
        build_site(tmp_path / "site", root, root / "evidence")


def test_a_changed_series_stops_the_build_and_names_the_file(small, tmp_path, caplog):
    root = tmp_path / "repository"
    shutil.copytree(small, root)
    series = root / "evidence" / "train-20260131T120000Z-bbbbbbbb" / "metrics.jsonl"
    series.write_text(series.read_text().replace("6.99", "1.99"))
    with pytest.raises(Abort):
        build_site(tmp_path / "site", root, root / "evidence")
    assert "metrics.jsonl does not match the hash" in caplog.text


def test_a_number_without_a_record_is_refused(small):
    record = small_repository.record(small, "evaluate", "dddddddd")
    with pytest.raises(IntegrityError, match="has no metric bits_per_byte"):
        ev(record, "bits_per_byte")


def test_records_page_explains_every_field():
    text = (ROOT / "docs" / "records.md").read_text()
    models = (
        records.Record,
        records.GateResult,
        records.Kill,
        records.Metric,
        records.Artefact,
        records.Override,
        records.Code,
        records.SpecRef,
        records.Series,
        records.Waiver,
    )
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert [n for n in sorted(names) if f"`{n}`" not in text] == []


def test_decisions_have_their_five_parts_and_are_listed():
    index = (ROOT / "docs" / "adr" / "index.md").read_text()
    decisions = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    assert len(decisions) >= 12
    for path in decisions:
        text = path.read_text()
        assert re.search(r"^Status: \w+", text, re.MULTILINE), path
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
            "Context",
            "Decision",
            "Rejected",
            "Evidence",
        ], path
        assert path.name in index


def test_charts_thin_out_and_skip_what_is_not_finite():
    points = [(float(s), 5.0 - s / 1000) for s in range(2000)] + [(2000.0, float("nan"))]
    svg = loss_chart(
        "t", [Curve("train", points, "nats")], [Flag(3, "F", "a < b")], x_label="x", y_label="y"
    )
    assert (
        "nan" not in svg
        and "<title>a < b</title>" in html.unescape(svg)
        and "a < b" not in svg
        and "140 of 2000" in svg
        and "\n\n" not in svg
    )
    assert (
        loss_chart("t", [Curve("train", [(1, float("inf"))], "nats")], x_label="x", y_label="y")
        == ""
    )
    assert thin([1, 2, 3], 2) == [1, 3]


def test_escaping_leaves_no_special_character():
    assert not set(esc('|*_`[]<>"\n#{}~').replace("&", "").replace("#", "").replace(";", "")) & set(
        '|*_`[]<>"\n{}~'
    )
