"""A configuration derived from one number: the number of layers."""

import math
from dataclasses import dataclass
from pathlib import Path

from stackproof.config import (
    BpeTokenizer,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Muon,
    RunConfig,
    SampleConfig,
    SoftmaxAttention,
    TrainConfig,
    Wsd,
)
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.formulas import parameter_count

TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556)
EPOCHS = 4  # up to here a repeated epoch is as good as new text (arXiv:2305.16264)
GPU_LAYERS = 8  # from here on training needs a GPU, and every suitable one has bfloat16 units
SWEPT_WIDTH = 128  # of the default recipe


@dataclass(frozen=True)
class Corpus:
    """A corpus: size of its vocabulary, and number of its training tokens."""

    vocab_size: int
    unique_tokens: int


def embedded(n_layers: int) -> Corpus:
    """The documentation of the standard library, with a smaller vocabulary from four layers on, so
    that the tokens are sufficient for the parameters.
    """
    return Corpus(2048, 850_000) if n_layers < 4 else Corpus(1024, 1_000_000)


def depth(n_layers: int, corpus: Corpus | None = None) -> RunConfig:
    """A model of `n_layers` blocks with width 64·n_layers, and a matching run on a corpus (default:
    the embedded text).

    Optimizer, schedule and batch are those of the default recipe; learning rates scale with
    width^-0.75. Measurements: docs/adr/0023.
    """
    corpus = corpus or embedded(n_layers)
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
        attention=SoftmaxAttention(qk_norm=True),
    )
    tokens = min(
        TOKENS_PER_PARAMETER * parameter_count(model.model_dump(), corpus.vocab_size),
        EPOCHS * corpus.unique_tokens,
    )
    tokens_per_step = max(2048, min(2**19, 2 ** round(math.log2(tokens / 4000))))
    steps, factor = max(40, tokens // tokens_per_step), (SWEPT_WIDTH / d_model) ** 0.75
    half = "bfloat16" if n_layers >= GPU_LAYERS else "float32"
    return RunConfig(
        recipe=f"depth-{n_layers}",
        data=DataConfig(tokenizer=BpeTokenizer(vocab_size=corpus.vocab_size)),
        model=model,
        train=TrainConfig(
            max_steps=steps,
            tokens_per_step=tokens_per_step,
            micro_batch_size=min(4096, tokens_per_step) // max_seq_len,
            dtype=half,
        ),
        optim=Muon(lr=round(4e-3 * factor, 6), adamw_lr=round(1.6e-2 * factor, 6), dtype=half),
        schedule=Wsd(warmup_steps=max(10, steps // 70), decay_frac=0.6, decay_shape="linear"),
        eval=EvalConfig(every=min(1000, max(5, steps // 7))),
        sample=SampleConfig(every=min(100, max(5, steps // 7))),
        checkpoint=CheckpointConfig(every=min(2000, max(10, steps // 3))),
    )


def corpus_of(built: Path) -> Corpus:
    """Vocabulary and training tokens of a folder written by `stack data build`.
    Raises DataError for any other folder.
    """
    from stackproof.data.manifest import read_manifest  # not in the light install

    path = built / "manifest.json"
    try:
        manifest = read_manifest(path)
        return Corpus(manifest["tokenizer"]["vocab_size"], manifest["splits"]["train"]["tokens"])
    except (OSError, IntegrityError, LookupError, TypeError, AttributeError) as e:
        raise DataError(
            f"{built} is not a built data set: {type(e).__name__}: {e}",
            next_step="stack data build SRC… --out DIR",
        ) from e
