"""The canonical form of Python definitions: the computation, without messages, names of locals and
layout.

`stackproof.spec.fingerprint` hashes it. A definition is written as nested lists. References to
other definitions are numbered and listed beside the text, so that their names do not enter.
"""

import ast
import builtins
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from stackproof.spec.errors import IntegrityError

VERDICTS = "contracts.gate"
MESSAGE_AT = {"decide": 1, "failed": 0, "passed": 0, "not_run": 0, "Verdict": 1, "decide_all": 0}
WORDS = ["words"]
LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "returns", "annotation", "simple"}


class Key(NamedTuple):
    """A definition: dotted path of the module below the repository root, and the name in it; `*` is
    the whole module.
    """

    module: str
    name: str


class Form(NamedTuple):
    """Canonical form of one definition: JSON text with numbered references, and their targets.

    `keywords` are the names that its calls pass by keyword to unknown functions.
    """

    text: str
    references: tuple[Key, ...]
    keywords: frozenset[str]


class Names(Protocol):
    """Resolves module-level names; see `stackproof.spec.fingerprint.Code`."""

    def resolve(self, module: str, name: str) -> Key | str | None: ...
    def imported(self, source: str, name: str | None) -> Key | str: ...
    def parameters(self, key: Key) -> list[str]: ...


def imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """(bound name, (module, name or None)) of each alias.
    Raises IntegrityError for a star or relative import.
    """
    for alias in node.names:
        if isinstance(node, ast.Import):
            whole = alias.asname is not None or "." not in alias.name
            yield (
                alias.asname or alias.name.split(".")[0],
                (alias.name if whole else alias.name.split(".")[0], None),
            )
        elif alias.name == "*" or node.level:
            raise IntegrityError(
                "a check reaches a star or relative import",
                next_step="import by full module path and name",
            )
        else:
            yield alias.asname or alias.name, (str(node.module), alias.name)


def is_bare(node: ast.AST) -> bool:
    """Whether a statement has no effect: `pass`, a docstring or another constant."""
    return isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def bound(nodes: Iterable[ast.AST]) -> dict[str, None]:
    """Names that statements bind in their own scope, in order,
    without those declared global or nonlocal.
    """
    found: dict[str, None] = {}
    foreign: set[str] = set()

    def look(node: ast.AST) -> None:
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                found.setdefault(name)
                return
            case ast.Lambda():
                return
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                for inner in ast.walk(node):
                    if isinstance(inner, ast.NamedExpr):
                        found.setdefault(inner.target.id)
                return
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                found.setdefault(name)
            case ast.Import() | ast.ImportFrom():
                found.update(dict.fromkeys(name for name, _ in imports(node)))
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                found.setdefault(name)
            case ast.MatchAs(name=str(name)):
                found.setdefault(name)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                foreign.update(names)
        for child in ast.iter_child_nodes(node):
            look(child)

    for node in nodes:
        look(node)
    return {name: None for name in found if name not in foreign}


def _parameters(arguments: ast.arguments) -> tuple[list[str], list[str]]:
    """(parameters whose names are free, keyword-only parameters), in order."""
    free = [
        a.arg
        for a in (*arguments.posonlyargs, *arguments.args, arguments.vararg, arguments.kwarg)
        if a
    ]
    return free, [a.arg for a in arguments.kwonlyargs]


@dataclass
class Scope:
    """Names of one function, comprehension or class body. Locals are numbered in order of first
    use.
    """

    names: set[str]
    is_class: bool = False
    numbers: dict[str, int] = field(default_factory=dict)


class Writer:
    """Writes the statements of one definition. References to other definitions are numbered in
    order.
    """

    def __init__(self, code: Names, key: Key, kept: frozenset[str]):
        self.code, self.key, self.kept = code, key, kept
        self._references: dict[Key, int] = {}
        self._keywords: set[str] = set()
        self._scopes: list[Scope] = []
        self._binds: list[str] = []
        self._count = 0

    def form(self, statements: list[ast.stmt]) -> Form:
        """The form of the statements of the definition."""
        written = [self.statement(s) for s in statements]
        text = json.dumps(written, ensure_ascii=True, separators=(",", ":"))
        return Form(text, tuple(self._references), frozenset(self._keywords))

    def statement(self, node: ast.stmt) -> Any:
        """One module-level statement as nested lists of strings."""
        self._binds, self._count = list(bound([node])), 0
        return self.write(node)

    def write(self, node: Any) -> Any:
        """The form of a node, a list of nodes or a plain value."""
        match node:
            case list():
                return [self.write(n) for n in node if not is_bare(n)]
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                return self.store(name)
            case ast.Name(id=name):
                return self.load(name)
            case ast.Constant(value=value):
                return ["constant", type(value).__name__, repr(value)]
            case ast.JoinedStr():
                return ["text", *self.joined(node)]
            case ast.Attribute(value=value, attr=attr):
                target = self.target(node)
                return (
                    ["attribute", self.write(value), attr]
                    if target is None
                    else self.reference(target, attr)
                )
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                decorators = [self.decorator(d) for d in node.decorator_list]
                return [
                    type(node).__name__,
                    self.store(node.name),
                    decorators,
                    *self.scoped(node.args, node.body),
                ]
            case ast.Lambda(args=arguments, body=body):
                return ["Lambda", *self.scoped(arguments, [body])]
            case ast.ClassDef():
                outside = [
                    self.write(node.decorator_list),
                    self.write(node.bases),
                    self.write(node.keywords),
                ]
                with self.scope(bound(node.body), is_class=True):
                    body = self.write(node.body)
                return ["ClassDef", self.store(node.name), outside, body]
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                return self.comprehension(node)
            case ast.Call():
                return self.call(node)
            case ast.Raise(exc=ast.Call(func=func, args=args, keywords=keywords), cause=cause):
                words = [self.words(a) for a in args] + [
                    [k.arg, self.words(k.value)] for k in keywords
                ]
                return ["Raise", self.write(func), words, self.write(cause)]
            case ast.Assert(test=test):
                return ["Assert", self.write(test)]
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                kinds = sorted(
                    {"ClassVar", "InitVar"}
                    & {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
                )
                return ["Assign", [self.write(target)], self.write(value), *kinds]
            case ast.Assign(targets=targets, value=value):
                return ["Assign", self.write(targets), self.write(value)]
            case ast.Import() | ast.ImportFrom():
                found = imports(node)
                return [
                    "Import",
                    *(
                        [self.store(name), self.reference(self.code.imported(*what), name)]
                        for name, what in found
                    ),
                ]
            case ast.ExceptHandler(type=kind, name=name, body=body):
                return ["ExceptHandler", self.write(kind), self.store(name), self.write(body)]
            case ast.MatchAs(pattern=pattern, name=name):
                return ["MatchAs", self.write(pattern), self.store(name)]
            case ast.MatchStar(name=name):
                return ["MatchStar", self.store(name)]
            case ast.MatchMapping(keys=keys, patterns=patterns, rest=rest):
                return ["MatchMapping", self.write(keys), self.write(patterns), self.store(rest)]
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                return [type(node).__name__, *(self.load(n) for n in names)]
            case ast.AST():
                fields = [(f, getattr(node, f, None)) for f in node._fields if f not in LEFT_OUT]
                return [
                    type(node).__name__,
                    *([f, self.write(v)] for f, v in fields if v is not None and v != []),
                ]
            case str() | bool() | None:
                return node
        return repr(node)

    # Names

    def load(self, name: str) -> Any:
        """A name that is read: a local by its number, an attribute of the class being defined,
        or what the module binds.
        """
        for scope in reversed(self._scopes):
            if name not in scope.names:
                continue
            if not scope.is_class:
                if name not in scope.numbers:
                    scope.numbers[name], self._count = self._count, self._count + 1
                return ["local", scope.numbers[name]]
            if scope is self._scopes[-1]:
                return ["of class", name]
        if name == self.key.name:
            return ["itself"]
        return self.reference(self.code.resolve(self.key.module, name), name)

    def store(self, name: str | None) -> Any:
        """A name that is bound. At module level the name defined is `itself`,
        and the others are counted.
        """
        if name is None or self._scopes or name == self.key.name:
            return name if name is None else self.load(name)
        return ["bound", self._binds.index(name)] if name in self._binds else self.load(name)

    def reference(self, target: Key | str | None, name: str) -> Any:
        """Canonical form of a name outside all scopes."""
        match target:
            case Key() if target == self.key:
                return ["itself"]
            case Key():
                return ["reached", self._references.setdefault(target, len(self._references))]
            case str():
                return ["import", target]
        return ["builtin" if hasattr(builtins, name) else "unbound", name]

    def target(self, node: ast.AST) -> Key | str | None:
        """Canonical form of a dotted name at module level; None for any other expression."""
        match node:
            case ast.Name(id=name):
                local = any(
                    name in s.names and (not s.is_class or s is self._scopes[-1])
                    for s in self._scopes
                )
                return None if local else self.code.resolve(self.key.module, name)
            case ast.Attribute(value=value, attr=attr):
                base = self.target(value)
                if isinstance(base, str):
                    return f"{base}.{attr}"
                return self.code.resolve(base.module, attr) if base and base.name == "*" else None
        return None

    @contextmanager
    def scope(self, names: Iterable[str], *, is_class: bool = False) -> Iterator[None]:
        self._scopes.append(Scope(set(names), is_class))
        yield
        self._scopes.pop()

    # Functions, calls and texts

    def decorator(self, node: ast.expr) -> Any:
        """A decorator. Its lambdas receive arguments by name, as in icontract."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Lambda):
                self._keywords |= {a.arg for a in (*inner.args.posonlyargs, *inner.args.args)}
        return self.write(node)

    def scoped(self, arguments: ast.arguments, body: list) -> list:
        """Shape, parameters, defaults and body of a function, in its own scope."""
        free = [
            a.arg
            for a in (*arguments.posonlyargs, *arguments.args, arguments.vararg, arguments.kwarg)
            if a
        ]
        named = [a.arg for a in arguments.kwonlyargs]
        shape = [
            len(arguments.posonlyargs),
            len(arguments.args),
            bool(arguments.vararg),
            bool(arguments.kwarg),
        ]
        defaults = [
            self.write(arguments.defaults),
            [d and self.write(d) for d in arguments.kw_defaults],
        ]
        with self.scope([*free, *named, *bound(body)]):
            parameters = [
                [self.load(p), p if p in self.kept or p in named else ""] for p in (*free, *named)
            ]
            return [[str(n) for n in shape], parameters, defaults, self.write(body)]

    def comprehension(self, node: Any) -> list:
        """The first iterable is evaluated outside the comprehension's scope."""
        first = self.write(node.generators[0].iter)
        with self.scope(
            n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)
        ):
            loops = []
            for i, g in enumerate(node.generators):
                source = first if i == 0 else self.write(g.iter)
                loops.append([source, self.write(g.target), self.write(g.ifs), bool(g.is_async)])
            results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return [type(node).__name__, loops, self.write(results)]

    def call(self, node: ast.Call) -> list:
        """A call. Keywords of a known function are written by position, so that renaming a
        parameter changes nothing.
        """
        target = self.target(node.func)
        message = (
            MESSAGE_AT.get(target.name)
            if isinstance(target, Key) and target.module == VERDICTS
            else None
        )
        positions = self.positions(target)
        args = [self.words(a) if i == message else self.write(a) for i, a in enumerate(node.args)]
        keywords = []
        for k in node.keywords:
            if k.arg in positions:
                place = str(positions[k.arg])
            else:
                place = k.arg or "**"
                outside = isinstance(target, str) and target != "functools.partial"
                self._keywords |= set(positions) if k.arg is None else set() if outside else {k.arg}
            value = (
                self.words(k.value)
                if message is not None and place == str(message)
                else self.write(k.value)
            )
            keywords.append([place, value])
        return ["Call", self.write(node.func), args, keywords]

    def positions(self, target: Key | str | None) -> dict[str, int]:
        """Positions of a known function's parameters by name, without those in `kept`."""
        parameters = self.code.parameters(target) if isinstance(target, Key) else []
        return {name: i for i, name in enumerate(parameters) if name not in self.kept}

    def joined(self, node: ast.JoinedStr) -> list:
        """Parts of an f-string. Adjacent texts are joined, because Python versions split them
        differently.
        """
        parts: list = []
        for value in node.values:
            match value:
                case ast.Constant(value=text):
                    if parts and isinstance(parts[-1], str):
                        parts[-1] += text
                    elif text:
                        parts.append(text)
                case ast.JoinedStr():
                    parts += self.joined(value)
                case ast.FormattedValue(value=inner, conversion=conversion, format_spec=spec):
                    parts.append(
                        [self.write(inner), str(conversion), self.joined(spec) if spec else []]
                    )
        return parts

    def words(self, node: ast.AST) -> Any:
        """A message: its text is omitted, its interpolated values are kept."""
        match node:
            case ast.Constant(value=str()):
                return WORDS
            case ast.JoinedStr(values=values):
                return [
                    WORDS,
                    *(self.write(v.value) for v in values if isinstance(v, ast.FormattedValue)),
                ]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [self.words(left), self.words(right)]
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return ["IfExp", self.write(test), self.words(body), self.words(orelse)]
            case ast.BoolOp(op=ast.And(), values=[*conditions, message]):
                return ["and", self.write(conditions), self.words(message)]
            case ast.List(elts=messages):
                return ["List", *map(self.words, messages)]
        return self.write(node)
