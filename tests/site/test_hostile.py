"""No text of a record, a series, a finding or the registry is markup on a page: the elements of a
page are the same, whatever the text.
"""

import html.parser
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown import Markdown
from mkdocs.config import load_config
from pydantic import BaseModel, ValidationError

from stackproof.spec import ROOT
from stackproof.spec.canonical import canonical_lines, sha256_bytes
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import GateResult, Kill, Record, Series, Waiver
from stackproof.spec.registry import Release
from tests.hostile_text import IN_FILES
from tests.site import small_repository
from tools.site import generated_pages
from tools.site_pages import home
from tools.site_pages.markup import folded, hyperlink, source
from tools.site_pages.render import Page
from tools.site_pages.world import World, load_world

PLAIN = "Plain text."
CLOSED = ("event", "outcome", "effect")  # keys of series with listed values
ADDRESS = ("href", "src", "action", "data", "xlink:href")


class Skeleton(html.parser.HTMLParser):
    """The elements of a page, each with the names of its attributes, and where its links lead."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple] = []
        self.targets: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes if name != "class"]
        if tag not in ("span", "code") or names:  # of the colours of code, and of `code` in prose
            self.elements.append((tag, *names))
        found = (value or "" for name, value in attributes if name in ADDRESS)
        self.targets += [target for target in found if not target.startswith("#")]

    def handle_comment(self, data):
        self.elements.append(("comment",))

    def handle_decl(self, declaration):
        self.elements.append(("declaration",))


@pytest.fixture(scope="module")
def as_html():
    config = load_config(str(ROOT / "mkdocs.yml"))
    reader = Markdown(
        extensions=config.markdown_extensions, extension_configs=config.mdx_configs
    )
    return lambda text: reader.reset().convert(text)


def filled(model: BaseModel, text: str):
    """The model with the text in every field that takes it."""
    document = model.model_dump(mode="json", by_alias=True)

    def fill(node, root):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                fill(value, root)
            elif isinstance(value, str):
                node[key] = text
                try:
                    type(model).model_validate(root)
                except ValidationError:
                    node[key] = value

    fill(document, document)
    return type(model).model_validate(document)


def in_lines(value, text: str):
    """A line of a series with the text in place of every text."""
    match value:
        case str():
            return text
        case dict():
            return {k: v if k in CLOSED else in_lines(v, text) for k, v in value.items()}
        case list():
            return [in_lines(v, text) for v in value]
    return value


def world_of(root: Path, text: str) -> World:
    """A small repository with the text in every record, series, release and finding."""
    small_repository.write_repository(root)
    records = small_repository.add_evidence(root)
    small_repository.add_release(root, records)
    evidence, hostile = root / "evidence", root / "hostile"
    hostile.mkdir()
    for record in Ledger(evidence).accepted().values():
        (hostile / record.id).mkdir()
        series = []
        for one in record.series:
            lines = (evidence / record.id / one.path).read_text().splitlines()
            data = canonical_lines(in_lines(json.loads(line), text) for line in lines)
            (hostile / record.id / one.path).write_bytes(data)
            series.append(Series(path=one.path, sha256=sha256_bytes(data)))
        config = record.config | {"key": text, text: "value"}
        changed = filled(record.model_copy(update={"config": config}), text)
        changed = changed.model_copy(update={"series": tuple(series)})
        (hostile / record.id / "metadata.json").write_bytes(changed.to_bytes())
        Ledger(hostile).append(changed)
    world = load_world(root, hostile)
    releases = [filled(r, text) for r in load_world(root, evidence).releases]
    findings = [filled(f, text) for f in load_world(ROOT, ROOT / "evidence").findings[:1]]
    cited = {"negative": records[1].id, "positive": None, "ruled_out": (), "route_around": True}
    metric = {"metric": "val_loss_nats", "fix": None}
    findings = [f.model_copy(update=cited | metric) for f in findings]
    return replace(world, releases=releases, findings=findings)


def pages_of(world: World) -> dict[str, str]:
    """Markdown by path: the generated pages without those of this repository's own text, and the
    blocks of the home page.
    """
    own = {"cli.md", "config.md", "errors.md"}
    pages = {p.path: p.body for p in generated_pages(world) if p.path not in own}
    return pages | {f"block {n}": str(b(world, "index.md")) for n, b in home.BLOCKS.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, as_html):
    pages = pages_of(world_of(tmp_path_factory.mktemp("plain"), PLAIN))
    return {path: Skeleton(as_html(body)) for path, body in pages.items()}


@pytest.mark.parametrize("names", ["script", "table", "block", " ".join(IN_FILES)])
def test_no_text_changes_the_elements_of_a_page(names, plain, tmp_path, as_html):
    pages = pages_of(world_of(tmp_path, " ".join(IN_FILES[name] for name in names.split())))
    assert pages.keys() == plain.keys()
    for path, body in pages.items():
        found = Skeleton(as_html(body))
        assert found.elements == plain[path].elements, path
        assert found.targets == plain[path].targets, path


def test_markup_that_is_not_escaped_would_be_seen(as_html):
    elements = {e for t in IN_FILES.values() for e in Skeleton(as_html(t)).elements}
    assert {("script",), ("img", "src", "onerror"), ("h1", "id"), ("table",)} <= elements


@pytest.mark.parametrize("text", IN_FILES.values(), ids=IN_FILES)
def test_a_title_is_one_text_in_the_front_matter_and_without_markup(text):
    front = Page("x.md", text, "").text().split("\n---\n")[0].removeprefix("---\n")
    title = yaml.safe_load(front)["title"]
    assert set(yaml.safe_load(front)) == {"title"} and not set(title) & set("<>\"'")


def test_a_link_leads_to_an_address_of_the_web_or_into_the_site(as_html):
    hostile = ["javascript:alert(1)", "JaVaScRiPt:x", "data:text/html,x", "//x.invalid", "\x01j:x"]
    for target in (*hostile, 'x" onclick="y', "x) [l](javascript:y", *IN_FILES.values()):
        found = Skeleton(as_html(hyperlink("t", target)))
        assert found.elements == [("p",), ("a", "href")], target
        assert ":" not in found.targets[0] and not found.targets[0].startswith("//"), target
        assert Skeleton(as_html(source(target))).targets == [], target
    assert Skeleton(as_html(source("https://a.org/b_(c)?d=e&f#g"))).targets == [
        "https://a.org/b_%28c%29?d=e&f#g"
    ]


@pytest.mark.parametrize("text", IN_FILES.values(), ids=IN_FILES)
def test_no_text_leaves_a_code_block(text, as_html):
    assert {e[0] for e in Skeleton(as_html(folded(text, text, "text"))).elements} <= {
        *("details", "summary", "div", "pre", "a")
    }


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((GateResult, "id"), (Waiver, "id"), (Kill, "gate"), (Kill, "plant"), (Series, "path")),
        *((Record, "id"), (Record, "parents"), (Record, "metrics"), (Release, "id")),
    ],
)
def test_a_name_that_becomes_a_path_or_an_anchor_is_plain(kind, field):
    for text in (*IN_FILES.values(), "../x", "x y", "javascript:x", ""):
        value = {"parents": [text], "metrics": {text: {"value": 1, "unit": "1"}}}.get(field, text)
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({field: value})
        assert any(
            e["loc"][0] == field and "pattern" in e["type"] for e in refused.value.errors()
        ), text
