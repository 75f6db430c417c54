"""Recipes named by size. Those above a few million parameters need a corpus of their own:
`--data DIR` or `--set data.corpus…`.
"""

from stackproof.config import (
    AdamW,
    BpeTokenizer,
    ByteTokenizer,
    CheckpointConfig,
    Cosine,
    DataConfig,
    EvalConfig,
    Gelu,
    LayerNorm,
    LearnedPositions,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SoftmaxAttention,
    TrainConfig,
)

LARGE = {"dtype": "bfloat16", "log_every": 10}
GPT2 = {
    "d_model": 768,
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": 12,
    "head_dim": 64,
    "d_ff": 3072,
    "max_seq_len": 1024,
    "positions": LearnedPositions(),
}


def _recipe(
    name: str,
    tokenizer: BpeTokenizer | ByteTokenizer,
    model: ModelConfig,
    train: TrainConfig,
    optim: AdamW,
    schedule: Cosine,
    *,
    eval_every: int,
    checkpoint: CheckpointConfig,
) -> RunConfig:
    return RunConfig(
        recipe=name,
        data=DataConfig(tokenizer=tokenizer),
        model=model,
        train=train,
        optim=optim,
        schedule=schedule,
        eval=EvalConfig(every=eval_every),
        sample=SampleConfig(every=100),
        checkpoint=checkpoint,
    )


def tiny() -> RunConfig:
    """Four layers of width 128 over bytes."""
    return _recipe(
        "tiny",
        ByteTokenizer(),
        ModelConfig(
            d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32, d_ff=352, max_seq_len=256
        ),
        TrainConfig(max_steps=600, tokens_per_step=4096, micro_batch_size=16),
        AdamW(lr=4e-3),
        Cosine(warmup_steps=50),
        eval_every=100,
        checkpoint=CheckpointConfig(every=200),
    )


def huge() -> RunConfig:
    """Twelve layers of width 256 over 512 tokens, as the founding note tinygpt validation trained
    them.

    That run also had model.attention.kind=differential and model.depth.kind=mixture-of-depths.
    """
    return _recipe(
        "huge",
        BpeTokenizer(vocab_size=49_152),
        ModelConfig(
            d_model=256,
            n_layers=12,
            n_heads=8,
            n_kv_heads=8,
            head_dim=32,
            d_ff=688,
            max_seq_len=512,
        ),
        TrainConfig(max_steps=500, tokens_per_step=16 * 512, micro_batch_size=4, dtype="bfloat16"),
        AdamW(lr=6e-4, max_grad_norm=1.0),
        Cosine(warmup_steps=50, final_lr_frac=0.1),
        eval_every=100,
        checkpoint=CheckpointConfig(every=250),
    )


def nanolm() -> RunConfig:
    """The founding note nanolm: 10.4 million parameters, 655 million tokens."""
    return _recipe(
        "nanolm",
        BpeTokenizer(vocab_size=32_000),
        ModelConfig(
            d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=256, max_seq_len=512
        ),
        TrainConfig(max_steps=20_000, tokens_per_step=64 * 512, micro_batch_size=16, **LARGE),
        AdamW(lr=3e-4),
        Cosine(warmup_steps=200, final_lr_frac=0.1),
        eval_every=500,
        checkpoint=CheckpointConfig(every=500),
    )


def llama_370m() -> RunConfig:
    """A Llama of 371 million parameters, the size of the founding note ship-two-001."""
    return _recipe(
        "llama-370m",
        BpeTokenizer(vocab_size=49_152),
        ModelConfig(
            d_model=1024,
            n_layers=24,
            n_heads=16,
            n_kv_heads=4,
            head_dim=64,
            d_ff=2816,
            max_seq_len=2048,
            norm_eps=1e-5,
            tied_head=False,
        ),
        TrainConfig(max_steps=14_000, tokens_per_step=256 * 2048, micro_batch_size=16, **LARGE),
        AdamW(lr=6e-4),
        Cosine(warmup_steps=1000, final_lr_frac=0.1),
        eval_every=500,
        checkpoint=CheckpointConfig(every=1000, async_save=True),
    )


def gpt2_124m() -> RunConfig:
    """The smallest GPT-2, with the batch size and the learning rate of its open reproductions."""
    attention = SoftmaxAttention(qkv_bias=True, out_bias=True)
    return _recipe(
        "gpt2-124m",
        BpeTokenizer(vocab_size=50_257),
        ModelConfig(**GPT2, norm=LayerNorm(), norm_eps=1e-5, attention=attention, ffn=Gelu()),
        TrainConfig(max_steps=5_000, tokens_per_step=512 * 1024, micro_batch_size=16, **LARGE),
        AdamW(lr=6e-4),
        Cosine(warmup_steps=350, final_lr_frac=0.1),
        eval_every=250,
        checkpoint=CheckpointConfig(every=500, async_save=True),
    )


def andrea_120m() -> RunConfig:
    """The founding note ANDREA-120M: its width, depth, vocabulary and update rule.
    It has 99 million parameters, not 120.
    """
    return _recipe(
        "andrea-120m",
        BpeTokenizer(vocab_size=8449),
        ModelConfig(**GPT2, ffn=Gelu(bias=False), tied_head=False),
        TrainConfig(max_steps=165_000, tokens_per_step=8 * 1024, micro_batch_size=8, **LARGE),
        AdamW(lr=3e-4, weight_decay=0.01, max_grad_norm=1.0),
        Cosine(warmup_steps=2000, final_lr_frac=0.1),
        eval_every=1000,
        checkpoint=CheckpointConfig(every=2000, async_save=True),
    )
