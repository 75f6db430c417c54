"""Opens what `stack trace` can look into: a run, a checkpoint, a folder of Hugging Face or a .gguf
file, each computed as one asks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from stackproof.cli.paths import MAKES_ONE
from stackproof.spec.errors import DataError, UsageError

SELF = "self"
WRITTEN = "MODEL is a run directory, a checkpoint, a folder of Hugging Face or a .gguf file"


@dataclass(frozen=True)
class Subject:
    """A model with what a record says of it.
    `encode` turns text into ids, with the token that begins a text; None without a tokenizer.

    `decode` turns ids into text, with control tokens written out; without a tokenizer into numbers.
    """

    model: Any
    title: str
    way: str | None
    vocab_size: int
    max_seq_len: int
    config: dict
    encode: Callable[[str], list[int]] | None
    files: tuple[Path, ...] = ()
    root: Path = Path()
    parents: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    decode: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids))


def open_subject(text: str, beside: Subject | None = None) -> Subject:
    """Open MODEL or MODEL@WAY; `self` is the model it is compared with.
    Raises UsageError for a way that does not exist.
    """
    from dataclasses import replace

    path, way = _split(text)
    if path == SELF and beside is not None:
        return replace(beside, title=text, way=way)
    return replace(_open(Path(path)), title=text, way=way)


def _split(text: str) -> tuple[str, str | None]:
    """Path and way of MODEL@WAY. A path that exists as it is written is never cut."""
    from stackproof.trace.ways import SHORT, WAYS

    path, at, way = text.rpartition("@")
    if not at or Path(text).exists():
        return text, None
    if way not in (*WAYS, *SHORT):
        raise UsageError(
            f"there is no way {way} to compute a model",
            value=text,
            allowed=", ".join((*WAYS, *SHORT)),
        )
    return path, way


def _open(path: Path) -> Subject:
    if not path.exists():
        raise UsageError(
            f"there is nothing at {path}",
            value=path.absolute(),
            allowed=WRITTEN,
            next_step=MAKES_ONE,
        )
    if path.suffix == ".gguf":
        return _of_transformers(path, path.parent, (path,))
    if path.is_dir() and (path / "config.json").is_file():
        return _of_transformers(
            path, path, tuple(sorted({path / "config.json", *path.glob("*.safetensors")}))
        )
    from stackproof.cli.models import open_model

    opened = open_model(path)
    return Subject(
        opened.model,
        str(path),
        None,
        opened.tokenizer.vocab_size,
        opened.cfg.model.max_seq_len,
        opened.cfg.to_dict(),
        lambda text: [opened.tokenizer.eos_id, *_whole(opened.tokenizer.encode(text))],
        (opened.folder / "model.safetensors", opened.run_dir / "tokenizer.json"),
        opened.run_dir,
        (opened.state["record"],),
        {"step": int(opened.state["step"])},
        lambda ids: opened.tokenizer.decode(ids) or "".join(map(opened.tokenizer.literal, ids)),
    )


def _whole(encoding: Any) -> list[int]:
    """The ids of a text no character of which was lost."""
    if encoding.dropped_chars:
        raise DataError(
            "the prompt holds characters that the tokenizer does not know",
            value=f"{encoding.dropped_chars} characters",
            next_step="leave them out, or give --input-ids",
        )
    return list(encoding.ids)


def _of_transformers(path: Path, folder: Path, files: tuple[Path, ...]) -> Subject:
    from stackproof.export import parity

    model = parity.theirs(path)
    config = model.config
    tokenizer = folder / "tokenizer.json"
    encode, decode = None, Subject.decode
    if tokenizer.is_file():
        files = (*files, tokenizer)
        read = cache(lambda: _tokenizer(tokenizer))
        encode, decode = (
            (lambda text: read().encode(text).ids),
            (lambda ids: read().decode(ids, skip_special_tokens=False)),
        )
    facts = {"architecture": type(model).__name__, "transformers": parity.version()}
    described = {"architecture": type(model).__name__, "config": config.to_diff_dict()}
    return Subject(
        model,
        str(path),
        None,
        config.vocab_size,
        config.max_position_embeddings,
        described,
        encode,
        files,
        folder,
        (),
        facts,
        decode,
    )


def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))
