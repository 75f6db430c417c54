"""About a million parameters, trained in minutes on two CPU cores, on text of every Python
installation.
"""

from stackproof.config import (
    BpeTokenizer,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Muon,
    Patience,
    RunConfig,
    SampleConfig,
    SoftmaxAttention,
    StdlibCode,
    StdlibDocs,
    TrainConfig,
    Wsd,
)


def pocket() -> RunConfig:
    """The default recipe: English documentation of the standard library.
    How its settings were chosen: docs/adr/0023.
    """
    return RunConfig(
        recipe="pocket",
        data=DataConfig(corpus=StdlibDocs(), tokenizer=BpeTokenizer(vocab_size=2048)),
        model=ModelConfig(
            d_model=128,
            n_layers=4,
            n_heads=4,
            n_kv_heads=2,
            head_dim=32,
            d_ff=352,
            max_seq_len=256,
            attention=SoftmaxAttention(qk_norm=True),
        ),
        train=TrainConfig(max_steps=700, tokens_per_step=2048, micro_batch_size=8),
        optim=Muon(lr=4e-3, adamw_lr=1.6e-2, weight_decay=0.1),
        schedule=Wsd(warmup_steps=10, decay_frac=0.6, decay_shape="linear"),
        eval=EvalConfig(every=100),
        stop=Patience(),
        sample=SampleConfig(every=100, prompt="The "),
        checkpoint=CheckpointConfig(every=200),
    )


def pocket_code() -> RunConfig:
    """The same model on the source files of the standard library."""
    docs = pocket()
    return docs.model_copy(
        update={
            "recipe": "pocket-code",
            "data": docs.data.model_copy(update={"corpus": StdlibCode()}),
            "sample": docs.sample.model_copy(update={"prompt": "def ", "language": "code"}),
        }
    )
