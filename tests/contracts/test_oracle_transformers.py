"""The float64 oracle against transformers' models in float64, and against values frozen from them
where transformers is not installed.
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.contracts.declared import parameter_shapes
from stackproof.contracts.oracle import oracle_logits

GOLDEN = Path(__file__).with_name("golden_logits.json")
SIZES = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 4,
    "d_ff": 24,
    "max_seq_len": 32,
    "norm_eps": 1e-5,
}
VOCAB, TOKENS = 29, 19
BIASED = {"kind": "softmax", "qkv_bias": True}
GPT2 = {
    "n_kv_heads": 4,
    "positions": {"kind": "learned"},
    "norm": {"kind": "layernorm"},
    "ffn": {"kind": "gelu"},
    "attention": BIASED | {"out_bias": True},
}
SCALING = {
    "kind": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 64,
}
DECLARED = {
    "llama": {"tied_head": False},
    "llama3": {
        "head_dim": 16,
        "rope_theta": 500.0,
        "positions": {"kind": "rotary", "scaling": SCALING},
    },
    "linear": {"positions": {"kind": "rotary", "scaling": {"kind": "linear", "factor": 3.0}}},
    "qwen2": {"attention": BIASED},
    "qwen3": {"attention": {"kind": "softmax", "qk_norm": True}, "head_dim": 8},
    "mistral": {"attention": {"kind": "softmax", "window": 5}},
    "mixtral": {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2}, "tied_head": False},
    "gpt2": GPT2,
}


def architecture(source):
    return ModelConfig(**SIZES | DECLARED[source]).model_dump()


def plain_weights(a):
    """Weights from whole numbers alone, the same on every machine: hashed indices, spread as wide
    as keeps scores of order 1.
    """
    return {
        n: _hashed(i, shape, n)
        for i, (n, shape) in enumerate(sorted(parameter_shapes(a, VOCAB).items()))
    }


def _hashed(seed, shape, name):
    x = torch.arange(math.prod(shape), dtype=torch.int64) + 1 + 1_000_003 * seed
    for factor in (2_654_435_761, 2_246_822_519):
        x = (x * factor) % 2**32
        x = x ^ (x >> 15)
    even = (x.double() / 2**32 - 0.5).reshape(shape)
    if len(shape) == 1:
        return even + (0 if name.endswith("bias") else 1)
    return 4 * even / math.sqrt(shape[1] if "embed" not in name and "positions" not in name else 4)


def plain_ids():
    return torch.tensor(
        [[(7 * t + 3 * t * t + 11 * row) % VOCAB for t in range(TOKENS)] for row in range(2)]
    )


# --- transformers ---------------------------------------------------------------------------------


@contextmanager
def everything_double(patch):
    """Where transformers asks for float32 it gets float64, so that its own arithmetic can be
    held against ours to 1e-10.
    """
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name in ("float32", "float"):
        patch.setattr(torch, name, torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    try:
        yield
    finally:
        patch.undo()
        torch.set_default_dtype(former)


def transformers_model(source, a):
    import transformers

    scaling = a["positions"].get("scaling", {"kind": "none"})
    rope = {
        "rope_type": "default" if scaling["kind"] == "none" else scaling["kind"],
        "rope_theta": a["rope_theta"],
    }
    rope |= {k: v for k, v in scaling.items() if k not in ("kind", "original_max_seq_len")}
    if scaling["kind"] == "llama3":
        rope["original_max_position_embeddings"] = scaling["original_max_seq_len"]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": a["d_model"],
        "num_hidden_layers": a["n_layers"],
        "num_attention_heads": a["n_heads"],
        "num_key_value_heads": a["n_kv_heads"],
        "head_dim": a["head_dim"],
        "intermediate_size": a["d_ff"],
        "max_position_embeddings": a["max_seq_len"],
        "rms_norm_eps": a["norm_eps"],
        "tie_word_embeddings": a["tied_head"],
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    match source:
        case "llama" | "llama3" | "linear":
            config = transformers.LlamaConfig(**common)
        case "qwen2":
            config = transformers.Qwen2Config(**common)
        case "qwen3":
            config = transformers.Qwen3Config(**common)
        case "mistral":
            config = transformers.MistralConfig(**common, sliding_window=a["attention"]["window"])
        case "mixtral":
            config = transformers.MixtralConfig(
                **common,
                num_local_experts=a["ffn"]["n_experts"],
                num_experts_per_tok=a["ffn"]["top_k"],
                sliding_window=None,
            )
        case "gpt2":
            sizes = {
                "n_embd": a["d_model"],
                "n_layer": a["n_layers"],
                "n_head": a["n_heads"],
                "n_inner": a["d_ff"],
            }
            config = transformers.GPT2Config(
                vocab_size=VOCAB,
                n_positions=a["max_seq_len"],
                layer_norm_epsilon=a["norm_eps"],
                attn_implementation="eager",
                **sizes,
            )
    config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def put(source, model, weights, a):
    """Copy our weights into transformers' names; every one of its parameters must be set."""
    theirs = gpt2_names(weights, a) if source == "gpt2" else llama_names(weights, a)
    own = dict(model.named_parameters())
    assert theirs.keys() == own.keys()
    with torch.no_grad():
        for name, value in theirs.items():
            assert own[name].shape == value.shape and own[name].dtype == torch.float64
            own[name].copy_(value)


def llama_names(weights, a):
    renamed = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention": "self_attn",
        "ffn": "mlp",
    }
    last = {n: f"{n}_proj" for n in ("q", "k", "v", "gate", "up", "down")} | {
        "out": "o_proj",
        "router": "gate",
    }
    found = {}
    for name, value in weights.items():
        match name.split("."):
            case ["layers", layer, part, *rest]:
                found[
                    ".".join(["model.layers", layer, parts[part], *(last.get(r, r) for r in rest)])
                ] = value
            case [first, *rest]:
                found[".".join([renamed[first], *rest])] = value
    return stacked_experts(found, a) if a["ffn"]["kind"] == "moe" else found


def stacked_experts(found, a):
    """Mixtral holds all experts of a layer in one tensor, gate above up."""
    kept = {n: v for n, v in found.items() if ".experts." not in n}
    for layer in range(a["n_layers"]):
        at, experts = f"model.layers.{layer}.mlp.experts", range(a["ffn"]["n_experts"])
        kept[f"{at}.gate_up_proj"] = torch.stack(
            [
                torch.cat([found[f"{at}.{e}.gate_proj.weight"], found[f"{at}.{e}.up_proj.weight"]])
                for e in experts
            ]
        )
        kept[f"{at}.down_proj"] = torch.stack(
            [found[f"{at}.{e}.down_proj.weight"] for e in experts]
        )
    return kept


def turned(weight):
    return weight.T if weight.ndim == 2 else weight


def gpt2_names(weights, a):
    """GPT-2 multiplies from the right and holds queries, keys and values in one matrix."""
    found = {
        "transformer.wte.weight": weights["embed.weight"],
        "transformer.wpe.weight": weights["positions.weight"],
    }
    found |= {
        f"transformer.ln_f.{kind}": weights[f"final_norm.{kind}"] for kind in ("weight", "bias")
    }
    for layer in range(a["n_layers"]):
        ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            found[f"{theirs}attn.c_attn.{kind}"] = turned(
                torch.cat([weights[f"{ours}attention.{p}.{kind}"] for p in "qkv"])
            )
            for one, other in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2")):
                found[f"{theirs}{other}.{kind}"] = weights[f"{ours}{one}.{kind}"]
            for one, other in (
                ("attention.out", "attn.c_proj"),
                ("ffn.up", "mlp.c_fc"),
                ("ffn.down", "mlp.c_proj"),
            ):
                found[f"{theirs}{other}.{kind}"] = turned(weights[f"{ours}{one}.{kind}"])
    return found


@pytest.mark.parametrize("source", DECLARED)
def test_oracle_equals_transformers(source):
    transformers = pytest.importorskip(
        "transformers", reason="the frozen values below stand in for it"
    )
    kinds = "Llama Qwen2 Qwen3 Mistral Mixtral GPT2LMHead".split()
    assert all(
        hasattr(transformers, f"{k}Model" if k == "GPT2LMHead" else f"{k}ForCausalLM")
        for k in kinds
    ), "loaded before the patch"
    a = architecture(source)
    weights = plain_weights(a)
    with pytest.MonkeyPatch.context() as patch, everything_double(patch), torch.no_grad():
        model = transformers_model(source, a)
        put(source, model, weights, a)
        theirs = model(plain_ids()).logits
    assert theirs.dtype == torch.float64 and theirs.std() > 0.5
    ours = oracle_logits(plain_ids(), weights, a)
    assert float((ours - theirs).abs().max()) < 1e-10  # measured worst case 1e-14


@pytest.mark.parametrize("source", DECLARED)
def test_oracle_equals_values_frozen_from_transformers(source):
    frozen, a = json.loads(GOLDEN.read_text("utf-8"))[source], architecture(source)
    got = oracle_logits(plain_ids(), plain_weights(a), a)[:, [0, 1, TOKENS // 2, TOKENS - 1]]
    assert torch.allclose(
        got[..., :6], torch.tensor(frozen, dtype=torch.float64), rtol=0, atol=1e-9
    )
