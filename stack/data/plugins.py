"""Filters of the user's: `module:function`, imported only with permission.

A configuration may come from a run folder, a checkpoint or a record of another user. The names in
it are data. Code is imported for the names that `permitted` holds: those of the command line and of
files that the user named.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import accumulate

from stackproof.config import Built, DataConfig
from stackproof.spec.errors import ConfigError
from stackproof.spec.records import Override

UNNAMED = "the configuration"


@dataclass(frozen=True)
class Plugin:
    """A filter of the user's: `function(text, languages)` returns a falsy value to keep,
    else drops under its name.
    """

    name: str
    function: Callable[[str, tuple[str, ...]], object]


@dataclass(frozen=True)
class _Permit:
    """The names that may be imported, and the folder that the configuration was read from."""

    names: frozenset[str] = frozenset()
    origin: str = UNNAMED


_NONE = _Permit()
_PERMIT = ContextVar("permit", default=_NONE)


@contextmanager
def permitted(names: Iterable[str], origin: str = UNNAMED) -> Iterator[None]:
    """Allow `load` to import these plug-ins within the context, and no others.
    `origin` names the source of the configuration in the error for another one.
    """
    token = _PERMIT.set(_Permit(frozenset(names), origin))
    try:
        yield
    finally:
        _PERMIT.reset(token)


def chosen(cfg: DataConfig, overrides: Iterable[Override]) -> tuple[str, ...]:
    """The plug-ins that the command line or a run file states, if they have a use: a built data set
    is not filtered again, and its own plug-ins are among the overrides too.
    """
    if isinstance(cfg.corpus, Built):
        return ()
    return tuple(n for o in overrides if o.key == "data.filters" for n in o.value)


def load(names: Iterable[str]) -> list[Plugin]:
    """Import plug-ins. Raises ConfigError for one that is not permitted, before any is imported,
    and for one that cannot be found or called.
    """
    names, permit = list(names), _PERMIT.get()
    if refused := [n for n in names if n not in permit.names]:
        raise ConfigError(
            f"{permit.origin} names the plug-in {refused[0]} in data.filters; to import it would "
            "run its code",
            value=", ".join(refused),
            allowed="plug-ins that the command line, a run file or a mixture file names",
            next_step=f"read its code; --plugin {refused[0]} of stack train and stack evidence "
            "rerun permits it",
        )
    return [Plugin(name, _import(name)) for name in names]


def _import(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as e:
        raise ConfigError(
            f"the filter {name} cannot be imported: {type(e).__name__}: {e}",
            allowed="module:function, importable where stack runs",
            next_step="check data.filters and PYTHONPATH",
        ) from e
    if not callable(function):
        raise ConfigError(
            f"the filter {name} is not a function",
            value=type(function).__name__,
            next_step="check data.filters",
        )
    return function


def source(name: str) -> str:
    """The source of a plug-in's module, found without importing it or its packages; the version of
    Python for a compiled one. Raises ConfigError if the module does not exist.
    """
    module = name.partition(":")[0]
    found = _found(module)
    if found is None:
        raise ConfigError(
            f"the filter {name} cannot be found",
            allowed="module:function, importable where stack runs",
            next_step="check data.filters and PYTHONPATH",
        )
    try:
        text = found.loader.get_source(module)
    except (AttributeError, ImportError, OSError):  # a loader without sources, or another encoding
        text = None
    return f"{module} of {sys.version}" if text is None else text


def _found(module: str) -> ModuleSpec | None:
    """What an import would load. `importlib.util.find_spec` would import the packages above it."""
    parts, path, found = module.split("."), None, None
    if not all(part.isidentifier() for part in parts):
        return None
    for name in accumulate(parts, "{}.{}".format):
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        found = next((spec for spec in specs if spec is not None), None)
        if found is None:
            return None
        # with None the finders would search at the top, for a module inside of another one
        path = found.submodule_search_locations or []
    return found
