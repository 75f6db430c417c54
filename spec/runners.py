"""Runners: who asks gates, which events each announces and what it hands to checks,
held against the gates of its kind.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from pydantic import Field, ValidationError

from stackproof.spec import IN_CHECKOUT, ROOT
from stackproof.spec.errors import IntegrityError
from stackproof.spec.gates import Frozen, Gate, Spec, _read_toml
from stackproof.spec.records import Record


class Runner(Frozen):
    """One way of running. `announces` names event classes; `files` show them to the gates,
    `ingredients` make what other checks get.
    """

    name: str = Field(pattern=r"^[a-z]+(-[a-z]+)*$")
    verb: str
    kind: str
    announces: tuple[str, ...] = ()
    files: tuple[str, ...]
    ingredients: tuple[str, ...] = ()


def load_runners(root: Path = ROOT) -> dict[str, Runner]:
    """Read `spec/runners.toml`, by name.
    Raises IntegrityError naming the entry and field, or a name that is used twice.
    """
    found: dict[str, Runner] = {}
    for entry in _read_toml(root / "spec" / "runners.toml").get("runner", []):
        try:
            runner = Runner.model_validate(entry)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise IntegrityError(
                f"runners.toml: {entry.get('name', '?')}: {where}: {first['msg']}"
            ) from e
        if runner.name in found:
            raise IntegrityError(f"runners.toml: the name {runner.name} is used twice")
        found[runner.name] = runner
    return found


def required(spec: Spec, kind: str) -> list[Gate]:
    """The gates that a run of a kind has to install, whatever its configuration."""
    return [g for g in spec.gates.values() if kind in g.kinds and g.moment != "repository"]


def left_out(spec: Spec, record: Record) -> list[str]:
    """Gates that a record's kind and configuration ask for and that it does not hold; only a record
    of this very spec can be asked.
    """
    held = {g.id for g in record.gates}
    return [
        g.id
        for g in required(spec, record.kind)
        if g.applies_to(record.config) and g.id not in held
    ]


def unfed(spec: Spec, runner: Runner) -> Iterator[tuple[str, str]]:
    """(gate id, what is missing) of every gate of the runner's kind that it does not feed,
    read in the source.
    """
    announced, given = _announced(spec.root, runner.files), _given(spec.root, runner.ingredients)
    for gate in required(spec, runner.kind):
        if gate.moment == "runtime":
            watched = watched_events(gate, spec.root)
            if not watched:
                yield gate.id, f"{gate.check} says no events"
            for event in watched:
                if event not in runner.announces:
                    yield gate.id, f"it does not announce {event}"
                elif event not in announced:
                    yield (
                        gate.id,
                        (
                            f"it is to announce {event}, and none of its files shows one to the "
                            "Gatekeeper"
                        ),
                    )
        elif missing := sorted(wanted_ingredients(gate, spec.root) - given):
            yield gate.id, f"none of its files makes {', '.join(missing)}"


def watched_events(gate: Gate, root: Path = ROOT) -> tuple[str, ...]:
    """Names of the events that a runtime gate's check watches, as its class says."""
    for node in getattr(_definition(gate, root), "body", ()):
        match node:
            case ast.Assign(targets=[ast.Name(id="events")], value=ast.Tuple(elts=elements)):
                return tuple(e.id for e in elements if isinstance(e, ast.Name))
    return ()


def wanted_ingredients(gate: Gate, root: Path = ROOT) -> set[str]:
    """What a preflight or artifact check cannot do without: its keyword
    arguments that have no default.
    """
    match _definition(gate, root):
        case ast.FunctionDef(args=arguments):
            return {
                a.arg
                for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)
                if default is None
            }
    return set()


def _definition(gate: Gate, root: Path) -> ast.AST | None:
    module, name = gate.check.split(":")
    path = root / (module.replace(".", "/") + ".py")
    body = _parsed(path, path.stat().st_mtime_ns).body if path.is_file() else []
    return next(
        (n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None
    )


def _announced(root: Path, files: Iterable[str]) -> set[str]:
    """Events that are made inside a call of something's `observe`, or by a function that says to
    return one and is called there.
    """
    said = [_said(_source(root, f)) for f in files]
    made = {name: event for _, _, returns in said for name, event in returns}
    return {made.get(shown, shown) for shows, _, _ in said for shown in shows}


def _given(root: Path, files: Iterable[str]) -> set[str]:
    """Keys of the dictionaries that are written out in files."""
    return set().union(*(_said(_source(root, f))[1] for f in files))


def _source(root: Path, file: str) -> Path:
    """A file of stack/, contracts/ or spec/; an installed package has
    those of stack/ at its top.
    """
    return root / (file if IN_CHECKOUT or root != ROOT else file.removeprefix("stack/"))


def _said(path: Path) -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, str]]]:
    """(what is called to be shown, keys written out, functions and what they say to return) of a
    file; nothing of one that is not there.
    """
    return (
        _read(path, path.stat().st_mtime_ns)
        if path.is_file()
        else (frozenset(), frozenset(), frozenset())
    )


@cache
def _read(
    path: Path, stamp: int
) -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, str]]]:
    shown, keys, returns = set(), set(), set()
    for node in ast.walk(_parsed(path, stamp)):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="observe"),
                args=[ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))],
            ):
                shown.add(name)
            case ast.FunctionDef(name=name, returns=ast.Name(id=event)):
                returns.add((name, event))
            case ast.Dict():
                keys |= {
                    k.value
                    for k in node.keys
                    if isinstance(k, ast.Constant) and isinstance(k.value, str)
                }
    return frozenset(shown), frozenset(keys), frozenset(returns)


@cache
def _parsed(path: Path, stamp: int) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))
