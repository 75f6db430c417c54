"""Names of Hugging Face, both ways: configuration keys and tensors of each architecture, and ours.

No other file holds them.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from stackproof.config import LinearScaling, Llama3Scaling, ModelConfig, RotaryPositions
from stackproof.model.foreign import Keys, Kind, unsupported
from stackproof.spec.errors import ConfigError

# Keys without effect on the forward.
NEUTRAL = frozenset(
    (
        "_name_or_path architectures model_type transformers_version torch_dtype dtype use_cache "
        "bos_token_id eos_token_id pad_token_id unk_token_id vocab_size output_attentions "
        "output_hidden_states output_router_logits return_dict tokenizer_class pretraining_tp "
        "task_specific_params id2label label2id problem_type gradient_checkpointing "
        "is_llama_config transformers.js_config unsloth_version _attn_implementation "
        "_attn_implementation_autoset n_ctx predict_special_tokens summary_activation "
        "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"
    ).split()
)
ASIDE = frozenset("attention_dropout attn_pdrop embd_pdrop router_aux_loss_coef".split())
SCALED = "factor low_freq_factor high_freq_factor".split()
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
# buffers of old files that follow from the configuration
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


class HuggingFace(Kind):
    """Common to all architectures."""

    neutral, aside = NEUTRAL, ASIDE
    fixed: ClassVar[dict[str, tuple]] = {}
    absent: ClassVar[dict[str, tuple]] = {}


class Llama(HuggingFace):
    """Llama 2 and 3, SmolLM: RMSNorm, rotary positions, grouped heads, SwiGLU."""

    model_type, architecture, base = "llama", "LlamaForCausalLM", "model."
    sizes = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
    }
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "attention_bias": False,
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
    }
    fixed: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False,),
    }
    absent = {"rope_interleaved": (False,), "partial_rotary_factor": (1.0,)}
    modules: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
        "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
        "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention.out": "model.layers.{}.self_attn.o_proj",
        "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
        "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
        "layers.{}.ffn.up": "model.layers.{}.mlp.up_proj",
        "layers.{}.ffn.down": "model.layers.{}.mlp.down_proj",
        "layers.{}.ffn.router": "model.layers.{}.block_sparse_moe.gate",
        "layers.{}.ffn.experts.{}.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
        "layers.{}.ffn.experts.{}.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
        "layers.{}.ffn.experts.{}.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
        "final_norm": "model.norm",
        "head": "lm_head",
    }

    def parts(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        d_model, n_heads = sizes["d_model"], sizes["n_heads"]
        scaling, theta = _read_rope(keys)
        return {
            "n_kv_heads": n_heads if sizes["n_kv_heads"] is None else sizes["n_kv_heads"],
            "head_dim": d_model // n_heads if sizes["head_dim"] is None else sizes["head_dim"],
            "positions": {"kind": "rotary", "scaling": scaling},
            "rope_theta": theta,
            "attention": {
                "kind": "softmax",
                **within_context(self.attention(keys, sizes), sizes["max_seq_len"]),
            },
            "ffn": self.ffn(keys),
        }

    def attention(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        _refuse_uneven_heads(sizes)
        bias = keys.take("attention_bias")
        return {"qkv_bias": bias, "out_bias": bias}

    def ffn(self, keys: Keys) -> dict[str, Any]:
        return {"kind": "swiglu"}

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": cfg.attention.qkv_bias, **_rope_keys(cfg)}


class Qwen2(Llama):
    """Llama with biases on queries, keys and values, and a window over all layers or none."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    defaults = Llama.defaults | {
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
    fixed = {"hidden_act": ("silu", "swish")}

    def attention(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True, "window": _window_of_layers(keys, sizes["n_layers"])}

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        return _window_keys(cfg) | _rope_keys(cfg)


class Qwen3(Qwen2):
    """Qwen2 with normalised queries and keys, and biases on all of attention or none of it."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    defaults = Qwen2.defaults | {"head_dim": 128}

    def attention(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        bias = keys.take("attention_bias")
        return {
            "qk_norm": True,
            "qkv_bias": bias,
            "out_bias": bias,
            "window": _window_of_layers(keys, sizes["n_layers"]),
        }

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        return super().config_keys(cfg) | {"attention_bias": cfg.attention.qkv_bias}


class Mistral(Llama):
    """Llama without biases, with a window, and with heads of any width."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    defaults = Llama.defaults | {"num_key_value_heads": 8, "sliding_window": 4096}
    fixed = Qwen2.fixed

    def attention(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        return {"window": keys.take("sliding_window")}

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": cfg.attention.window, **_rope_keys(cfg)}


class Mixtral(Mistral):
    """Mistral with SwiGLU experts, weights renormalised over the chosen ones."""

    model_type, architecture = "mixtral", "MixtralForCausalLM"
    defaults = Mistral.defaults | {
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    }
    absent = Mistral.absent | {"router_jitter_noise": (0.0,)}
    running: ClassVar[dict[str, str]] = {"layers.{}.ffn.router": "model.layers.{}.mlp.gate"}

    def ffn(self, keys: Keys) -> dict[str, Any]:
        if (top_k := keys.take("num_experts_per_tok")) == 1:
            raise ConfigError(
                "model.ffn.top_k = 1 weighs the expert by its probability, num_experts_per_tok = "
                "1 in config.json by 1",
                allowed="at least 2 experts per token",
            )
        return {"kind": "moe", "n_experts": keys.take("num_local_experts"), "top_k": top_k}

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = super().config_keys(cfg)
        if cfg.ffn.kind == "moe":
            keys |= {"num_local_experts": cfg.ffn.n_experts, "num_experts_per_tok": cfg.ffn.top_k}
        return keys


class Gpt2(HuggingFace):
    """LayerNorm with biases everywhere, learned positions, gelu; matrices lie (in, out), queries,
    keys and values in one.
    """

    model_type, architecture, base = "gpt2", "GPT2LMHeadModel", "transformer."
    sizes = {
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
        "dropout": "resid_pdrop",
    }
    defaults = {
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "activation_function": "gelu_new",
    }
    fixed = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    }
    modules = {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.{}.attention_norm": "transformer.h.{}.ln_1",
        "layers.{}.attention.q": "transformer.h.{}.attn.c_attn",
        "layers.{}.attention.k": "transformer.h.{}.attn.c_attn",
        "layers.{}.attention.v": "transformer.h.{}.attn.c_attn",
        "layers.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "layers.{}.ffn_norm": "transformer.h.{}.ln_2",
        "layers.{}.ffn.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.ffn.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }
    transposed = frozenset(
        f"transformer.h.{{}}.{m}" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )

    def parts(self, keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
        _refuse_uneven_heads(sizes)
        return {
            "d_ff": 4 * sizes["d_model"] if sizes["d_ff"] is None else sizes["d_ff"],
            "n_kv_heads": sizes["n_heads"],
            "head_dim": sizes["d_model"] // sizes["n_heads"],
            "positions": {"kind": "learned"},
            "norm": {"kind": "layernorm"},
            "attention": {"kind": "softmax", "qkv_bias": True, "out_bias": True},
            "ffn": {
                "kind": "gelu",
                "approximate": GELUS[keys.demand("activation_function", tuple(GELUS))],
            },
        }

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        exact = cfg.ffn.kind == "gelu" and cfg.ffn.approximate == "none"
        return {
            "activation_function": "gelu" if exact else "gelu_new",
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }


def _refuse_uneven_heads(sizes: dict[str, Any]) -> None:
    if sizes["d_model"] % sizes["n_heads"]:
        raise ConfigError(
            f"model.d_model ({sizes['d_model']}) must be a multiple of model.n_heads "
            f"({sizes['n_heads']}) in this kind"
        )


KINDS: tuple[Kind, ...] = (Llama(), Qwen2(), Qwen3(), Mistral(), Mixtral(), Gpt2())


def _shown(named: Any) -> str:
    return ", ".join(map(str, named)) if isinstance(named, list) else repr(named)


def kind_of(document: Mapping[str, Any]) -> Kind:
    """The architecture of a config.json. Raises ConfigError if it is unknown or contradictory."""
    known = {k.architecture: k for k in KINDS}
    named = document.get("architectures") or ["none"]
    if not isinstance(named, list) or len(named) != 1 or str(named[0]) not in known:
        raise ConfigError(
            "this architecture cannot be read",
            value=f"architectures = {_shown(named)} in config.json",
            allowed=", ".join(known),
            next_step="convert the model to one of these, or train one here",
        )
    kind = known[str(named[0])]
    if document.get("model_type", kind.model_type) != kind.model_type:
        raise ConfigError(
            "config.json contradicts itself",
            value=f"architectures = {kind.architecture}, model_type = {document['model_type']}",
            allowed=f"model_type = {kind.model_type}",
        )
    return kind


def kind_for(cfg: ModelConfig) -> Kind:
    """The first architecture that supports a configuration.

    Raises ConfigError with the unsupported parts for each architecture.
    """
    lost = {kind: kind.lost_keys(cfg) for kind in KINDS}
    for kind, missing in lost.items():
        if not missing:
            return kind
    # the rest was not compared
    stopped_early = {k: any("config.json" in reason for reason in lost[k]) for k in KINDS}
    nearest = min(reversed(KINDS), key=lambda k: (stopped_early[k], len(lost[k])))
    raise ConfigError(
        f"no Hugging Face architecture supports this model; {nearest.architecture} comes nearest "
        f"and does not support {', '.join(lost[nearest])}",
        value="; ".join(
            f"{k.architecture} does not support {', '.join(v)}" for k, v in lost.items()
        ),
        allowed="a model that one architecture supports entirely",
        next_step="train without it, or keep the model as a run directory",
    )


def _read_rope(keys: Keys) -> tuple[dict[str, Any], float]:
    """Scaling and base of rotary frequencies: `rope_parameters`,
    or older `rope_scaling` and `rope_theta`.
    """
    newer, older = keys.take("rope_parameters") or {}, keys.take("rope_scaling") or {}
    stated = keys.left.get("rope_theta")
    if newer and older and newer != older:
        raise ConfigError(
            "rope_parameters and rope_scaling in config.json contradict each other",
            value=f"{newer} and {older}",
        )
    rope = Keys(older or newer, {"type": "default", "rope_theta": keys.take("rope_theta")})
    kind = rope.take("type")
    kind = rope.left.pop("rope_type", kind)
    theta = rope.take("rope_theta")
    if stated is not None and theta != stated:
        raise ConfigError(
            "rope_theta in config.json contradicts itself", value=f"{stated} and {theta}"
        )
    match kind:
        case "default":
            scaling = {"kind": "none"}
        case "linear":
            scaling = {"kind": "linear", "factor": rope.take("factor")}
        case "llama3":
            scaling = {"kind": "llama3", **{k: rope.take(k) for k in SCALED}}
            scaling["original_max_seq_len"] = rope.take("original_max_position_embeddings")
        case other:
            raise unsupported("rope_type", other, "default, linear, llama3")
    if rope.left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("partial_rotary_factor", "a part of each head", "1.0")
    rope.finish()
    return scaling, theta


def _rope_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The older keys, which newer readers accept too."""
    keys: dict[str, Any] = {"rope_theta": cfg.rope_theta}
    match cfg.positions:
        case RotaryPositions(scaling=LinearScaling(factor=factor)):
            keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case RotaryPositions(scaling=Llama3Scaling() as s):
            keys["rope_scaling"] = {"rope_type": "llama3", **{k: getattr(s, k) for k in SCALED}}
            keys["rope_scaling"]["original_max_position_embeddings"] = s.original_max_seq_len
    return keys


def _window_of_layers(keys: Keys, n_layers: int) -> int | None:
    """The window that all layers share. Raises ConfigError if only some have one."""
    used, window, first, types = (
        keys.take(k)
        for k in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    )
    windowed = used and window is not None
    if types is None:
        full, slides = ["full_attention"], ["sliding_attention"]
        if not windowed or first >= n_layers:
            return None
        if first <= 0:
            return window
        types = full + slides
    if set(types) == {"full_attention"}:
        return None
    if set(types) != {"sliding_attention"} or len(types) != n_layers or not windowed:
        raise unsupported(
            "layer_types",
            ", ".join(types),
            "one window for all layers (max_window_layers = 0), or none",
        )
    return window


def within_context(attention: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """Attention without a window wider than the context, which has no effect."""
    return (
        attention | {"window": None} if (attention.get("window") or 0) > max_seq_len else attention
    )


def _window_keys(cfg: ModelConfig) -> dict[str, Any]:
    if (window := cfg.attention.window) is None:
        return {"use_sliding_window": False}
    types = ["sliding_attention"] * cfg.n_layers
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": types,
    }


# --- the documents of a folder --------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def config_document(
    kind: Kind, cfg: ModelConfig, vocab_size: int, eos_id: int, dtype: str
) -> dict[str, Any]:
    """config.json. Our texts begin and end with the same token."""
    return kind.write(cfg, vocab_size) | {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def generation_document(cfg: ModelConfig, eos_id: int) -> dict[str, Any]:
    """generation_config.json."""
    return {"bos_token_id": eos_id, "eos_token_id": eos_id, "max_length": cfg.max_seq_len}


def tokenizer_document(cfg: ModelConfig, eos_token: str) -> dict[str, Any]:
    """tokenizer_config.json; tokenizer.json holds the rest. No token is added around a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos_token,
        "eos_token": eos_token,
        "model_max_length": cfg.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }


def index_document(places: Mapping[str, str], total_bytes: int) -> dict[str, Any]:
    """The index of a sharded model: tensor to file."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(places)}


def files_of_index(document: Mapping[str, Any]) -> dict[str, str]:
    """Tensor to file, from an index. Raises ConfigError if the document is not an index."""
    match document:
        case {"weight_map": dict(places)} if all(isinstance(f, str) for f in places.values()):
            return places
    raise ConfigError(
        f"{INDEX} does not map tensors to files", allowed="weight_map, a table of file names"
    )


def vocabulary_of(document: Mapping[str, Any]) -> int:
    """Rows of the embedding. Raises ConfigError if config.json does not have them."""
    if not isinstance(size := document.get("vocab_size"), int) or size < 2:
        raise ConfigError(
            "config.json has no vocab_size", value=repr(size), allowed="an integer of at least 2"
        )
    return size


def end_of_text(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | int | None:
    """The token that ends a text, as text or id; None if neither file names a single one."""
    match tokenizer.get("eos_token"):
        case str(token) | {"content": str(token)}:
            return token
    return ids if isinstance(ids := config.get("eos_token_id"), int) else None
