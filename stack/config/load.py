"""Builds a configuration from a recipe, a TOML file and `--set`, with the origin of every changed
value.
"""

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from stackproof.config.data import Curriculum, DataConfig, FilesSource, StaticCurriculum
from stackproof.config.run import RunConfig
from stackproof.kernels.table import by_operation
from stackproof.spec.canonical import MAX_MANIFEST_VALUES, read_json
from stackproof.spec.errors import ConfigError, IntegrityError
from stackproof.spec.files import read_text
from stackproof.spec.records import Override
from stackproof.spec.renamed_keys import current_key, renamed_keys, translated
from stackproof.spec.tables import parse_toml

MAX_RUN_FILE_BYTES = 2**20
SHOWN = "docs/mixtures.md shows a complete file"
# keys with the same meaning in every kind
COMMON = {"curriculum": tuple(Curriculum.model_fields), "schedule": ("warmup_steps",)}
# keys that are fixed when the data set is built
BUILT_KEYS = ("split", "tokenizer", "filters", "dedup", "decontaminate", "decontaminate_fields")


def load_config(
    base: RunConfig,
    *,
    run_file: Path | None = None,
    sets: tuple[str, ...] = (),
    fixed: dict[str, tuple[Any, str]] | None = None,
) -> tuple[RunConfig, list[Override]]:
    """A recipe's configuration, changed by a TOML file, then `--set a.b=v` in order,
    then values fixed by flags.

    Returns the configuration and the list of changed values with their origin.
    Raises ConfigError for an unknown key (naming the nearest), a wrong type,
    or an impossible combination.
    """
    tree, overrides = base.to_dict(), []
    changes: list[tuple[str, Any, str]] = []
    if run_file is not None:
        changes += [
            (key, value, f"{run_file}")
            for key, value in _flatten(read_run_file(run_file))
            if key != "recipe"
        ]
    changes += [(*_parse_set(text), f"--set {text}") for text in sets]
    changes += [(key, value, origin) for key, (value, origin) in (fixed or {}).items()]
    for key, value, origin in changes:
        _assign(tree, key, value, origin)
        overrides.append(Override(key=key, value=value, source=origin))
    overrides += _adopt_built(tree["data"], {o.key for o in overrides})
    return validate(tree, origins={o.key: o.source for o in overrides}), overrides


def recorded_config(tree: Any) -> RunConfig:
    """The configuration of a run directory, a checkpoint or a record, which may have been written
    before a key was renamed. It is data: the plug-ins that it names are not imported. Raises
    ConfigError as `validate`.
    """
    if not isinstance(tree, dict):
        raise ConfigError("the recorded configuration is not a table", value=repr(tree)[:80])
    try:
        return validate(translated(tree))
    except TypeError as e:  # a list or table where a renamed key has a word
        raise ConfigError(f"the recorded configuration is damaged: {e}") from e


def validate(tree: dict, *, origins: dict[str, str] | None = None) -> RunConfig:
    """Build a RunConfig from a JSON-ready tree. Raises ConfigError in the project's form."""
    _default_kinds(tree.get("data", {}))
    try:
        return RunConfig.model_validate_json(_as_json(tree), strict=True)
    except ValidationError as e:
        raise _refused(*_first_error(e), origins or {}) from e


def _as_json(tree: dict) -> str:
    """Raises ConfigError for deep nesting, and for a value without a JSON form: a date of TOML."""
    try:
        return json.dumps(tree)
    except (RecursionError, TypeError) as e:
        raise ConfigError(
            f"the configuration holds what no key can have: {e}",
            allowed="numbers, texts, lists and tables",
            next_step="quote a text that looks like a date",
        ) from e


def _first_error(e: ValidationError) -> tuple[str, str, Any]:
    """Dotted key and message of the first error, and the error itself."""
    error = e.errors()[0]
    key = ".".join(str(p) for p in error["loc"] if p not in _variant_tags())
    return key, error["msg"].removeprefix("Value error, "), error


def _refused(key: str, message: str, error: Any, origins: dict[str, str]) -> ConfigError:
    """The error for a configuration of a run that pydantic refuses."""
    near = (o for k, o in origins.items() if key.startswith(k) or (key and k.startswith(f"{key}.")))
    origin = next(near, "the recipe")
    next_step = "stack train --dry-run without the change shows every value"
    match error["type"]:
        case "extra_forbidden":
            return unknown_key(key, origin)
        case "missing":
            return _missing(key, origin, origins)
        case "union_tag_invalid":
            what, shown = f"{key}.kind: unknown kind", f"{error['ctx']['tag']!r} from {origin}"
        case _ if not key or message.startswith(f"{key}."):
            what, shown = message, f"from {_named_in(message, origins)}"
            next_step = _set_the_other(message, origins) or next_step
        case _:
            what, shown = f"{key}: {message}", f"{error.get('input')!r} from {origin}"
            next_step = _set_the_other(message, origins) or next_step
    return ConfigError(what, value=shown, allowed=_allowed(error), next_step=next_step)


def _missing(key: str, origin: str, origins: dict[str, str]) -> ConfigError:
    """The error for a missing required key.
    Choosing another `kind` discards the values of the previous one.
    """
    table = key.rpartition(".")[0]
    if chosen := origins.get(f"{table}.kind"):
        return ConfigError(
            f"{key} is missing: another {table}.kind discards the values of the previous one, and "
            "this key has no default",
            value=f"{table}.kind from {chosen}",
            next_step=f"--set {key}=… after it",
        )
    return ConfigError(f"{key} is missing", value=f"from {origin}", next_step=f"--set {key}=…")


def _named_in(message: str, origins: dict[str, str]) -> str:
    """The origins of the changed values in a message; the recipe if none was changed."""
    words = set(re.findall(r"[a-z_0-9.]+", message))
    named = {
        origin: None
        for key, origin in origins.items()
        if any(key == w or key.endswith(f".{w}") for w in words if len(w) > 2)
    }
    return ", ".join(named) or "the recipe"


def _set_the_other(message: str, origins: dict[str, str]) -> str:
    """The next step for a rule between two keys of which only one was changed: set the other too.
    Empty for other messages.
    """
    named = list(dict.fromkeys(re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)+", message)))
    others = [key for key in named if key not in origins]
    return f"--set {others[0]}=… as well" if len(others) == len(named) - 1 and others else ""


def _allowed(error: Any) -> str:
    """The allowed values in an error of a union or an enumeration, the nearest first."""
    context = error.get("ctx", {})
    choices = re.findall(
        r"'([^']*)'",
        str(
            context.get("expected_tags")
            or (context.get("expected") if error["type"] == "literal_error" else "")
        ),
    )
    near = difflib.get_close_matches(
        str(context.get("tag", error.get("input"))), choices, n=1, cutoff=0.4
    )
    return ", ".join([*near, *(c for c in choices if c not in near)])


def _adopt_built(data: dict, chosen: set[str]) -> list[Override]:
    """Take over the split, tokenizer and cleaning of a built data set into the configuration.

    Raises ConfigError if a chosen value contradicts the data set.
    """
    if data["corpus"].get("kind") != "built":
        return []
    path = Path(data["corpus"].get("path", ""), "manifest.json")
    try:
        held = read_json(path, max_values=MAX_MANIFEST_VALUES)["config"]
        built = {key: held[key] for key in BUILT_KEYS}
    except (OSError, IntegrityError, KeyError, TypeError) as e:
        raise ConfigError(
            f"data.corpus.path is not a built data set: {path} ({type(e).__name__})",
            next_step="build one: stack data build SRC… --out DIR",
        ) from e
    adopted = []
    for key in BUILT_KEYS:
        clash = [k for k in chosen if k == f"data.{key}" or k.startswith(f"data.{key}.")]
        if clash and data[key] != built[key]:
            raise ConfigError(
                f"{clash[0]} differs from the value that {path.parent} was built with",
                value=str(data[key]),
                allowed=str(built[key]),
                next_step="remove the key, or build the data again with it",
            )
        if data[key] != built[key]:
            data[key] = built[key]
            adopted.append(
                Override(key=f"data.{key}", value=json.dumps(built[key]), source=str(path))
            )
    return adopted


def load_mixture(path: Path) -> DataConfig:
    """The `data` section from a mixture file: `[[source]]` tables, and keys such as `[tokenizer]`
    and `[split]`.

    Paths are relative to the file. Raises ConfigError naming the file and the key.
    """
    tree = read_run_file(path)
    sources = tree.pop("source", [])
    if not sources:
        raise ConfigError(
            f"{path} has no source",
            allowed="at least one [[source]] table with name and paths",
            next_step=SHOWN,
        )
    if not isinstance(sources, list) or not all(isinstance(s, dict) for s in sources):
        raise ConfigError(
            f"{path}: [source] must be a list of tables",
            allowed="[[source]], with two brackets",
            next_step=SHOWN,
        )
    for number, source in enumerate(sources, start=1):
        if source.get("kind", "files") == "files":
            source["paths"] = _beside(
                path, source.get("paths", []), f"paths of source {source.get('name', number)}"
            )
    tokenizer = tree.get("tokenizer")
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("path"), str):
        tokenizer["path"] = str(path.parent / tokenizer["path"])
    if "corpus" in tree:
        raise ConfigError(
            f"{path}: `corpus` is not allowed; the [[source]] tables define the corpus",
            value="corpus",
            next_step="remove the key",
        )
    tree["decontaminate"] = _beside(path, tree.get("decontaminate", []), "decontaminate")
    return validate_data(
        {**tree, "corpus": {"kind": "mixture", "sources": sources}}, origin=str(path)
    )


def _beside(file: Path, paths: Any, what: str) -> list[str]:
    """Paths relative to a file. Raises ConfigError unless they are a list of strings."""
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise ConfigError(
            f"{file}: {what} must be a list", value=repr(paths), next_step='for example ["notes/"]'
        )
    return [str(file.parent / p) for p in paths]


def validate_data(tree: dict, *, origin: str) -> DataConfig:
    """Build a DataConfig from a JSON-ready tree.
    Raises ConfigError naming the key and its origin.
    """
    _default_kinds(tree)
    try:
        return DataConfig.model_validate_json(_as_json(tree), strict=True)
    except ValidationError as e:
        key, message, error = _first_error(e)
        shown = "" if isinstance(error.get("input"), dict | list) else f"{error.get('input')!r} "
        raise ConfigError(
            _readably(key, message, tree),
            value=f"{shown}from {origin}",
            allowed=f"nearest: {', '.join(near)}" if (near := _near(key.split(".")[-1])) else "",
            next_step=SHOWN,
        ) from e


def _readably(key: str, message: str, tree: dict) -> str:
    """A message about a key, with the name of a source in place of its number."""
    parts = key.split(".")
    if parts[:2] == ["corpus", "sources"] and len(parts) > 2 and parts[2].isdigit():
        name = tree["corpus"]["sources"][int(parts[2])].get("name", int(parts[2]) + 1)
        key = f"source {name}: {'.'.join(parts[3:])}".rstrip(": ")
    message = "unknown key" if message.startswith("Extra inputs") else message
    return f"{key}: {message}" if key else message


def _as_json(tree: dict) -> str:
    """The tree as JSON; dates and times of TOML, which no key takes, as text."""
    return json.dumps(tree, default=str)


def _default_kinds(data: Any) -> None:
    """A source without `kind` gets the kind `files`."""
    corpus = data.get("corpus") if isinstance(data, dict) else None
    for source in corpus.get("sources", ()) if isinstance(corpus, dict) else ():
        if isinstance(source, dict):
            source.setdefault("kind", "files")


def _near(leaf: str) -> list[str]:
    leaves = {name for m in (DataConfig, FilesSource) for name in m.model_fields}
    return (
        [] if leaf in leaves else difflib.get_close_matches(leaf, sorted(leaves), n=2, cutoff=0.5)
    )


def unknown_key(key: str, origin: str, table: str | None = None) -> ConfigError:
    """The error for a key that does not exist, or not with the chosen kind of `table`. Names the
    nearest keys.
    """
    if key in known_keys():
        table = table or key.rpartition(".")[0]
        return ConfigError(
            f"{key} belongs to another {table}.kind",
            value=f"from {origin}",
            next_step=f"--set {table}.kind=… before it, or remove it",
        )
    if (new := current_key(key)) != key:
        return ConfigError(
            f"{key} is now called {new}",
            value=f"from {origin}",
            allowed=_new_values(key) or new,
            next_step=f"--set {new}=…",
        )
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5) or [
        k for k in known_keys() if k.endswith("." + key.split(".")[-1])
    ]
    return ConfigError(
        f"{key} is not a configuration key",
        value=f"from {origin}",
        allowed=f"nearest: {', '.join(near)}" if near else "stack train --dry-run lists all keys",
        next_step=f"--set {near[0]}=…" if near else "remove it",
    )


def _new_values(key: str) -> str:
    """How the values of a renamed key are written today; empty if they are the same."""
    values = {o: n for r in renamed_keys() if r.old == key for o, n in r.values.items()}
    return ", ".join(f"{json.dumps(new)} for {old}" for old, new in values.items())


def known_keys() -> list[str]:
    """Every dotted key of the configuration, of all variants."""
    return sorted(set(_keys(RunConfig, "")))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        is_list = get_origin(field.annotation) is tuple
        nested = [] if is_list else _models_in(field.annotation)
        for variant in nested:
            yield from _keys(variant, f"{prefix}{name}.")
        if not nested:
            yield prefix + name


@cache
def _variant_tags() -> frozenset[str]:
    """The `kind` of every variant; pydantic puts them into the path of an error."""
    return frozenset(_tags(RunConfig))


def _tags(model: type[BaseModel]) -> list[str]:
    found = [model.model_fields["kind"].default] if "kind" in model.model_fields else []
    for variant in (v for f in model.model_fields.values() for v in _models_in(f.annotation)):
        found += _tags(variant)
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Configuration types inside an annotation: itself, the members of a union,
    the items of a tuple.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models_in(inner)]


def _assign(tree: dict, key: str, value: Any, origin: str) -> None:
    """Set a dotted key. Another `kind` begins with that variant's defaults,
    but keys of COMMON stay.

    Below a table by name, any name is a key.
    """
    *path, leaf = key.split(".")
    node = tree
    for depth, part in enumerate(path):
        if ".".join(path[: depth + 1]) == "train.kernels" and isinstance(node.get(part), str):
            # a single word is replaced by the table that it stands for
            node[part] = by_operation(node[part])
        if not isinstance(node.get(part), dict):
            raise unknown_key(key, origin, ".".join(path[:depth]) or None)
        node = node[part]
    if key not in known_keys() and not any(key.startswith(f"{k}.") for k in _named_tables()):
        raise unknown_key(key, origin)
    if leaf == "kind" and node.get("kind") != value:
        common = COMMON.get(".".join(path), ())
        for name in [n for n in node if n not in common]:
            del node[name]
        for variant in (v for v in _models_at(path) if v.model_fields["kind"].default == value):
            node |= {n: v for n, v in _defaults(variant).items() if n not in node}
    node[leaf] = value


def _models_at(path: list[str]) -> list[type[BaseModel]]:
    """The configuration types a dotted key may lead to."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in path:
        models = [
            m
            for owner in models
            if part in owner.model_fields
            for m in _models_in(owner.model_fields[part].annotation)
        ]
    return models


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Values of the fields with a default, JSON-ready."""
    return model.model_construct().model_dump(mode="json")


def _named_tables() -> tuple[str, ...]:
    """Keys whose value is a table with user-defined names."""
    return (
        "train.kernels",
        *(
            f"curriculum.{k}"
            for k, f in StaticCurriculum.model_fields.items()
            if get_origin(f.annotation) is dict
        ),
    )


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested table in order, a table's `kind` first."""
    leaves = []
    for name, value in sorted(tree.items(), key=lambda item: item[0] != "kind"):
        key = f"{prefix}{name}"
        leaves += _flatten(value, key + ".") if isinstance(value, dict) else [(key, value)]
    return leaves


def _parse_set(text: str) -> tuple[str, Any]:
    """Parse `a.b=v`. v is TOML, or a bare string if it is not valid TOML."""
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            "--set needs key=value", value=text, next_step="for example --set optim.lr=3e-4"
        )
    try:
        return key.strip(), parse_toml(f"v = {raw}")["v"]
    except ValueError:
        return key.strip(), raw.strip()


def read_run_file(path: Path) -> dict:
    """The tree of a TOML run file. Raises ConfigError if it cannot be read."""
    try:
        return parse_toml(read_text(path, MAX_RUN_FILE_BYTES))
    except FileNotFoundError as e:
        raise ConfigError(
            f"the file {path} does not exist",
            value=path.absolute(),
            allowed="a TOML file",
            next_step="check the path of the .toml file",
        ) from e
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"cannot read {path} as TOML: {e}",
            next_step="correct the line; quote strings, put table names in brackets",
        ) from e
