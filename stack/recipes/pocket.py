"""About a million parameters, trained in minutes on two CPU cores on text every Python installation has."""

from stack.config import (
    AdamW,
    BpeTokenizer,
    CheckpointConfig,
    Cosine,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Patience,
    RunConfig,
    SampleConfig,
    StdlibCode,
    StdlibDocs,
    TrainConfig,
)


def pocket() -> RunConfig:
    """The embedded default: English of the standard library's documentation."""
    return RunConfig(
        recipe="pocket",
        data=DataConfig(corpus=StdlibDocs(), tokenizer=BpeTokenizer(vocab_size=1024)),
        model=ModelConfig(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=352, max_seq_len=256),
        train=TrainConfig(max_steps=420, tokens_per_step=4096, micro_batch_size=16),
        optim=AdamW(lr=4e-3, weight_decay=0.1),
        schedule=Cosine(warmup_steps=35),
        eval=EvalConfig(every=60),
        stop=Patience(),
        sample=SampleConfig(every=60, prompt="The "),
        checkpoint=CheckpointConfig(every=120),
    )


def pocket_code() -> RunConfig:
    """The same model on the standard library's source."""
    docs = pocket()
    return docs.model_copy(
        update={
            "recipe": "pocket-code",
            "data": docs.data.model_copy(update={"corpus": StdlibCode()}),
            "sample": docs.sample.model_copy(update={"prompt": "def ", "language": "code"}),
        }
    )
