"""Loads the MODEL argument: a run, a checkpoint, a Hugging Face folder or a .gguf file."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from stackproof.cli.paths import MAKES_ONE, model_at, tokenizer_at
from stackproof.spec.errors import CheckpointError, DataError, UsageError

SELF = "self"
STATED = {"record": str, "step": int, "tokens_seen": int, "tokenizer_sha256": str}
FORMATS = "a run directory, a checkpoint, a Hugging Face folder or a .gguf file"


@dataclass
class OpenedModel:
    """A verified checkpoint with its tokenizer and configuration; `asked` is the path that was
    given.
    """

    model: Any
    tokenizer: Any
    cfg: Any
    folder: Path
    run_dir: Path
    state: dict
    weights_file: Path  # which stands for the weights in a record
    asked: Path

    def shown(self, stated_step: int) -> Any:
        """What the gate of opened checkpoints judges, with the step in the command's output."""
        from stackproof.subject.commands import Opened

        return Opened(
            asked=self.asked,
            folder=self.folder,
            stated_step=stated_step,
            model=self.model,
            architecture=self.cfg.model.model_dump(),
            tokenizer_sha256=self.tokenizer.sha256,
        )


def open_model(path: Path, tokenizer_file: Path | None = None) -> OpenedModel:
    """Load a run directory or checkpoint, and verify it and its tokenizer.

    Raises UsageError for a path of another kind, CheckpointError for a damaged checkpoint,
    DataError for another tokenizer.
    """
    from stackproof.config import recorded_config
    from stackproof.data.tokenizer import load_tokenizer
    from stackproof.model.build import build_model
    from stackproof.train import checkpoint
    from stackproof.train.memory import require_free

    folder = checkpoint.find(model_at(path))
    if tokenizer_file is not None:
        tokenizer_at(tokenizer_file)
    run_dir = folder.parent.parent
    held = (path for path in folder.iterdir() if path.is_file())
    require_free(sum(p.stat().st_size for p in held), f"the checkpoint {folder}")
    loaded = checkpoint.load(folder)
    for key, kind in STATED.items():
        if type(value := loaded.state[key]) is not kind:
            raise CheckpointError(
                f"{key} in {folder / 'state.json'} is of another type",
                value=repr(value)[:80],
                allowed=kind.__name__,
            )
    cfg = recorded_config(loaded.state["config"])
    file = tokenizer_file or run_dir / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"there is no tokenizer at {file}",
            next_step="keep checkpoints inside their run directory, or give --tokenizer",
        )
    tokenizer = load_tokenizer(file)
    if tokenizer.sha256 != loaded.state["tokenizer_sha256"]:
        raise DataError(
            f"{file} is not the tokenizer of this model",
            value=f"sha256 {tokenizer.sha256[:12]}…",
            allowed=f"sha256 {loaded.state['tokenizer_sha256'][:12]}…",
            next_step=(
                "use the tokenizer.json of the run; scores with another vocabulary are not valid"
            ),
        )
    _require_described(cfg.model, tokenizer.vocab_size, loaded)
    import torch

    model = build_model(cfg.model, tokenizer.vocab_size, seed=0)
    with torch.no_grad():
        checkpoint.load_model(model, loaded.model)
    model.eval()
    weights_file = checkpoint.weights_file(folder)
    return OpenedModel(model, tokenizer, cfg, folder, run_dir, loaded.state, weights_file, path)


def _require_described(cfg: Any, vocab_size: int, loaded: Any) -> None:
    """Raise CheckpointError if the configuration describes more parameters than the checkpoint
    holds, EnvironmentUnfit if the model does not fit into memory, before it is built.
    """
    from stackproof.spec.formulas import parameter_count
    from stackproof.train.memory import model_bytes, require_free

    described = parameter_count(cfg.model_dump(), vocab_size)
    held = sum(t.numel() for t in loaded.model.values())
    if described > held:
        raise CheckpointError(
            f"the configuration in {loaded.path} describes another model than its tensors",
            value=f"{described} parameters",
            allowed=f"the {held} of its files",
            next_step="resume from an older step folder",
        )
    require_free(model_bytes(cfg, vocab_size), f"the model of {loaded.path}")


@dataclass(frozen=True)
class TraceModel:
    """A model to trace, with what its record states. `mode` is the part after the @ of MODEL@MODE.

    `encode` turns text into ids, with the token that begins a text; None without a tokenizer.
    `decode` turns ids into text, control tokens included; without a tokenizer into numbers.
    """

    model: Any
    title: str
    vocab_size: int
    max_seq_len: int
    config: dict
    encode: Callable[[str], list[int]] | None
    files: tuple[Path, ...]
    root: Path
    mode: str | None = None
    parents: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    opened: OpenedModel | None = None
    decode: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids))


def load_model(text: str, beside: TraceModel | None = None) -> TraceModel:
    """Load MODEL or MODEL@MODE; `self` is the model `beside`.
    Raises UsageError for an unknown mode or path.
    """
    path, mode = _split(text)
    found = beside if path == SELF and beside is not None else _load(Path(path))
    return replace(found, title=text, mode=mode)


def _split(text: str) -> tuple[str, str | None]:
    """Path and mode of MODEL@MODE; an existing path is never split."""
    from stackproof.trace.model_variant import MODES, SHORT

    path, at, mode = text.rpartition("@")
    if not at or Path(text).exists():
        return text, None
    if mode not in (*MODES, *SHORT):
        raise UsageError(
            f"unknown compute mode {mode}", value=text, allowed=", ".join((*MODES, *SHORT))
        )
    return path, mode


def _load(path: Path) -> TraceModel:
    if not path.exists():
        raise UsageError(
            f"MODEL does not exist: {path}",
            value=path.absolute(),
            allowed=f"MODEL is {FORMATS}",
            next_step=MAKES_ONE,
        )
    if path.suffix == ".gguf":
        return _load_foreign(path, path.parent, (path,))
    if path.is_dir() and (path / "config.json").is_file():
        return _load_foreign(
            path, path, tuple(sorted({path / "config.json", *path.glob("*.safetensors")}))
        )
    opened = open_model(path)
    tokenizer = opened.tokenizer
    return TraceModel(
        opened.model,
        str(path),
        tokenizer.vocab_size,
        opened.cfg.model.max_seq_len,
        opened.cfg.to_dict(),
        encode=lambda text: [tokenizer.eos_id, *_complete(tokenizer.encode(text))],
        files=(opened.weights_file, opened.run_dir / "tokenizer.json"),
        root=opened.run_dir,
        parents=(opened.state["record"],),
        facts={"step": int(opened.state["step"])},
        opened=opened,
        decode=lambda ids: tokenizer.decode(ids) or "".join(map(tokenizer.literal, ids)),
    )


def _complete(encoding: Any) -> list[int]:
    """The ids of a text. Raises DataError if the tokenizer dropped a character."""
    if encoding.dropped_chars:
        raise DataError(
            "the prompt holds characters that are not in the vocabulary",
            value=f"{encoding.dropped_chars} characters",
            next_step="leave them out, or give --input-ids",
        )
    return list(encoding.ids)


def _load_foreign(path: Path, folder: Path, files: tuple[Path, ...]) -> TraceModel:
    """A model of transformers, in the implementation of that library."""
    from stackproof.data.tokenizer_file import library_tokenizer
    from stackproof.export import parity

    model = parity.theirs(path)
    config, file = model.config, folder / "tokenizer.json"
    sizes = [getattr(config, n, None) for n in ("vocab_size", "max_position_embeddings")]
    if not all(isinstance(n, int) for n in sizes):
        raise CheckpointError(
            f"the configuration of {path} lacks the size of the vocabulary or of the context",
            value=type(model).__name__,
            allowed="a decoder that reads one sequence of tokens",
        )
    made = TraceModel(
        model,
        str(path),
        *sizes,
        {"architecture": type(model).__name__, "config": config.to_diff_dict()},
        encode=None,
        files=files,
        root=folder,
        facts={"architecture": type(model).__name__, "transformers": parity.version()},
    )
    if not file.is_file():
        return made

    @cache
    def tokenizer() -> Any:
        return library_tokenizer(file)

    return replace(
        made,
        files=(*files, file),
        encode=lambda text: tokenizer().encode(text).ids,
        decode=lambda ids: tokenizer().decode(ids, skip_special_tokens=False),
    )
