"""Plants, read as text from `stack/museum/*.py`: nothing is imported,
so the site builds without torch.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from stackproof.spec.errors import IntegrityError


@dataclass(frozen=True)
class Exhibit:
    """What the `@plant(...)` decorator states about one plant, and where it stands."""

    id: str
    gate: str
    title: str
    story: str
    sources: tuple[str, ...]
    path: str
    line: int
    source: str


def read_exhibits(root: Path) -> dict[str, Exhibit]:
    """All plants of a repository by id, in order of room and line.
    Raises IntegrityError if one is not made of literals.
    """
    found: dict[str, Exhibit] = {}
    for path in sorted((root / "stack" / "museum").glob("*.py")):
        for exhibit in _room(path, root):
            if exhibit.id in found:
                raise IntegrityError(
                    f"plant id {exhibit.id} is used twice", value=f"{exhibit.path}:{exhibit.line}"
                )
            found[exhibit.id] = exhibit
    return found


def _room(path: Path, root: Path) -> list[Exhibit]:
    text, name = path.read_text("utf-8"), path.relative_to(root).as_posix()
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    plants = [(f, call) for f in functions for call in f.decorator_list if _is_plant(call)]
    lines = text.splitlines()
    return [_exhibit(f, call, name, lines) for f, call in plants]


def _is_plant(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "plant"
    )


def _exhibit(function: ast.FunctionDef, call: ast.Call, path: str, lines: list[str]) -> Exhibit:
    try:
        fields = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        plant_id = ast.literal_eval(call.args[0])
        body = "\n".join(lines[call.lineno - 1 : function.end_lineno])
        return Exhibit(
            id=plant_id,
            gate=fields["gate"],
            title=fields["title"],
            story=fields["story"],
            sources=tuple(fields["sources"]),
            path=path,
            line=function.lineno,
            source=body,
        )
    except (ValueError, KeyError, IndexError) as e:
        raise IntegrityError(
            f"{path}:{call.lineno}: the plant {function.name} cannot be read as text: {e}",
            allowed=(
                '@plant("id", gate="…", title="…", story="…", sources=("…",)) with literals only'
            ),
        ) from e
