"""The embedded corpora: documentation and source of the running interpreter's standard library,
and the pangram.
"""

import ast
import importlib
import sys
import sysconfig
import types
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

MIN_DOC_CHARS = 40
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test lib2to3 site-packages dist-packages __pycache__ ensurepip".split()
)
PANGRAM = "the quick brown fox jumps over the lazy dog. "
# Types that a C module defines. Other values in it (open files, module state, imports) differ
# between processes.
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
# Attributes of `sys` that programs replace. The first two are skipped; for the others the original
# is read (`sys.__displayhook__`), so that a corpus is the same under Typer, pytest, a debugger and
# a bare interpreter.
LEFT_OUT = frozenset(("sys.excepthook", "sys.last_type"))
HOOKS = frozenset(("sys.displayhook", "sys.unraisablehook", "sys.breakpointhook"))


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def module_name(path: Path) -> str:
    """Dotted name of a file of the standard library."""
    parts = path.relative_to(_root()).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def source_files() -> list[Path]:
    """Python files of the standard library, in order."""
    root = _root()
    return sorted(
        p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)
    )


def documentation() -> Iterator[tuple[str, str]]:
    """Name and text of every help topic, docstring and documented builtin, in order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()
    for path in source_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _docstrings(tree, module_name(path))
    yield from _builtin_docs()


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Docstrings of a module and of all definitions in it, outer ones first, each with name and
    signature.
    """
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOC_CHARS:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        signature = f"({ast.unparse(node.args)})" if is_function else ""
        yield name, f"{name}{signature}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _builtin_docs() -> Iterator[tuple[str, str]]:
    """Documentation of builtins and of the modules compiled into the interpreter.

    These modules are imported first, so that the text does not depend on earlier imports of the
    process.
    """
    for module in sorted({"builtins", *sys.builtin_module_names}):
        for name, value in _c_members(module):
            text = getattr(value, "__doc__", None)
            if (
                isinstance(value, C_DEFINED)
                and isinstance(text, str)
                and len(text) >= MIN_DOC_CHARS
            ):
                yield name, f"{name}\n\n{cleandoc(text)}"


def _c_members(module: str) -> Iterator[tuple[str, object]]:
    """Qualified names and values in a built-in module and in the classes it defines, in order."""
    try:
        members = vars(importlib.import_module(module))
    except ImportError:
        return
    for name, member in sorted(members.items()):
        qualified = f"{module}.{name}"
        if qualified in LEFT_OUT:
            continue
        yield qualified, members[f"__{name}__"] if qualified in HOOKS else member
        if isinstance(member, type) and member.__module__ == module:
            yield from (
                (f"{qualified}.{k}", v)
                for k, v in sorted(vars(member).items())
                if not k.startswith("__")
            )
