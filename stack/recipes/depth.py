"""One dial: everything else follows from the number of layers."""

import math
from pathlib import Path

from spec.canonical import parse_strict
from spec.errors import DataError, IntegrityError
from spec.formulas import parameter_count
from stack.config import (
    AdamW,
    BpeTokenizer,
    CheckpointConfig,
    Cosine,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556)
EPOCHS = 4  # up to here repeated text is worth as much as new (arXiv:2305.16264)
GPU_LAYERS = 8  # from here on a CPU would train for weeks, and every GPU of use has bfloat16 units
EMBEDDED_TOKENS = 1_000_000  # about what the standard library's documentation holds in the recipe's vocabulary


def depth(n_layers: int, *, vocab_size: int = 1024, unique_tokens: int = EMBEDDED_TOKENS) -> RunConfig:
    """A model of `n_layers` blocks, 64 features wide per block, and a run that is sensible for it on a corpus of `unique_tokens`.

    Learning rate and batch follow the default recipe, which was swept at width 128, by width^-0.75 and by tokens.
    """
    d_model, max_seq_len = 64 * n_layers, 256 * 2 ** min(3, n_layers // 6)
    n_heads = max(2, d_model // 64)
    n_kv_heads = n_heads // 2 if n_heads % 2 == 0 else n_heads
    model = ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        d_ff=round(d_model * 8 / 3 / 32) * 32,
        max_seq_len=max_seq_len,
    )
    tokens = min(TOKENS_PER_PARAMETER * parameter_count(model.model_dump(), vocab_size), EPOCHS * unique_tokens)
    tokens_per_step = max(4096, min(2**19, 2 ** round(math.log2(tokens / 4000))))
    steps = max(40, tokens // tokens_per_step)
    return RunConfig(
        recipe=f"depth-{n_layers}",
        data=DataConfig(tokenizer=BpeTokenizer(vocab_size=vocab_size)),
        model=model,
        train=TrainConfig(
            max_steps=steps,
            tokens_per_step=tokens_per_step,
            micro_batch_size=4096 // max_seq_len,
            dtype="bfloat16" if n_layers >= GPU_LAYERS else "float32",
        ),
        optim=AdamW(lr=round(4e-3 * (128 / d_model) ** 0.75, 6)),
        schedule=Cosine(warmup_steps=max(10, steps // 12)),
        eval=EvalConfig(every=min(1000, max(5, steps // 7))),
        sample=SampleConfig(every=min(100, max(5, steps // 7))),
        checkpoint=CheckpointConfig(every=min(2000, max(10, steps // 3))),
    )


def sizes_of(built: Path) -> dict[str, int]:
    """Vocabulary and training tokens of a folder that `stack data build` wrote, as arguments of `depth`. Raises DataError for another."""
    path = built / "manifest.json"
    try:
        manifest = parse_strict(path.read_bytes(), origin=str(path))
        shards = manifest["splits"]["train"]["shards"]
        return {"vocab_size": manifest["tokenizer"]["vocab_size"], "unique_tokens": sum(s["tokens"] for s in shards)}
    except (OSError, IntegrityError, KeyError, TypeError) as e:
        raise DataError(f"{built} holds no built data: {type(e).__name__}: {e}", next_step="stack data build SRC… --out DIR") from e
