"""Small models of both sides with weights that no default would give, and how they are compared.
B batch, T tokens, V vocab.
"""

import torch

from stackproof.config import (
    Gelu,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    RotaryPositions,
    SoftmaxAttention,
)
from stackproof.evaluate.sampling import generate
from stackproof.model.build import build_model

VOCAB, CONTEXT = 101, 40
LENGTHS = (1, 2, 17, 39, CONTEXT)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.12,
}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
LONG = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
}

# Name of a published family, class of theirs, settings besides the sizes.
THEIRS = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3": (
        "Llama",
        {"rope_parameters": LONG | {"rope_theta": 500_000.0}, "head_dim": 16, "rms_norm_eps": 1e-5},
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "llama-biases": ("Llama", {"attention_bias": True}),
    "smollm2": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        },
    ),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-whole": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-window": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 9},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": (
        "GPT2",
        {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 56},
    ),
}

BASE = {
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 12,
    "d_ff": 56,
    "max_seq_len": CONTEXT,
    "init_std": 0.12,
}
LEARNED = {"positions": LearnedPositions(), "norm": LayerNorm(), "n_kv_heads": 4}
ALL_BIASES = SoftmaxAttention(qkv_bias=True, out_bias=True)
SCALED = RotaryPositions(scaling=Llama3Scaling(original_max_seq_len=20))
# Kind that says it, and what differs from a plain decoder.
OURS = {
    "plain": ("Llama", {}),
    "untied": ("Llama", {"tied_head": False, "rope_theta": 500_000.0, "norm_eps": 1e-5}),
    "wide-heads": ("Llama", {"head_dim": 20, "n_kv_heads": 1}),
    "all-biases": ("Llama", {"attention": ALL_BIASES}),
    "llama3-scaling": ("Llama", {"positions": SCALED}),
    "linear-scaling": ("Llama", {"positions": RotaryPositions(scaling=LinearScaling(factor=3.0))}),
    "qkv-bias": ("Qwen2", {"attention": SoftmaxAttention(qkv_bias=True)}),
    "qkv-bias-window": (
        "Qwen2",
        {
            "attention": SoftmaxAttention(qkv_bias=True, window=6),
            "tied_head": False,
            "head_dim": 16,
        },
    ),
    "qk-norm": ("Qwen3", {"attention": SoftmaxAttention(qk_norm=True)}),
    "qk-norm-window": (
        "Qwen3",
        {"attention": SoftmaxAttention(qk_norm=True, qkv_bias=True, out_bias=True, window=6)},
    ),
    "window": ("Mistral", {"attention": SoftmaxAttention(window=6)}),
    "odd-heads": ("Mistral", {"n_heads": 6, "n_kv_heads": 3, "d_model": 40}),
    "experts": (
        "Mixtral",
        {"ffn": MixtureOfExperts(n_experts=4), "positions": SCALED, "tied_head": False},
    ),
    "gpt2": ("GPT2", LEARNED | {"attention": ALL_BIASES, "ffn": Gelu()}),
    "gpt2-exact": (
        "GPT2",
        LEARNED | {"attention": ALL_BIASES, "ffn": Gelu(approximate="none"), "tied_head": False},
    ),
}


@torch.no_grad()
def stirred(model):
    """The model with vectors (gains, biases) that are neither one nor zero,
    as no initialisation leaves them.
    """
    draw = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def theirs(name):
    """A random model of transformers."""
    import transformers

    family, settings = THEIRS[name]
    sizes = GPT2 if family == "GPT2" else SIZES
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    cfg = getattr(transformers, f"{family}Config")(**(sizes | settings))
    torch.manual_seed(11)
    return stirred(getattr(transformers, family + suffix)(cfg))


def ours(name, vocab_size=VOCAB):
    """A random model of this stack."""
    return stirred(build_model(ModelConfig(**(BASE | OURS[name][1])), vocab_size, seed=5))


@torch.no_grad()
def differences(model, other):
    """Largest difference of logits at each length; every most likely token must be the same."""
    worst = {}
    for length in LENGTHS:
        ids = torch.randint(
            0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(length)
        )
        a, b = model(ids), other(input_ids=ids).logits
        assert torch.equal(a.argmax(-1), b.argmax(-1))
        worst[length] = float((a - b).abs().max())
    return worst


def same_greedy_text(model, other, n_new=24):
    """Whether both continue a prompt alike, each with its own cache."""
    prompt = [5, 3, 8, 1, 70, 2, 9, 44]
    made = other.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=n_new,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist() == generate(
        model, prompt, max_new_tokens=n_new, temperature=0.0
    )
