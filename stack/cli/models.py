"""Opens what MODEL means on the command line: a run directory or a checkpoint folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackproof.cli.paths import model_at, tokenizer_at
from stackproof.spec.errors import DataError


@dataclass
class Opened:
    """A verified model with its tokenizer and configuration."""

    model: Any
    tokenizer: Any
    cfg: Any
    folder: Path
    run_dir: Path
    state: dict


def open_model(path: Path, tokenizer_file: Path | None = None) -> Opened:
    """Load and verify a checkpoint and the tokenizer it is pinned to.

    Raises UsageError for paths that name nothing of their kind, CheckpointError for a damaged
    checkpoint, DataError for another tokenizer.
    """
    from stackproof.config import validate
    from stackproof.data.tokenizer import load_tokenizer
    from stackproof.model.build import build_model
    from stackproof.train import checkpoint

    folder = checkpoint.find(model_at(path))
    if tokenizer_file is not None:
        tokenizer_at(tokenizer_file)
    run_dir = folder.parent.parent
    loaded = checkpoint.load(folder)
    cfg = validate(loaded.state["config"])
    file = tokenizer_file or run_dir / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"there is no tokenizer at {file}",
            next_step="keep checkpoints inside their run directory, or give --tokenizer",
        )
    tokenizer = load_tokenizer(file)
    if tokenizer.sha256 != loaded.state["tokenizer_sha256"]:
        raise DataError(
            f"{file} is not the tokenizer this model was trained with",
            value=f"sha256 {tokenizer.sha256[:12]}…",
            allowed=f"sha256 {loaded.state['tokenizer_sha256'][:12]}…",
            next_step=(
                "use the tokenizer.json of the run; other merges make every score meaningless"
            ),
        )
    import torch

    model = build_model(cfg.model, tokenizer.vocab_size, seed=0)
    with torch.no_grad():
        checkpoint.load_model(model, loaded.model)
    model.eval()
    return Opened(model, tokenizer, cfg, folder, run_dir, loaded.state)
