"""Fingerprints of gates: one hash over what a gate promises and what its check computes.

A check enters in a canonical form of its syntax tree, together with everything in `contracts` and
`spec` that it reaches: functions, classes, constants, module-level branches, statements that change
them, and the code in `contracts.gate` that turns measurements into verdicts.

The form leaves out what decides nothing, so that rewording, renaming and moving are free:
docstrings, comments, layout, annotations, names of local variables, of parameters and of the
functions reached, module paths, and the words of verdict messages and errors. A function that is
reached enters by the hash of its own form. The form is the same on every supported Python version;
`ast.dump` is not.

What stays visible: attributes and methods (also those of objects passed in), keyword-only
parameters, parameters that a call may pass by keyword without naming the function, and dotted names
of other packages. Code behind an object that is passed in is not part of the form.
"""

import ast
import builtins
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from spec.canonical import sha256_json
from spec.errors import IntegrityError

FORM = 2
PACKAGE = "stackproof"
OPAQUE = {"spec.errors"}  # error classes hold words and exit codes; they enter by name
VERDICTS = "contracts.gate"
MESSAGE_AT = {"decide": 1, "failed": 0, "passed": 0, "not_run": 0, "Verdict": 1}
WORDS = ["words"]
LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "returns", "annotation", "simple"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.AnnAssign)


class Key(NamedTuple):
    """A definition: the module's path below the repository root, dotted, and the name in it. `*` is the whole module."""

    module: str
    name: str


class Carried(NamedTuple):
    """One line of spec/carried.jsonl: an unchanged gate whose fingerprint was computed in another form from `commit` on."""

    gate: str
    old: str
    new: str
    commit: str


def read_carried(path: Path) -> tuple[Carried, ...]:
    """The lines of spec/carried.jsonl; none if the file does not exist. Raises IntegrityError naming a line that is not one."""
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else (), start=1):
        try:
            found.append(Carried(**json.loads(line)))
        except (ValueError, TypeError) as e:
            raise IntegrityError(f"{path.name} line {number} does not carry a gate over: {e}") from e
    return tuple(found)


def check_fingerprint(normative: dict, check: str, root: Path) -> str:
    """Hex sha256 over a gate's normative fields and the canonical form of its check `module:name`."""
    return sha256_json({"form": FORM, "normative": normative, "check": code_below(root).hash(check)})


def check_source(check: str, root: Path) -> str:
    """Source text of a check and of everything it reaches, in the order in which it is reached."""
    code = code_below(root)
    return "\n\n".join(text for key in code.reached(code.locate(check)) for text in code.sources(key))


@cache
def code_below(root: Path) -> "Code":
    """The code below a repository root, read once per process."""
    return Code(root)


class Form(NamedTuple):
    """Canonical form of one definition: its JSON text, in which references are counted, and what they refer to.

    `keywords` are the names that its calls pass by keyword to functions that are not known.
    """

    text: str
    references: tuple[Key, ...]
    keywords: frozenset[str]


class Code:
    """The modules of `contracts` and `spec` below a repository root. Each file is read once."""

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, Module | None] = {}
        self._forms: dict[tuple[Key, frozenset[str]], Form] = {}
        self._parameters: dict[Key, frozenset[str]] = {}
        self._hashes: dict[str, str] = {}

    def hash(self, check: str) -> str:
        """Hex sha256 of the canonical form of `module:name` and all it reaches.

        Raises IntegrityError if it does not exist.
        """
        if check not in self._hashes:
            key = self.locate(check)
            reached = self.reached(key)
            kept = frozenset().union(*(self.form(k).keywords for k in reached))
            self._hashes[check] = _hashes({k: self.form(k, kept) for k in reached})[key]
        return self._hashes[check]

    def locate(self, check: str) -> Key:
        """The definition that `module:name` names, through re-exports. Raises IntegrityError if there is none."""
        module, name = check.split(":")
        module = _below_root(module) or module
        target = self.resolve(module, name)
        if not isinstance(target, Key) or not self.statements(target):
            raise IntegrityError(
                f"check {check} does not exist",
                next_step=f"define {name} in {module.replace('.', '/')}.py",
            )
        return target

    def module(self, name: str) -> "Module | None":
        """The parsed module, or None if no file of the repository holds it."""
        if name not in self._modules:
            path = self.root.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._modules[name] = Module(file.read_text("utf-8")) if file.is_file() else None
        return self._modules[name]

    def statements(self, key: Key) -> list[ast.stmt]:
        """Module-level statements that define a name: those that bind it, and branches and changes that mention it."""
        module = self.module(key.module)
        if module is None:
            return []
        return [s.node for s in module.statements if key.name == "*" or s.defines(key.name)]

    def sources(self, key: Key) -> list[str]:
        """Source texts of the statements of a definition."""
        return [self.module(key.module).source(node) for node in self.statements(key)]

    def reached(self, entry: Key) -> list[Key]:
        """All definitions that a definition reaches, itself first, in order of discovery."""
        found: dict[Key, None] = {}
        waiting = [entry]
        while waiting:
            key = waiting.pop(0)
            if key not in found:
                found[key] = None
                waiting += self.form(key).references
        return list(found)

    def form(self, key: Key, kept: frozenset[str] = frozenset()) -> Form:
        """Canonical form of one definition, in which parameters listed in `kept` keep their names."""
        if key not in self._parameters:
            nodes = (n for s in self.statements(key) for n in ast.walk(s))
            self._parameters[key] = frozenset(n.arg for n in nodes if isinstance(n, ast.arg))
        place = (key, kept & self._parameters[key])
        if place not in self._forms:
            self._forms[place] = Writer(self, key, kept).form(self.statements(key))
        return self._forms[place]

    def resolve(self, module: str, name: str) -> Key | str | None:
        """What a module-level name stands for: a Key, a dotted path outside the project, or None if it is not bound there."""
        found = self.module(module)
        if found is None:
            return None
        if name in found.bound:
            return Key(module, name)
        if name in found.imports:
            return self.imported(*found.imports[name])
        return Key(f"{module}.{name}", "*") if self.module(f"{module}.{name}") else None

    def imported(self, source: str, name: str | None) -> Key | str:
        """What `import source` (name None) or `from source import name` binds."""
        inside = _below_root(source)
        if inside is None:
            return source if name is None else f"{source}.{name}"
        if inside in OPAQUE:
            return f"{PACKAGE}.{inside}" if name is None else f"{PACKAGE}.{inside}.{name}"
        dotted = inside if name is None else f"{inside}.{name}".lstrip(".")
        if name is None or self.module(dotted):
            return f"{PACKAGE}.{dotted}" if dotted in OPAQUE else Key(dotted, "*")
        found = self.resolve(inside, name)
        if found is None:
            raise IntegrityError(f"{source} defines no {name}, which a check imports")
        return found


def _below_root(module: str) -> str | None:
    """The folder path of a module of this project, dotted; None for a module of another package."""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    if module == PACKAGE:
        return ""
    return ".".join(parts) if parts[0] in ("contracts", "spec") else None


@dataclass(frozen=True)
class Statement:
    """A module-level statement: the names that it binds, and those it mentions."""

    node: ast.stmt
    binds: tuple[str, ...]
    mentions: frozenset[str]

    def defines(self, name: str) -> bool:
        """Whether it is part of a name's definition. A statement that is more than a definition may change what it mentions."""
        return name in self.binds or (not self._is_definition and name in self.mentions)

    @property
    def _is_definition(self) -> bool:
        names = isinstance(self.node, ast.Assign) and all(isinstance(t, ast.Name) for t in self.node.targets)
        return names or isinstance(self.node, DEFINITIONS)


class Module:
    """One parsed file: its statements, the names they bind, and its imports."""

    def __init__(self, text: str):
        self._lines = text.splitlines()
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.statements: list[Statement] = []
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= dict(_imports(node))
            elif not _is_bare(node):
                mentions = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
                self.statements.append(Statement(node, tuple(_bound([node])), mentions))
        self.bound = {name for s in self.statements for name in s.binds}
        functions = (s.node for s in self.statements if isinstance(s.node, ast.FunctionDef))
        self.functions = {f.name: f for f in functions}

    def source(self, node: ast.stmt) -> str:
        """Text of a statement with its decorators."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return "\n".join(line.rstrip() for line in self._lines[first - 1 : node.end_lineno])


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """(bound name, (module, name or None)) of each alias. Raises IntegrityError for a star or relative import."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            whole = alias.asname is not None or "." not in alias.name
            yield alias.asname or alias.name.split(".")[0], (alias.name if whole else alias.name.split(".")[0], None)
        elif alias.name == "*" or node.level:
            raise IntegrityError("a check reaches a star or relative import", next_step="import by full module path and name")
        else:
            yield alias.asname or alias.name, (str(node.module), alias.name)


def _is_bare(node: ast.AST) -> bool:
    """Whether a statement computes nothing: `pass`, a docstring or another constant."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _bound(nodes: Iterable[ast.AST]) -> dict[str, None]:
    """Names that statements bind in their own scope, in order, without those declared global or nonlocal."""
    found: dict[str, None] = {}
    foreign: set[str] = set()

    def look(node: ast.AST) -> None:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
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
                found.update(dict.fromkeys(name for name, _ in _imports(node)))
            case ast.ExceptHandler(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
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
    free = [a.arg for a in (*arguments.posonlyargs, *arguments.args, arguments.vararg, arguments.kwarg) if a]
    return free, [a.arg for a in arguments.kwonlyargs]


@dataclass
class Scope:
    """Names of one function, comprehension or class body, with the number that a local gets where it is first met."""

    names: set[str]
    is_class: bool = False
    numbers: dict[str, int] = field(default_factory=dict)


class Writer:
    """Writes the statements of one definition. References to other definitions are counted in order."""

    def __init__(self, code: Code, key: Key, kept: frozenset[str]):
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
        self._binds, self._count = list(_bound([node])), 0
        return self.write(node)

    def write(self, node: Any) -> Any:
        """The form of a node, a list of nodes or a plain value."""
        match node:
            case list():
                return [self.write(n) for n in node if not _is_bare(n)]
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
                return ["attribute", self.write(value), attr] if target is None else self.reference(target, attr)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                decorators = [self.decorator(d) for d in node.decorator_list]
                return [type(node).__name__, self.store(node.name), decorators, *self.scoped(node.args, node.body)]
            case ast.Lambda(args=arguments, body=body):
                return ["Lambda", *self.scoped(arguments, [body])]
            case ast.ClassDef():
                outside = [self.write(node.decorator_list), self.write(node.bases), self.write(node.keywords)]
                with self.scope(_bound(node.body), is_class=True):
                    body = self.write(node.body)
                return ["ClassDef", self.store(node.name), outside, body]
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                return self.comprehension(node)
            case ast.Call():
                return self.call(node)
            case ast.Raise(exc=ast.Call(func=func, args=args, keywords=keywords), cause=cause):
                words = [self.words(a) for a in args] + [[k.arg, self.words(k.value)] for k in keywords]
                return ["Raise", self.write(func), words, self.write(cause)]
            case ast.Assert(test=test):
                return ["Assert", self.write(test)]
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                kinds = sorted({"ClassVar", "InitVar"} & {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)})
                return ["Assign", [self.write(target)], self.write(value), *kinds]
            case ast.Assign(targets=targets, value=value):
                return ["Assign", self.write(targets), self.write(value)]
            case ast.Import() | ast.ImportFrom():
                found = _imports(node)
                return ["Import", *([self.store(name), self.reference(self.code.imported(*what), name)] for name, what in found)]
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
                return [type(node).__name__, *([f, self.write(v)] for f, v in fields if v is not None and v != [])]
            case str() | bool() | None:
                return node
        return repr(node)

    # Names

    def load(self, name: str) -> Any:
        """A name that is read: a local by its number, an attribute of the class being defined, or what the module binds."""
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
        """A name that is bound. At module level the name defined is `itself`, and the others are counted."""
        if name is None or self._scopes or name == self.key.name:
            return name if name is None else self.load(name)
        return ["bound", self._binds.index(name)] if name in self._binds else self.load(name)

    def reference(self, target: Key | str | None, name: str) -> Any:
        """What a name outside all scopes stands for."""
        match target:
            case Key() if target == self.key:
                return ["itself"]
            case Key():
                return ["reached", self._references.setdefault(target, len(self._references))]
            case str():
                return ["import", target]
        return ["builtin" if hasattr(builtins, name) else "unbound", name]

    def target(self, node: ast.AST) -> Key | str | None:
        """What a dotted name stands for at module level; None for every other expression."""
        match node:
            case ast.Name(id=name):
                local = any(name in s.names and (not s.is_class or s is self._scopes[-1]) for s in self._scopes)
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
        """A decorator. Lambdas in it, as those of icontract, receive arguments by name."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Lambda):
                self._keywords |= {a.arg for a in (*inner.args.posonlyargs, *inner.args.args)}
        return self.write(node)

    def scoped(self, arguments: ast.arguments, body: list) -> list:
        """Shape, parameters, defaults and body of a function, in its own scope."""
        free = [a.arg for a in (*arguments.posonlyargs, *arguments.args, arguments.vararg, arguments.kwarg) if a]
        named = [a.arg for a in arguments.kwonlyargs]
        shape = [len(arguments.posonlyargs), len(arguments.args), bool(arguments.vararg), bool(arguments.kwarg)]
        defaults = [self.write(arguments.defaults), [d and self.write(d) for d in arguments.kw_defaults]]
        with self.scope([*free, *named, *_bound(body)]):
            parameters = [[self.load(p), p if p in self.kept or p in named else ""] for p in (*free, *named)]
            return [[str(n) for n in shape], parameters, defaults, self.write(body)]

    def comprehension(self, node: Any) -> list:
        """The first iterable is evaluated outside the comprehension's scope."""
        first = self.write(node.generators[0].iter)
        with self.scope(n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)):
            loops = []
            for i, g in enumerate(node.generators):
                source = first if i == 0 else self.write(g.iter)
                loops.append([source, self.write(g.target), self.write(g.ifs), bool(g.is_async)])
            results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return [type(node).__name__, loops, self.write(results)]

    def call(self, node: ast.Call) -> list:
        """A call. Keywords of a known function enter by position, so that its parameters may be renamed."""
        target = self.target(node.func)
        message = MESSAGE_AT.get(target.name) if isinstance(target, Key) and target.module == VERDICTS else None
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
            value = self.words(k.value) if message is not None and place == str(message) else self.write(k.value)
            keywords.append([place, value])
        return ["Call", self.write(node.func), args, keywords]

    def positions(self, target: Key | str | None) -> dict[str, int]:
        """Positions of a known function's parameters by name, without those that keep their names."""
        module = self.code.module(target.module) if isinstance(target, Key) else None
        function = module.functions.get(target.name) if module else None
        if function is None:
            return {}
        parameters = (*function.args.posonlyargs, *function.args.args)
        return {a.arg: i for i, a in enumerate(parameters) if a.arg not in self.kept}

    def joined(self, node: ast.JoinedStr) -> list:
        """Parts of an f-string. Neighbouring texts are one part: Python versions split them differently."""
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
                    parts.append([self.write(inner), str(conversion), self.joined(spec) if spec else []])
        return parts

    def words(self, node: ast.AST) -> Any:
        """A message: its text is left out, the values in it stay."""
        match node:
            case ast.Constant(value=str()):
                return WORDS
            case ast.JoinedStr(values=values):
                return [WORDS, *(self.write(v.value) for v in values if isinstance(v, ast.FormattedValue))]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [self.words(left), self.words(right)]
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return ["IfExp", self.write(test), self.words(body), self.words(orelse)]
        return self.write(node)


def _hashes(forms: dict[Key, Form]) -> dict[Key, str]:
    """Hash of each form together with the hashes of what it refers to. Definitions that refer to each other share theirs."""
    hashes: dict[Key, str] = {}
    for group in _components({key: form.references for key, form in forms.items()}):
        blank = {key: _hash(forms[key], hashes | dict.fromkeys(group, "cycle")) for key in group}
        places = {key: f"cycle {i}" for i, key in enumerate(sorted(group, key=blank.__getitem__))}
        whole = "".join(_hash(forms[key], hashes | places) for key in places)
        hashes |= {key: _sha256(place + whole) for key, place in places.items()}
    return hashes


def _hash(form: Form, hashes: dict[Key, str]) -> str:
    return _sha256("\n".join([form.text, *(hashes[key] for key in form.references)]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _components(edges: dict[Key, tuple[Key, ...]]) -> list[list[Key]]:
    """Strongly connected components, each after those it refers to (Tarjan, SIAM J. Comput. 1(2), 1972)."""
    found: list[list[Key]] = []
    index: dict[Key, int] = {}
    low: dict[Key, int] = {}
    stack: list[Key] = []

    def visit(key: Key) -> None:
        index[key] = low[key] = len(index)
        stack.append(key)
        for other in edges[key]:
            if other not in index:
                visit(other)
                low[key] = min(low[key], low[other])
            elif other in stack:
                low[key] = min(low[key], index[other])
        if low[key] == index[key]:
            at = stack.index(key)
            found.append(stack[at:])
            del stack[at:]

    for key in edges:
        if key not in index:
            visit(key)
    return found
