"""A model as a folder of Hugging Face: written beside its place, judged there, and moved into place
only when every gate agrees.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackproof import tensorfile
from stackproof.contracts.keeper import Gatekeeper
from stackproof.contracts.subject import Subject
from stackproof.data.tokenizer import Tokenizer
from stackproof.evidence.file_lock import aside, refuse_occupied
from stackproof.export import parity, vocabulary
from stackproof.export.reading import Folder, read_tensor
from stackproof.model import hugging_face
from stackproof.model.foreign import Kind, Row, to_theirs
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.files import remedy, sync, write_atomically
from stackproof.spec.records import GateResult
from stackproof.train.checkpoint import model_tensors

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}
ROUNDING_TOKENS = 64
MAX_SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Exported:
    """What was written: the kind, the files by name, the verdicts, and what narrower weights
    changed (empty for float32).
    """

    kind: Kind
    files: tuple[str, ...]
    gates: tuple[GateResult, ...]
    rounding: dict[str, float]


def export(
    model: Transformer,
    tokenizer: Tokenizer,
    out: Path,
    keeper: Gatekeeper,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: Callable[[Path, Exported], None],
) -> Exported:
    """Write `out` and judge it; the model's own weights become those that were written. `card`
    writes README.md of the folder.

    Raises ConfigError if no kind covers the model, UsageError if `out` is not empty, GateFailed if
    a gate is red; `out` is then untouched.
    """
    kind = hugging_face.kind_for(model.cfg)
    refuse_occupied(out, "--out")
    try:
        with aside(out) as temporary:
            rounding = round_weights(model, dtype)
            write_documents(temporary, kind, model, tokenizer, dtype)
            write_weights(temporary, kind, model, dtype, max_shard_bytes)
            judge(temporary, model, tokenizer, keeper, dtype)
            made = Exported(
                kind,
                tuple(sorted({p.name for p in temporary.iterdir()} | {"README.md"})),
                tuple(keeper.results()),
                rounding,
            )
            card(temporary, made)
            _into_place(temporary, out)
    except OSError as e:
        raise EnvironmentUnfit(
            f"the export could not be written: {e}",
            next_step=f"{remedy(e)}, or choose another --out",
        ) from e
    return made


@torch.no_grad()
def round_weights(model: Transformer, dtype: str) -> dict[str, float]:
    """Round the model's weights to those that the file can hold. Returns what that changes;
    float32 changes nothing.
    """
    if dtype == "float32":
        return {}
    length = min(ROUNDING_TOKENS, model.cfg.max_seq_len)
    ids_1T = torch.randint(
        0, model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )
    before = parity.our_logits(model, ids_1T, length)
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.to(DTYPES[dtype][0]))
    after = parity.our_logits(model, ids_1T, length)
    return {
        "rounding_abs_error": float((before - after).abs().max()),
        "rounding_argmax_changed_frac": float(
            (before.argmax(-1) != after.argmax(-1)).double().mean()
        ),
    }


def write_documents(
    folder: Path, kind: Kind, model: Transformer, tokenizer: Tokenizer, dtype: str
) -> None:
    """Configuration, generation settings and tokenizer."""
    cfg, eos_id = model.cfg, tokenizer.eos_id
    _write_json(
        folder / "config.json",
        hugging_face.config_document(kind, cfg, model.vocab_size, eos_id, dtype),
    )
    _write_json(folder / "generation_config.json", hugging_face.generation_document(cfg, eos_id))
    _write_json(
        folder / "tokenizer_config.json",
        hugging_face.tokenizer_document(cfg, vocabulary.eos_token(tokenizer)),
    )
    write_atomically(
        folder / "tokenizer.json", vocabulary.to_library(tokenizer).to_str(pretty=False).encode()
    )


def write_weights(
    folder: Path, kind: Kind, model: Transformer, dtype: str, max_shard_bytes: int
) -> None:
    """One file, or as many as needed for none to hold more than `max_shard_bytes` of tensors,
    and their index.
    """
    tensors, wide = model_tensors(model), DTYPES[dtype][0]
    shards = list(_shards(kind.rows(tensors), tensors, wide.itemsize, max_shard_bytes))
    _write_shards(
        folder,
        len(shards),
        ({row.theirs: to_theirs(row, tensors).to(wide) for row in rows} for rows in shards),
    )


def _write_shards(folder: Path, n_files: int, shards: Iterable[dict[str, Tensor]]) -> None:
    """Each shard as a file, taken one at a time, and where there are several the index
    of which tensor is where.
    """
    total, places = 0, {}
    for number, shard in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if n_files == 1
            else f"model-{number:05d}-of-{n_files:05d}.safetensors"
        )
        total += sum(t.numel() * t.itemsize for t in shard.values())
        places |= dict.fromkeys(shard, file)
        tensorfile.write(folder / file, shard, {"format": "pt"})
    if n_files > 1:
        _write_json(folder / hugging_face.INDEX, hugging_face.index_document(places, total))


def _shards(
    rows: list[Row], tensors: dict[str, Tensor], itemsize: int, max_shard_bytes: int
) -> Iterator[list[Row]]:
    """Rows in order, cut before the one that would be too much;
    a single larger one stands alone.
    """
    shard, n_bytes = [], 0
    for row in rows:
        size = sum(tensors[n].numel() for n in row.ours) * itemsize
        if shard and n_bytes + size > max_shard_bytes:
            yield shard
            shard, n_bytes = [], 0
        shard.append(row)
        n_bytes += size
    yield shard


def judge(
    folder: Path, model: Transformer, tokenizer: Tokenizer, keeper: Gatekeeper, dtype: str
) -> None:
    """Check every gate of exports; without the other library the comparison stays `not_run`.
    Raises GateFailed.
    """
    written = parity.Written(model, folder, DTYPES[dtype][1], tokenizer)
    keeper.artifact(Subject(exported=written))


@contextmanager
def readable(source: Folder) -> Iterator[Path]:
    """The folder of an import as the other library can read it: itself, or where names differ a
    copy of its tensors under plain ones.

    The copy is of what the files hold, not of what was understood:
    what was misread here must not be handed over there.
    """
    if not source.renamed:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="stackproof-plain-") as folder:
        shutil.copy(source.path / "config.json", folder)
        files = sorted({place.file for place in source.places.values()})
        held = (
            {n: read_tensor(place) for n, place in source.places.items() if place.file == file}
            for file in files
        )
        _write_shards(Path(folder), len(files), held)
        yield Path(folder)


def _into_place(temporary: Path, out: Path) -> None:
    """Everything on the disk, then one rename, then the name on the disk."""
    sync(temporary)
    if out.exists():
        out.rmdir()
    os.replace(temporary, out)
    sync(out.parent)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
