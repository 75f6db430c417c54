"""Reads a Hugging Face folder: config.json and safetensors, one file or several. Every tensor is
accounted for; pickles are refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackproof import tensorfile
from stackproof.config import LearnedPositions, ModelConfig
from stackproof.model import hugging_face
from stackproof.model.foreign import Kind, Row, plain_name, their_shape, to_ours
from stackproof.model.transformer import Transformer
from stackproof.spec import canonical
from stackproof.spec.errors import CheckpointError, ConfigError, IntegrityError
from stackproof.spec.formulas import parameter_count
from stackproof.train.memory import model_bytes, require_free

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 256 * 2**20
READABLE = ("F32", "F16", "BF16")
# config.json, and an index of some hundred thousand tensors
MAX_DOCUMENT_BYTES = 32 * 2**20
# config.json may describe this many times the weights of the files, before the names of the tensors
# are compared: what lacks a layer is refused by the name of the layer.
DESCRIBED_MAX = 4
SMALL = 2**20


@dataclass(frozen=True)
class Place:
    """The place of a tensor: file, name in it, dtype and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Folder:
    """A readable folder: its configuration as ours, and the place of every tensor by its plain
    name.

    `aside` are training keys of config.json that are ignored. `renamed` counts tensors with another
    name in the file, or unused ones.
    """

    path: Path
    document: dict[str, Any]
    kind: Kind
    cfg: ModelConfig
    vocab_size: int
    aside: tuple[str, ...]
    places: dict[str, Place]
    renamed: int

    @property
    def files(self) -> list[Path]:
        """config.json and the weight files."""
        return [self.path / "config.json", *sorted({p.file for p in self.places.values()})]


def open_folder(path: Path, *, max_seq_len: int | None = None) -> Folder:
    """Read config.json and the headers of all weight files. `max_seq_len` reduces the declared
    context.

    Raises CheckpointError for files that are missing, damaged or pickles, ConfigError for an
    unsupported model, EnvironmentUnfit for one that does not fit into memory.
    """
    document = read_json(path / "config.json")
    kind = hugging_face.kind_of(document)
    try:
        cfg, aside = kind.read(document)
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise ConfigError(
            f"{path / 'config.json'} holds a value of another type: {e}",
            allowed=f"the values of {kind.architecture}",
            next_step="download the file again",
        ) from e
    if max_seq_len is not None:
        cfg = _shortened(cfg, max_seq_len)
    places = {}
    for file in weight_files(path):
        for name, place in _places(file).items():
            if name in places:
                raise CheckpointError(
                    f"tensor {name} exists twice",
                    value=f"{places[name].file.name} and {file.name}",
                )
            places[name] = place
    if not any(n.startswith(kind.base) for n in places):
        head = kind.modules["head"]
        places = {n if n.startswith(head) else kind.base + n: p for n, p in places.items()}
    renamed = sum(n != p.name or bool(hugging_face.DERIVED.search(n)) for n, p in places.items())
    places = {n: p for n, p in places.items() if not hugging_face.DERIVED.search(n)}
    folder = Folder(
        path,
        document,
        kind,
        cfg,
        hugging_face.vocabulary_of(document),
        tuple(aside),
        places,
        renamed,
    )
    _require_described(folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for an unreadable file or another type."""
    try:
        document = canonical.read_json(path, MAX_DOCUMENT_BYTES)
    except (OSError, IntegrityError) as e:
        raise CheckpointError(
            f"cannot read {path}: {e}",
            allowed="a folder with config.json and safetensors",
            next_step="give the folder of a model",
        ) from e
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def _shortened(cfg: ModelConfig, max_seq_len: int) -> ModelConfig:
    if isinstance(cfg.positions, LearnedPositions) or not 2 <= max_seq_len <= cfg.max_seq_len:
        raise ConfigError(
            "the context cannot be reduced to this length",
            value=f"--max-seq-len {max_seq_len}",
            allowed=f"2 to {cfg.max_seq_len}, and only for rotary positions",
        )
    attention = cfg.attention.model_copy(
        update=hugging_face.within_context({"window": cfg.attention.window}, max_seq_len)
    )
    return cfg.model_copy(update={"max_seq_len": max_seq_len, "attention": attention})


def weight_files(path: Path) -> list[Path]:
    index, single = path / hugging_face.INDEX, path / "model.safetensors"
    if index.is_file() and single.is_file():
        raise CheckpointError(
            f"{path} holds both a single weight file and an index of several",
            next_step="remove the wrong one",
        )
    if single.is_file():
        return [single]
    if index.is_file():
        told = hugging_face.files_of_index(read_json(index))
        return _checked_shards(path, told)
    if pickles := sorted(p.name for p in path.iterdir() if p.suffix in PICKLES):
        raise CheckpointError(
            f"the weights in {path} are pickles",
            value=", ".join(pickles),
            allowed="safetensors: loading a pickle can run arbitrary code",
            next_step=(
                "convert them on a machine where you trust them: model.save_pretrained(DIR) of "
                "transformers "
                "writes safetensors"
            ),
        )
    raise CheckpointError(
        f"{path} has no weights",
        allowed=f"model.safetensors, or {hugging_face.INDEX} with its files",
    )


def _checked_shards(path: Path, told: Mapping[str, str]) -> list[Path]:
    """The files of an index. Raises CheckpointError unless they hold exactly its tensors."""
    files, present = sorted(set(told.values())), {p.name for p in path.iterdir() if p.is_file()}
    for file in files:
        if file not in present:
            raise CheckpointError(
                f"{hugging_face.INDEX} lists {file}, which is not in {path}",
                next_step="download the whole folder again",
            )
        held = set(header(path / file).tensors)
        if odd := sorted(held ^ {n for n, f in told.items() if f == file}):
            raise CheckpointError(
                f"{file} and {hugging_face.INDEX} disagree on {odd[0]}", value=f"{len(odd)} tensors"
            )
    return [path / file for file in files]


def header(file: Path) -> tensorfile.Header:
    try:
        return tensorfile.read_header(file)
    except tensorfile.BadTensorFile as e:
        raise CheckpointError(f"{file}: {e}", next_step="download the file again") from e


def _places(file: Path) -> dict[str, Place]:
    places = {}
    for name, entry in header(file).tensors.items():
        plain = plain_name(name)
        if plain in places:
            raise CheckpointError(
                f"{file} holds {plain} twice, under two prefixes",
                value=f"{places[plain].name} and {name}",
            )
        places[plain] = Place(file, name, entry.dtype, entry.shape)
    return places


def load_weights(folder: Folder) -> Transformer:
    """The model with the folder's weights, float32. Peak memory is the model and one tensor.

    Raises CheckpointError naming tensors that are missing, unexpected, of another shape or type, or
    not finite.
    """
    with torch.device("meta"):
        model = Transformer(folder.cfg, folder.vocab_size)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    rows = folder.kind.rows(shapes)
    places = _without_second_head(folder, dict(folder.places))
    _require_same_names({r.theirs for r in rows}, set(places), folder)
    model.to_empty(device="cpu")
    model.positions.reset()
    live = model.state_dict()
    for row in rows:
        _fill(live, row, places[row.theirs], shapes)
    return model.eval()


def _require_described(folder: Folder) -> None:
    """Raise CheckpointError if config.json describes far more weights than the files hold, and
    EnvironmentUnfit if the model does not fit into memory, before anything is allocated.
    """
    described = parameter_count(folder.cfg.model_dump(), folder.vocab_size)
    held = sum(math.prod(place.shape) for place in folder.places.values())
    if described > max(DESCRIBED_MAX * held, SMALL):
        raise CheckpointError(
            f"config.json in {folder.path} describes another model than the weights",
            value=f"{described} parameters",
            allowed=f"the {held} of the weight files",
            next_step="use the config.json of these weights",
        )
    require_free(model_bytes(folder.cfg, folder.vocab_size), f"the model of {folder.path}")


def _without_second_head(folder: Folder, places: dict[str, Place]) -> dict[str, Place]:
    """Drop a stored head that equals its tied embedding. Raises CheckpointError if they differ."""
    head, embed = (f"{folder.kind.modules[m]}.weight" for m in ("head", "embed"))
    if not folder.cfg.tied_head or head not in places or embed not in places:
        return places
    if not torch.equal(read_tensor(places[head]), read_tensor(places[embed])):
        raise CheckpointError(
            f"config.json ties {head} to {embed}, and the file holds two different tensors",
            value=f"{places[head].file.name}",
            allowed="equal tensors, one tensor, or a configuration that does not tie them",
            next_step=(
                "find out from the publisher which head is correct; with the wrong one the model "
                "writes "
                "gibberish"
            ),
        )
    return {n: p for n, p in places.items() if n != head}


def _require_same_names(expected: set[str], given: set[str], folder: Folder) -> None:
    if missing := sorted(expected - given):
        raise CheckpointError(
            f"{folder.path} lacks {missing[0]}",
            value=f"{len(missing)} tensors missing",
            allowed=f"{len(expected)} tensors according to config.json",
        )
    if strange := sorted(given - expected):
        raise CheckpointError(
            f"{folder.path} holds {strange[0]}, which {folder.kind.architecture} does not have",
            value=f"{len(strange)} unexpected tensors",
            next_step="use the config.json of these weights",
        )


@torch.no_grad()
def _fill(
    live: Mapping[str, Tensor], row: Row, place: Place, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if place.shape != (wanted := their_shape(row, shapes)):
        raise CheckpointError(
            f"the shape of tensor {row.theirs} contradicts config.json",
            value=place.shape,
            allowed=wanted,
        )
    tensor = read_tensor(place)
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"tensor {row.theirs} holds values that are not finite", value=place.file.name
        )
    for name, part in to_ours(row, tensor, shapes).items():
        live[name].copy_(part)


def read_tensor(place: Place) -> Tensor:
    """One tensor as float32."""
    if place.dtype not in READABLE:
        raise CheckpointError(
            f"tensor {place.name} is of type {place.dtype}",
            allowed=", ".join(READABLE),
            next_step="use the weights before quantisation",
        )
    stored = np.array(tensorfile.memmap(place.file, place.name))
    tensor = (
        torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        if place.dtype == "BF16"
        else torch.from_numpy(stored)
    )
    return tensor.float()
