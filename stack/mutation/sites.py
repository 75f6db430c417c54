"""Where a mutant can stand: the functions and lines of the stack that a run executes, and a draw of
changes among them.
"""

import ast
import difflib
import inspect
import random
import sys
import textwrap
import threading
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stackproof.museum.edit import find, with_source
from stackproof.mutation.operators import WEIGHTS, Change, changes
from stackproof.spec.errors import IntegrityError

STACK = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "model", "kernels", "train", "evaluate", "export")


@dataclass
class Ran:
    """The lines of a function that ran, and the type names that its local variables were seen
    with. One that was seen with several types is not in `types`.
    """

    lines: set[int] = field(default_factory=set)
    types: dict[str, str | None] = field(default_factory=dict)

    def saw(self, values: Mapping[str, object]) -> None:
        """Take over the types of local variables."""
        self.merge(Ran(types={name: type(value).__name__ for name, value in values.items()}))

    def merge(self, other: "Ran") -> None:
        """Add the lines and types of the same function in another run."""
        self.lines |= other.lines
        for name, seen in other.types.items():
            self.types[name] = seen if self.types.get(name, seen) == seen else None


Trace = dict[str, Ran]  # by target, "module:Class.name"


@contextmanager
def traced(packages: Sequence[str] = PACKAGES) -> Iterator[Trace]:
    """Collects what runs of some packages of the stack while the context is entered, in every
    thread.
    """
    folders = tuple(f"{STACK / package}/" for package in packages)
    found: dict[types.CodeType, Ran] = defaultdict(Ran)
    result: Trace = {}

    def on_call(frame: types.FrameType, event: str, argument: object):
        code = frame.f_code
        if not code.co_filename.startswith(folders):
            return None
        ran = found[code]

        def on_line(frame: types.FrameType, event: str, argument: object):
            if event == "line":
                ran.lines.add(frame.f_lineno)
            elif event == "return":
                ran.saw(frame.f_locals)
            return on_line

        return on_line

    threading.settrace(on_call)
    sys.settrace(on_call)
    try:
        yield result
    finally:
        sys.settrace(None)
        threading.settrace(None)
        for code, ran in found.items():
            if target := target_of(code):
                result.setdefault(target, Ran()).merge(ran)


def target_of(code: types.CodeType) -> str | None:
    """The name of the function that code belongs to, as a museum's edit names it; that of the
    function around a nested one. None for the code of a module or class.
    """
    path = Path(code.co_filename).relative_to(STACK).with_suffix("")
    outer = code.co_qualname.split(".<locals>")[0] if "<locals>" in code.co_qualname else ""
    name = outer or code.co_qualname
    if "<" in name:
        return None
    return f"stackproof.{'.'.join(path.parts)}:{name}"


@dataclass(frozen=True)
class Mutant:
    """One change of one function. `source` is the whole changed function, `line` its place in the
    file, `diff` the changed lines.
    """

    target: str
    line: int
    operator: str
    source: str
    diff: str

    @property
    def package(self) -> str:
        """The package of the stack that holds the function."""
        return self.target.split(".")[1]


def mutants_of(target: str, ran: Ran) -> list[Mutant]:
    """All mutants of a function on the lines that ran; none if it cannot be edited."""
    try:
        function = find(target).function
        source = textwrap.dedent(inspect.getsource(function))
    except (IntegrityError, OSError, ImportError):
        return []
    first = function.__code__.co_firstlineno
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef):
        return []
    seen = {name: kind for name, kind in ran.types.items() if kind}
    found = {}
    for change in changes(tree, seen):
        line = change.node.lineno + first - 1
        if line in ran.lines:
            changed = replaced(source, change)
            if changed != source and _is_python(changed):
                diff = _diff(source, changed)
                found[changed] = Mutant(target, line, change.operator, changed, diff)
    return list(found.values())


@contextmanager
def in_place(mutant: Mutant) -> Iterator[None]:
    """The stack with a mutant in it, until the context ends."""
    with with_source(find(mutant.target), mutant.source):
        yield


def replaced(source: str, change: Change) -> str:
    """A source with the text of one node replaced."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    node = change.node
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (before + change.text.encode() + after).decode()


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:3] not in ("---", "+++", "@@ "))


def draw(trace: Trace, n: int, seed: int) -> list[Mutant]:
    """`n` different mutants, or all if there are fewer. All lines that ran are equally likely; on a
    line an operator is drawn by its weight, and then one of its mutants.
    """
    by_line = defaultdict(list)
    for target in sorted(trace):
        for mutant in mutants_of(target, trace[target]):
            by_line[target, mutant.line].append(mutant)
    draws, found, places = random.Random(seed), [], sorted(by_line)
    while places and len(found) < n:
        place = draws.choice(places)
        operators = sorted({m.operator for m in by_line[place]})
        chosen = draws.choices(operators, [WEIGHTS[o] for o in operators])[0]
        mutant = draws.choice([m for m in by_line[place] if m.operator == chosen])
        by_line[place].remove(mutant)
        if not by_line[place]:
            places.remove(place)
        found.append(mutant)
    return found
