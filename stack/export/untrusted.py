"""What must hold of a foreign folder or file before transformers reads it.

transformers follows what a folder names: modules of Python, pickles, adapters of another model,
kernels to download, sizes without a limit. Here a folder is data.
"""

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from stackproof import tensorfile
from stackproof.export import gguf
from stackproof.export.reading import header, read_json, weight_files
from stackproof.spec.errors import CheckpointError
from stackproof.train.memory import require_free

FLOAT_BYTES = 4
# Implementations that are part of transformers; other names are packages to import or to download.
ATTENTION = (None, "eager", "sdpa")
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# Keys that make transformers import another library, or read another file.
FOLLOWED = {
    "quantization_config": "use the weights before quantisation",
    "compression_config": "use the weights before quantisation",
    "transformers_weights": "name the weights model.safetensors",
    "kernel_config": "remove the key",
}
ADAPTER = "adapter_config.json"
DOCUMENTS = ("generation_config.json", "tokenizer_config.json", "processor_config.json")
# Sizes of a model are bounded by what its files hold; small models may state large ones that no
# tensor has, such as a context.
COUNTS = re.compile(
    r"(layers?|blocks|experts)$|(layer|block|expert)(_used|_shared)?_count$|^n_layer", re.IGNORECASE
)
POSITIONS = re.compile(r"position|context|ctx|seq|window|token|index", re.IGNORECASE)
SIZES = re.compile(r"size|length|dim|hidden|head|inner|embd|ffn|vocab|rank|channels", re.IGNORECASE)
NUMBERS = re.compile(r"^(num|n)_|depth|count", re.IGNORECASE)  # of parts that are built one by one
UNBOUNDED = re.compile(r"theta|base$|(_ids?|_freq|seed)$")
# Numbers that people note beside the sizes; transformers reads none of them.
NOTES = re.compile(r"((num|n|total)_)?param(eter)?s|((num|n)_)?train(ing)?_tokens|created(_at)?")
FEW, MANY, SMALL, LARGEST = 2**10, 2**16, 2**20, 2**24
# Each number and length in it, because the reader multiplies all three.
KINDS_OF_LAYERS, MAX_KIND_OF_LAYERS = "attention_types", 2**7
# Weights that a model may have for one of its files, and bytes of tables that no file holds, such
# as masks: these, or as many as its weights.
DESCRIBED_MAX, MAX_TABLE_BYTES = 4, 2**28


def require_data(path: Path, native: Container[str]) -> int:
    """Refuse a folder, or a .gguf file, that names code, pickles or other models, or whose sizes do
    not fit to its files. `native` are the kinds of models that need no code of the folder. Returns
    the number of its weights.

    Raises CheckpointError with the reason, EnvironmentUnfit if the weights do not fit into memory.
    """
    if path.suffix == ".gguf":
        held = gguf.read_header(path)
        numbers, n_tensors, n_weights = held.numbers, held.n_tensors, held.n_weights
    else:
        document = read_json(path / "config.json")
        _refuse_followed(path, document, native)
        entries = [e for f in weight_files(path) for e in header(f).tensors.values()]
        n_tensors, n_weights = len(entries), sum(map(tensorfile.n_elements, entries))
        numbers = {}
        for key, value in _numbers(document):
            numbers[key] = max(value, numbers.get(key, value))
    _refuse_sizes(path, numbers, n_tensors, n_weights)
    require_free(FLOAT_BYTES * n_weights, f"the weights of {path} in float32")
    return n_weights


def _refuse_followed(path: Path, document: Mapping[str, Any], native: Container[str]) -> None:
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path} is an adapter of another model",
            value=ADAPTER,
            allowed="a folder that holds the whole model",
            next_step="merge the adapter into its model, and give that folder",
        )
    for key, value in _tables(document):
        name = key.rpartition(".")[2]
        if name in FOLLOWED and value:
            raise _named(path, key, value, FOLLOWED[name])
        foreign = value if isinstance(value, dict) else {"": value}
        if IMPLEMENTATION.fullmatch(name) and (
            other := [v for v in foreign.values() if v not in ATTENTION]
        ):
            raise _named(path, key, other[0], "remove the key")
    if "auto_map" in document and str(document.get("model_type")) not in native:
        raise _named(path, "auto_map", document["auto_map"], "use a model that transformers has")
    for name in DOCUMENTS:
        if (path / name).exists():
            read_json(path / name)


def _named(path: Path, key: str, value: object, next_step: str) -> CheckpointError:
    return CheckpointError(
        f"{key} in {path / 'config.json'} names code or files that are not data of this model",
        value=repr(value)[:120],
        allowed="a configuration that needs no code but that of transformers",
        next_step=next_step,
    )


def _tables(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, the keys of tables included."""
    for name, value in document.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _tables(value, f"{prefix}{name}.")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer with its dotted key, those in lists too, and the length of every list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        yield key, len(value)
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value


def _limit(name: str, n_tensors: int, n_weights: int) -> int | None:
    """The largest number that a key may have; None for one that sets no size."""
    if UNBOUNDED.search(name) or NOTES.fullmatch(name):
        return None
    if name == KINDS_OF_LAYERS:
        return MAX_KIND_OF_LAYERS
    if COUNTS.search(name):
        return max(n_tensors, FEW)
    if POSITIONS.search(name):
        return LARGEST
    if SIZES.search(name):
        return max(n_weights, SMALL)
    return MANY if NUMBERS.search(name) else SMALL


def _refuse_sizes(
    path: Path, numbers: Mapping[str, int | float], n_tensors: int, n_weights: int
) -> None:
    """Raise CheckpointError for a size that the files cannot hold."""
    for key, value in numbers.items():
        limit = _limit(key.rpartition(".")[2], n_tensors, n_weights)
        if limit is not None and isinstance(value, int) and value > limit:
            raise CheckpointError(
                f"{key} of {path} is larger than its weights allow",
                value=value,
                allowed=f"at most {limit}, with {n_tensors} tensors of {n_weights} weights",
                next_step="take the folder as it was published",
            )


def require_described(path: Path, model: Any, n_weights: int) -> None:
    """Refuse a model, built without memory, of which the parameters or tables exceed its files.
    Tables are tensors that are computed, such as masks: they grow with the square of the context.

    Raises CheckpointError with the number, EnvironmentUnfit if it does not fit into memory.
    """
    described = sum(t.numel() for t in model.parameters())
    tables = sum(t.numel() * t.element_size() for t in model.buffers())
    for what, number, most in (
        ("parameters", described, DESCRIBED_MAX * max(n_weights, SMALL)),
        ("bytes of tables", tables, max(MAX_TABLE_BYTES, FLOAT_BYTES * n_weights)),
    ):
        if number > most:
            raise CheckpointError(
                f"the configuration of {path} describes more {what} than its weights allow",
                value=number,
                allowed=f"at most {most}, with {n_weights} weights",
                next_step="take the folder as it was published",
            )
    require_free(FLOAT_BYTES * described + tables, f"the model of {path} in float32")
