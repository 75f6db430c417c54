"""Documents of the embedded corpora and of files, in a fixed order."""

import ast
import glob
import gzip
import hashlib
import importlib
import json
import re
import sys
import sysconfig
import types
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import assert_never

from spec.errors import DataError
from stack.config import Files, StdlibCode, StdlibDocs

EXTRACTOR_VERSION = 3
MIN_DOC_CHARS = 40
SKIPPED_FOLDERS = frozenset("test tests idle_test lib2to3 site-packages dist-packages __pycache__ ensurepip".split())
TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".py", ".jsonl"))
LINE_END = re.compile(r"\r\n|\n|\r")
BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")
# What a C module defines. Anything else found in one (open files, module state, what an import put there) differs between processes.
C_DEFINED = (
    type,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
    staticmethod,
)
# Places of `sys` where programs leave their own objects. The first two are left out; of the others the original beside them is read
# (`sys.__displayhook__`), so that a corpus is the same under Typer, pytest, a debugger and a bare interpreter.
LEFT_OUT = frozenset(("sys.excepthook", "sys.last_type"))
HOOKS = frozenset(("sys.displayhook", "sys.unraisablehook", "sys.breakpointhook"))


@dataclass(frozen=True)
class Document:
    """One text with a name that says where it came from."""

    id: str
    text: str


def read_documents(cfg: StdlibDocs | StdlibCode | Files) -> Iterator[Document]:
    """All documents of a corpus in a fixed order. Raises DataError naming file and line of what cannot be read."""
    match cfg:
        case StdlibDocs():
            yield from _stdlib_docs()
        case StdlibCode():
            for path in _stdlib_files():
                if (text := _read_text(path)).strip():
                    yield Document(_stdlib_name(path), text)
        case Files():
            for path in resolve_paths(cfg):
                yield from _file_documents(path, cfg)
        case _:
            assert_never(cfg)


def corpus_sha256(cfg: StdlibDocs | StdlibCode | Files) -> str:
    """Hash of the content of every source file and of how it is read; no parsing.

    Where the files lie and what their licence is called do not enter: the same text has the same hash on every machine.
    """
    digest = hashlib.sha256(f"{EXTRACTOR_VERSION}/{cfg.model_dump_json(exclude={'license', 'paths'})}".encode())
    match cfg:
        case StdlibDocs():
            from pydoc_data import topics

            paths = [*_stdlib_files(), Path(topics.__file__)]
            digest.update(sys.version.encode())
        case StdlibCode():
            paths = _stdlib_files()
        case Files():
            paths = resolve_paths(cfg)
        case _:
            assert_never(cfg)
    for path in paths:
        # The suffix decides how a file is cut into documents; a document of the standard library carries its module's name.
        name = _suffix(path) if isinstance(cfg, Files) else path.name
        digest.update(name.encode() + b"\0" + hashlib.sha256(_read_bytes(path)).digest())
    return digest.hexdigest()


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_name(path: Path) -> str:
    parts = path.relative_to(_stdlib_root()).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def _stdlib_files() -> list[Path]:
    root = _stdlib_root()
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def _stdlib_docs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic {name}", topics[name].strip())
    for path in _stdlib_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _docstrings(tree, _stdlib_name(path))
    yield from _builtin_docs()


def _docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    """Docstrings of a module and everything defined in it, outside in, each under its name and signature."""
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOC_CHARS:
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        yield Document(name, f"{name}{signature}\n\n{text}")
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _builtin_docs() -> Iterator[Document]:
    """Documentation of what is written in C: builtins and the modules compiled into the interpreter.

    These modules are imported, so that the text does not depend on what the process happened to import before.
    """
    for module_name in sorted({"builtins", *sys.builtin_module_names}):
        for name, value in _c_members(module_name):
            text = getattr(value, "__doc__", None)
            if isinstance(value, C_DEFINED) and isinstance(text, str) and len(text) >= MIN_DOC_CHARS:
                yield Document(name, f"{name}\n\n{cleandoc(text)}")


def _c_members(module_name: str) -> Iterator[tuple[str, object]]:
    """Qualified names and values in a built-in module and in the classes it defines, in order."""
    try:
        members = vars(importlib.import_module(module_name))
    except ImportError:
        return
    for name, member in sorted(members.items()):
        qualified = f"{module_name}.{name}"
        if qualified in LEFT_OUT:
            continue
        yield qualified, members[f"__{name}__"] if qualified in HOOKS else member
        if isinstance(member, type) and member.__module__ == module_name:
            yield from ((f"{qualified}.{k}", v) for k, v in sorted(vars(member).items()) if not k.startswith("__"))


def resolve_paths(cfg: Files) -> list[Path]:
    """Files meant by paths, folders and globs, sorted, each once. Raises DataError if one names nothing."""
    found: list[Path] = []
    for pattern in cfg.paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and _suffix(p) in TEXT_SUFFIXES]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not matches:
            raise DataError(
                f"data.corpus.paths names nothing readable: {pattern}",
                allowed=f"files, globs, or folders with {' '.join(sorted(TEXT_SUFFIXES))} files, also .gz",
                next_step="check the path, relative to the folder you run stack in",
            )
        found += sorted(matches)
    return list(dict.fromkeys(found))


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}", next_step="check the file and its permissions") from e


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line} is not UTF-8",
            value=f"byte 0x{e.object[e.start]:02x} at {e.start}",
            next_step="convert the file with iconv",
        ) from e
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"cannot read {path}: {e}", next_step="unpack it with gzip to see what is wrong with it") from e


def _file_documents(path: Path, cfg: Files) -> Iterator[Document]:
    text = _read_text(path)
    if _suffix(path) == ".jsonl":
        yield from _json_lines(path, text, cfg.text_field)
        return
    match cfg.documents:
        case "file":
            parts = [text]
        case "paragraph":
            parts = BLANK_LINES.split(text)
        case "line":
            parts = LINE_END.split(text)
    for number, part in enumerate(parts):
        if part.strip():
            yield Document(f"{path}#{number}", part)


def _json_lines(path: Path, text: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):  # str.splitlines would cut at U+2028, which JSON allows in a text
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path} line {number} is not JSON: {e}", next_step="repair the line") from e
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            keys = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{path} line {number} has no text under {field!r}", value=keys, next_step="--set data.corpus.text_field=NAME")
        if not _is_unicode(value[field]):
            raise DataError(f"{path} line {number} has half of a surrogate pair in its text", next_step="repair the \\u escape")
        if value[field].strip():
            yield Document(f"{path}#{number}", value[field])


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can spell one that cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
