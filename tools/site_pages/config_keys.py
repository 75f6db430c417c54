"""Configuration keys, read as text from `stack/config/`, so that the page needs neither
pydantic models nor torch.
"""

import ast
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackproof.spec.errors import IntegrityError
from tools.site_pages.markup import Page, code, esc, prose, table
from tools.site_pages.world import World

CONSTRAINTS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥"}


@dataclass(frozen=True)
class Key:
    """One field of a configuration class."""

    name: str
    annotation: ast.expr
    default: str
    allowed: str
    meaning: str


@dataclass
class Section:
    """A configuration class: its docstring and fields."""

    doc: str
    keys: list[Key] = field(default_factory=list)


def config_page(world: World) -> Page:
    """Every key with type, range, default and meaning, one table per section or variant."""
    page = Page("config.md", "Configuration")
    folder = world.root / "stack" / "config"
    if not folder.is_dir():
        return page.add("`stack/config/` is not part of this build.")
    sections = read_sections(folder)
    page.add(
        "Values come from a recipe, then from a run file, then from `--set key=value`, in this "
        "order. An unknown key is an error that names the nearest one. A key marked *set by the "
        "recipe* has no default of its own.",
        "The resolved values of a run, with the origin of every change, are in its "
        f"{page.link('record', 'records.md')}.",
    )
    return page.add(*_tables(sections, "RunConfig", "", ""))


def read_sections(folder: Path) -> dict[str, Section]:
    """Classes of the package by name, with the keys they inherit.
    Raises IntegrityError without a RunConfig.
    """
    nodes = [
        n for path in sorted(folder.glob("*.py")) for n in ast.parse(path.read_text("utf-8")).body
    ]
    classes = {n.name: n for n in nodes if isinstance(n, ast.ClassDef)}
    unions = {
        n.targets[0].id: n.value
        for n in nodes
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }
    sections = {
        name: Section(ast.get_docstring(node) or "", _keys(node, classes, unions))
        for name, node in classes.items()
    }
    if "RunConfig" not in sections:
        raise IntegrityError(
            f"{folder} defines no RunConfig",
            next_step="name the root of the configuration RunConfig",
        )
    return sections


def _keys(
    node: ast.ClassDef, classes: dict[str, ast.ClassDef], unions: dict[str, ast.expr]
) -> list[Key]:
    """Keys of a class after those of its bases; a name that stands for
    a union is replaced by it.
    """
    found: dict[str, Key] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and base.id in classes:
            found |= {k.name: k for k in _keys(classes[base.id], classes, unions)}
    own = [
        _key(x)
        for x in node.body
        if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
    ]
    named = {n: u for n, u in unions.items() if any(c in ast.unparse(u) for c in classes)}
    return [
        *(
            found | {k.name: replace(k, annotation=_Named(named).visit(k.annotation)) for k in own}
        ).values()
    ]


class _Named(ast.NodeTransformer):
    """Replaces the names of unions, also those inside other unions."""

    def __init__(self, unions: dict[str, ast.expr]):
        self.unions = unions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.visit(self.unions[node.id]) if node.id in self.unions else node


def _key(node: ast.AnnAssign) -> Key:
    value, name = node.value, node.target.id
    if (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id == "Field"
    ):
        options = {k.arg: ast.unparse(k.value) for k in value.keywords}
        default = ast.unparse(value.args[0]) if value.args else options.get("default", "")
        allowed = ", ".join(
            f"{sign} {options[k].replace(' ** ', '^')}"
            for k, sign in CONSTRAINTS.items()
            if k in options
        )
        meaning = next(
            (ast.literal_eval(k.value) for k in value.keywords if k.arg == "description"), ""
        )
        return Key(name, node.annotation, default, allowed, meaning)
    return Key(name, node.annotation, ast.unparse(value) if value is not None else "", "", "")


def _classes(annotation: ast.expr, sections: dict[str, Section]) -> list[str]:
    """Configuration classes an annotation names, in order; several for a tagged union."""
    names = [n for n in ast.walk(annotation) if isinstance(n, ast.Name) and n.id in sections]
    return [n.id for n in sorted(names, key=lambda n: (n.lineno, n.col_offset))]


def _tables(sections: dict[str, Section], name: str, prefix: str, variant: str) -> list[str]:
    section, blocks, rows, nested = sections[name], [], [], []
    for key in section.keys:
        if below := _classes(key.annotation, sections):
            nested.append((key, below))
        elif not (variant and key.name == "kind"):
            rows.append(_row(prefix, key))
    title = f"{prefix.rstrip('.') or 'The run'}" + (f": kind = {variant}" if variant else "")
    blocks += [f"{'###' if variant else '##'} {esc(title)}", prose(section.doc)]
    if rows:
        blocks.append(table(["key", "type", "allowed", "default", "meaning"], rows))
    for key, below in nested:
        for child in below:
            blocks += _tables(
                sections,
                child,
                f"{prefix}{key.name}.",
                _kind(sections[child]) if len(below) > 1 else "",
            )
    return blocks


def _row(prefix: str, key: Key) -> list[str]:
    return [
        code(prefix + key.name),
        code(_type(key.annotation)),
        esc(key.allowed or "–"),
        _default(key),
        prose(key.meaning or "–"),
    ]


def _kind(section: Section) -> str:
    return next((k.default.strip("'\"") for k in section.keys if k.name == "kind"), "")


def _type(annotation: ast.expr) -> str:
    text = ast.unparse(annotation)
    return (
        text.removeprefix("Literal[").removesuffix("]").replace(", ", " | ").replace("'", "")
        if text.startswith("Literal[")
        else text
    )


def _default(key: Key) -> str:
    return (
        code(key.default.replace("'", '"').replace("True", "true").replace("False", "false"))
        if key.default
        else "set by the recipe"
    )
