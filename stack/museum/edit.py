"""Plants as edits: the source of a function is changed, compiled,
and swapped in for the length of a `with`.

The function object stays the same and gets other code, so that every alias of it, in any module or
closure, runs the changed text. The changed place counts a touch each time it runs.
"""

import ast
import functools
import importlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from stackproof.spec.errors import IntegrityError

COUNTER = "__plant_ran__"


@dataclass(frozen=True)
class Edit:
    """One changed place: in the function `target`, "module:name" or "module:Class.name",
    `old` becomes `new`.

    `imports` are import statements that `new` needs; they become the first lines of the function.
    """

    target: str
    old: str
    new: str
    imports: Sequence[str] = ()


@contextmanager
def edited(edits: Sequence[Edit], count: Callable[[], None]) -> Iterator[None]:
    """Apply all edits, each function with its changes in order; put every function back at the end.

    `count` is called whenever a changed place runs. Raises IntegrityError if a target does not
    exist or cannot be edited, or if `old` does not stand in it exactly once.
    """
    by_target: dict[str, list[Edit]] = {}
    for edit in edits:
        by_target.setdefault(edit.target, []).append(edit)
    with ExitStack() as stack:
        for target, own in by_target.items():
            stack.enter_context(_swapped(find(target), own, count))
        yield


@contextmanager
def _swapped(found: "Target", edits: Sequence[Edit], count: Callable[[], None]) -> Iterator[None]:
    names = found.function.__globals__
    had_counter = COUNTER in names
    names.setdefault(COUNTER, count)
    try:
        with with_source(found, changed_source(found, edits)):
            yield
    finally:
        if not had_counter:
            del names[COUNTER]


@contextmanager
def with_source(found: "Target", source: str) -> Iterator[None]:
    """A function with the code of another source, until the context ends."""
    function = found.function
    changed = _compiled(function, source)
    former = function.__code__, function.__defaults__, function.__kwdefaults__
    found.forget()
    try:
        function.__code__, function.__defaults__, function.__kwdefaults__ = changed
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = former
        found.forget()


@dataclass(frozen=True)
class Target:
    """A function that an edit names, without its decorators; `caches` are
    the caches found around it.
    """

    name: str
    function: types.FunctionType
    caches: tuple[Any, ...] = ()

    def forget(self) -> None:
        """Empty the caches around the function: they hold what other code computed."""
        for cache in self.caches:
            cache.cache_clear()


def find(name: str) -> Target:
    """The Python function behind "module:name", under properties, cached properties,
    class methods, icontract and other decorators.

    Raises IntegrityError if the function does not exist, or if it is compiled by torch or Triton
    and would not run its Python code.
    """
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    try:
        for part in outer:
            owner = getattr(owner, part)
        found = inspect.getattr_static(owner, last)
    except AttributeError:
        raise IntegrityError(
            f"a plant edits {name}, which does not exist",
            next_step="name the function where it is now",
        ) from None
    caches = []
    while True:
        if type(found).__module__.split(".")[0] == "triton" or hasattr(
            found, "_torchdynamo_orig_callable"
        ):
            raise IntegrityError(
                f"a plant edits {name}, which is compiled and does not run its Python code"
            )
        inner = (
            getattr(found, "fget", None)
            or getattr(found, "__func__", None)
            or getattr(found, "__wrapped__", None)
            or (found.func if isinstance(found, functools.cached_property) else None)
        )
        if hasattr(found, "cache_clear"):
            caches.append(found)
        if inner is None:
            break
        found = inner
    if not isinstance(found, types.FunctionType):
        raise IntegrityError(
            f"a plant edits {name}, which is not a Python function", value=type(found).__name__
        )
    return Target(name, found, tuple(caches))


def changed_source(found: Target, edits: Sequence[Edit]) -> str:
    """Source of the function with all edits made and counted.
    Raises IntegrityError if a text does not stand in it exactly once.
    """
    try:
        source = textwrap.dedent(inspect.getsource(found.function))
    except OSError as e:
        raise IntegrityError(f"a plant edits {found.name}, whose source cannot be read: {e}") from e
    for edit in edits:
        times = source.count(edit.old)
        if times != 1:
            raise IntegrityError(
                f"a plant edits {found.name}, and its old text stands there {times} times",
                value=edit.old,
                allowed="once",
                next_step=(
                    "take over the text of the function as it is now; make it longer where it is "
                    "not unique"
                ),
            )
        if edit.old == edit.new:
            raise IntegrityError(f"a plant edits {found.name} and changes nothing", value=edit.old)
        place = source.index(edit.old)
        source = _counted(
            source, place, source[:place] + edit.new + source[place + len(edit.old) :]
        )
        source = _importing(source, edit.imports)
    return source


def _counted(source: str, place: int, changed: str) -> str:
    """`changed` with a count before the statement in which the change begins.
    Both sources are equal up to `place`.
    """
    place += len(source[place:]) - len(source[place:].lstrip())
    line = source.count("\n", 0, place) + 1
    around = [
        s for s in _statements(ast.parse(source).body[0]) if _first_line(s) <= line <= s.end_lineno
    ]
    if not around:  # the change is in the head of the function
        around, source = [_first_statement(changed)], changed
    at = max(_first_line(s) for s in around)
    return _inserted(changed, at, [f"{COUNTER}()"], like=source.splitlines()[at - 1])


def _importing(source: str, imports: Sequence[str]) -> str:
    """The source with statements before the first of the function."""
    at = _first_line(_first_statement(source))
    return _inserted(source, at, imports, like=source.splitlines()[at - 1])


def _inserted(source: str, line: int, statements: Sequence[str], *, like: str) -> str:
    """The source with statements before a line, indented like another line."""
    lines = source.splitlines(keepends=True)
    indent = like[: len(like) - len(like.lstrip())]
    return "".join(
        [*lines[: line - 1], *(f"{indent}{s}\n" for s in statements), *lines[line - 1 :]]
    )


def _statements(function: ast.AST) -> Iterator[ast.stmt]:
    """All statements in a function before which another can stand: every one but an `elif`."""
    for node in ast.walk(function):
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else ():
                if isinstance(child, ast.stmt) and not _continues(node, field, child):
                    yield child


def _first_statement(source: str) -> ast.stmt:
    """The first statement of a function after its docstring."""
    function = ast.parse(source).body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return function.body[1 if has_docstring and len(function.body) > 1 else 0]


def _continues(node: ast.AST, field: str, child: ast.stmt) -> bool:
    """Whether a statement is an `elif`: nothing can stand before it."""
    return (
        isinstance(node, ast.If)
        and field == "orelse"
        and isinstance(child, ast.If)
        and child.col_offset == node.col_offset
    )


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _compiled(function: types.FunctionType, source: str) -> tuple[types.CodeType, Any, Any]:
    """(code, defaults, keyword defaults) of the changed source.
    Closure variables stay those of the function.

    Raises IntegrityError if the change needs other closure variables than the function has.
    """
    tree = ast.parse(source)
    definition = tree.body[0]
    definition.decorator_list = []
    free = function.__code__.co_freevars
    if free:
        keep = ast.parse(f"def outer({', '.join(free)}):\n    pass").body[0]
        keep.body = [definition, ast.parse(f"return {definition.name}").body[0]]
        tree.body = [keep]
    names: dict[str, Any] = {}
    path, first = function.__code__.co_filename, function.__code__.co_firstlineno
    exec(
        compile(ast.increment_lineno(ast.fix_missing_locations(tree), first - 1), path, "exec"),
        function.__globals__,
        names,
    )
    made = (
        names["outer"](*(cell.cell_contents for cell in function.__closure__))
        if free
        else names[definition.name]
    )
    if made.__code__.co_freevars != free:
        raise IntegrityError(
            f"a plant changes which closure variables {function.__qualname__} uses",
            value=", ".join(made.__code__.co_freevars),
            allowed=", ".join(free),
        )
    return made.__code__, made.__defaults__, made.__kwdefaults__
