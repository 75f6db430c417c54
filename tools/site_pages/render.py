"""Pages from Jinja templates in `templates/`. Every value that is not Markup is escaped."""

import html
import json
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from stackproof.spec.visible import visible
from tools.site_pages import markup
from tools.site_pages.markup import anchor, code, esc


@pass_context
def link(context: Context, text: object, target: str, anchor: str = "") -> Markup:
    """A link to another page, given by its path below the site's root."""
    here = context["here"]
    path = posixpath.relpath(target, posixpath.dirname(here) or ".") if target != here else ""
    return markup.hyperlink(text, f"{path}{'#' + anchor if anchor else ''}")


@pass_context
def gate(context: Context, gate_id: str) -> Markup:
    return link(context, code(gate_id), f"gates/{gate_id}.md")


@pass_context
def plant(context: Context, plant_id: str) -> Markup:
    room = plant_id.partition(".")[0]
    return link(context, code(plant_id), f"museum/{room}.md", anchor(plant_id))


@pass_context
def run(context: Context, record_id: str) -> Markup:
    return link(context, code(record_id), f"runs/{record_id}.md")


FILTERS = (
    *(link, gate, plant, run, code, esc, anchor),
    *(
        markup.bullets,
        markup.chip,
        markup.commas,
        markup.fenced,
        markup.folded,
        markup.limit,
        markup.lines,
    ),
    *(markup.metric, markup.number, markup.optional, markup.pairs, markup.prose, markup.short),
    *(markup.short_hash, markup.source, markup.verdict),
)
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=esc,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {function.__name__: function for function in FILTERS}
ENVIRONMENT.globals |= {"table": markup.table, "ev": markup.ev, "MEANINGS": markup.MEANINGS}


def render(template: str, here: str = "", **values: object) -> Markup:
    """A template as text of the page at path `here`. More than one blank line becomes one."""
    text = ENVIRONMENT.get_template(template).render(here=here, **values)
    return Markup(re.sub(r"\n{3,}", "\n\n", text).strip())


@dataclass(frozen=True)
class Page:
    """A generated page: path below the site's root, title, and Markdown below the title."""

    path: str
    title: str
    body: str

    def text(self) -> str:
        """Front matter and body."""
        deep = "/" in self.path and not self.path.endswith("index.md")
        hide = "hide: [navigation]\n" if deep else ""
        # The theme puts the title into HTML as it stands.
        title = f"title: {json.dumps(html.escape(visible(self.title)), ensure_ascii=False)}\n"
        return f"---\n{title}{hide}---\n\n# {esc(self.title)}\n\n{self.body}\n"


def page(path: str, title: str, template: str, **values: object) -> Page:
    """A page whose body is a template."""
    return Page(path, title, render(template, path, **values))
