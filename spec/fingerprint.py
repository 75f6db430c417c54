"""Fingerprints of gates: one hash over the normative fields of a gate and the code of its check.

A check enters in a canonical form of its syntax tree, together with everything in `contracts` and
`spec` that it reaches: functions, classes, constants, module-level branches, statements that change
them, and the code in `stackproof.contracts.gate` that turns measurements into verdicts.

The form omits docstrings, comments, layout, annotations, names of local variables, of parameters
and of reached functions, module paths, and the text of verdict messages and errors. So rewording,
renaming and moving change no fingerprint. A reached function enters by the hash of its own form.
The form is the same on every supported Python version; `ast.dump` is not.

The form keeps attributes and methods (also those of objects passed in), keyword-only parameters,
parameters that a call may pass by keyword without naming the function, and dotted names of other
packages. The code of an object that is passed in is not part of the form.
"""

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from stackproof.spec.canonical import parse_lines, sha256_json
from stackproof.spec.canonical_code import Form, Key, Writer, bound, imports, is_bare
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import read_bytes, text_lines

FORM = 2
PACKAGE = "stackproof"
OPAQUE = {"spec.errors"}  # error classes hold messages and exit codes; they enter by name
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.AnnAssign)


class Carried(NamedTuple):
    """One line of spec/carried.jsonl: an unchanged gate, its fingerprint in the previous and in the
    new form, and the commit that changed the form.
    """

    gate: str
    old: str
    new: str
    commit: str


def read_carried(path: Path) -> tuple[Carried, ...]:
    """The lines of spec/carried.jsonl; empty if the file does not exist.
    Raises IntegrityError naming an invalid line.
    """
    if not path.is_file():
        return ()
    found = []
    for number, value in enumerate(parse_lines(read_bytes(path), origin=path.name), start=1):
        try:
            row = Carried(**value)
        except TypeError as e:
            raise IntegrityError(
                f"{path.name} line {number} does not carry a gate over: {e}"
            ) from e
        if not all(isinstance(x, str) for x in row):
            raise IntegrityError(
                f"{path.name} line {number} holds a value of another type than text"
            )
        found.append(row)
    return tuple(found)


def check_fingerprint(normative: dict, check: str, root: Path) -> str:
    """Hex sha256 over a gate's normative fields and the canonical form
    of its check `module:name`.
    """
    return sha256_json(
        {"form": FORM, "normative": normative, "check": code_below(root).hash(check)}
    )


def check_source(check: str, root: Path) -> str:
    """Source text of a check and of all definitions that it reaches, in order of discovery."""
    code = code_below(root)
    return "\n\n".join(
        text for key in code.reached(code.locate(check)) for text in code.sources(key)
    )


@cache
def code_below(root: Path) -> "Code":
    """The code below a repository root, cached per process."""
    return Code(root)


class Code:
    """The modules of `contracts` and `spec` below a repository root. Each file is read once."""

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, Module | None] = {}
        self._forms: dict[tuple[Key, frozenset[str]], Form] = {}
        self._parameters: dict[Key, frozenset[str]] = {}
        self._hashes: dict[str, str] = {}

    def hash(self, check: str) -> str:
        """Hex sha256 of the canonical form of `module:name` and of all definitions that it reaches.

        Raises IntegrityError if it does not exist.
        """
        if check not in self._hashes:
            key = self.locate(check)
            reached = self.reached(key)
            kept = frozenset().union(*(self.form(k).keywords for k in reached))
            self._hashes[check] = _hashes({k: self.form(k, kept) for k in reached})[key]
        return self._hashes[check]

    def locate(self, check: str) -> Key:
        """The definition of `module:name`, through re-exports.
        Raises IntegrityError if it does not exist.
        """
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
        """Module-level statements that define a name: those that bind it,
        and branches and changes that mention it.
        """
        module = self.module(key.module)
        if module is None:
            return []
        return [s.node for s in module.statements if key.name == "*" or s.defines(key.name)]

    def parameters(self, key: Key) -> list[str]:
        """Positional parameters of a module-level function; empty for anything else."""
        module = self.module(key.module)
        function = module.functions.get(key.name) if module else None
        return (
            [a.arg for a in (*function.args.posonlyargs, *function.args.args)] if function else []
        )

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
        """Canonical form of one definition, in which parameters listed
        in `kept` keep their names.
        """
        if key not in self._parameters:
            nodes = (n for s in self.statements(key) for n in ast.walk(s))
            self._parameters[key] = frozenset(n.arg for n in nodes if isinstance(n, ast.arg))
        place = (key, kept & self._parameters[key])
        if place not in self._forms:
            self._forms[place] = Writer(self, key, kept).form(self.statements(key))
        return self._forms[place]

    def resolve(self, module: str, name: str) -> Key | str | None:
        """Resolve a module-level name: a Key, a dotted path outside the project, or None if it is
        not bound there.
        """
        found = self.module(module)
        if found is None:
            return None
        if name in found.bound:
            return Key(module, name)
        if name in found.imports:
            return self.imported(*found.imports[name])
        return Key(f"{module}.{name}", "*") if self.module(f"{module}.{name}") else None

    def imported(self, source: str, name: str | None) -> Key | str:
        """Resolve `import source` (name None) or `from source import name`."""
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


@dataclass(frozen=True)
class Statement:
    """A module-level statement, the names that it binds, and the names that it mentions."""

    node: ast.stmt
    binds: tuple[str, ...]
    mentions: frozenset[str]

    def defines(self, name: str) -> bool:
        """Whether the statement is part of the definition of a name.
        A statement that is not a plain definition may change the names that it mentions.
        """
        return name in self.binds or (not self._is_definition and name in self.mentions)

    @property
    def _is_definition(self) -> bool:
        names = isinstance(self.node, ast.Assign) and all(
            isinstance(t, ast.Name) for t in self.node.targets
        )
        return names or isinstance(self.node, DEFINITIONS)


class Module:
    """One parsed file: its statements, the names they bind, and its imports."""

    def __init__(self, text: str):
        self._lines = text_lines(text)
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.statements: list[Statement] = []
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= dict(imports(node))
            elif not is_bare(node):
                mentions = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
                self.statements.append(Statement(node, tuple(bound([node])), mentions))
        self.bound = {name for s in self.statements for name in s.binds}
        functions = (s.node for s in self.statements if isinstance(s.node, ast.FunctionDef))
        self.functions = {f.name: f for f in functions}

    def source(self, node: ast.stmt) -> str:
        """Text of a statement with its decorators."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return "\n".join(line.rstrip() for line in self._lines[first - 1 : node.end_lineno])


def _hashes(forms: dict[Key, Form]) -> dict[Key, str]:
    """Hash of each form together with the hashes of its references.
    Definitions that refer to each other share one hash.
    """
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
    """Strongly connected components, each after those it refers to (Tarjan, SIAM J. Comput.
    1(2), 1972).
    """
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


def _below_root(module: str) -> str | None:
    """The dotted folder path of a module of this project; None for a module of another package."""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    if module == PACKAGE:
        return ""
    return ".".join(parts) if parts[0] in ("contracts", "spec") else None
