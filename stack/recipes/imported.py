"""Continued pre-training of an imported model: its architecture and tokenizer, a small learning
rate, and the embedded text.
"""

from pathlib import Path

from stackproof.config import (
    AdamW,
    CheckpointConfig,
    Cosine,
    DataConfig,
    EvalConfig,
    FileTokenizer,
    ModelConfig,
    Patience,
    RunConfig,
    SampleConfig,
    StdlibDocs,
    TrainConfig,
)

TOKENS_PER_STEP = 4096


def imported(model: ModelConfig, tokenizer_file: Path) -> RunConfig:
    """The base configuration of `stack train --fork`; `--set data.corpus.…` selects another
    corpus.
    """
    rows = max(1, TOKENS_PER_STEP // model.max_seq_len)
    return RunConfig(
        recipe="imported",
        data=DataConfig(corpus=StdlibDocs(), tokenizer=FileTokenizer(path=str(tokenizer_file))),
        model=model,
        train=TrainConfig(
            max_steps=200, tokens_per_step=rows * model.max_seq_len, micro_batch_size=rows
        ),
        optim=AdamW(lr=1e-4),
        schedule=Cosine(warmup_steps=20),
        eval=EvalConfig(every=20),
        stop=Patience(),
        sample=SampleConfig(every=50),
        checkpoint=CheckpointConfig(every=50),
    )
