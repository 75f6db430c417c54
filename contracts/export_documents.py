"""What the documents of an exported folder state of a model, for each architecture that the stack
writes. It shares no name with what writes them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stackproof.contracts.subject import Architecture, Exported
from stackproof.contracts.tokenizer import HARD_TEXTS

TOKENIZER = "tokenizer.json"
DOCUMENTS = ("config.json", "generation_config.json", TOKENIZER, "tokenizer_config.json")
NAMES = {"F32": "float32", "BF16": "bfloat16"}
ABSENT = "absent"
LLAMA_SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "init_std",
    "rope_theta": "rope_theta",
}
GPT2_SIZES = {
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_inner": "d_ff",
    "n_positions": "max_seq_len",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "init_std",
    "resid_pdrop": "dropout",
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor")

Settings = dict[str, Any]


def _rotary(a: Architecture) -> Settings:
    """Sizes and rotary frequencies of all architectures but the oldest."""
    stated = {theirs: a[ours] for theirs, ours in LLAMA_SIZES.items()} | {"hidden_act": "silu"}
    scaling = a["positions"].get("scaling", {"kind": "none"})
    if scaling["kind"] == "linear":
        stated["rope_scaling"] = {"rope_type": "linear", "factor": scaling["factor"]}
    if scaling["kind"] == "llama3":
        stated["rope_scaling"] = {
            "rope_type": "llama3",
            **{name: scaling[name] for name in SCALING},
            "original_max_position_embeddings": scaling["original_max_seq_len"],
        }
    return stated


def _llama(a: Architecture) -> Settings:
    return _rotary(a) | {"mlp_bias": False, "attention_bias": a["attention"]["qkv_bias"]}


def _qwen2(a: Architecture) -> Settings:
    if (window := a["attention"]["window"]) is None:
        return _rotary(a) | {"use_sliding_window": False}
    return _rotary(a) | {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * a["n_layers"],
    }


def _qwen3(a: Architecture) -> Settings:
    return _qwen2(a) | {"attention_bias": a["attention"]["qkv_bias"]}


def _mistral(a: Architecture) -> Settings:
    return _rotary(a) | {"sliding_window": a["attention"]["window"]}


def _mixtral(a: Architecture) -> Settings:
    experts = {"num_local_experts": a["ffn"]["n_experts"], "num_experts_per_tok": a["ffn"]["top_k"]}
    return _mistral(a) | experts


def _gpt2(a: Architecture) -> Settings:
    exact = a["ffn"]["approximate"] == "none"
    return {theirs: a[ours] for theirs, ours in GPT2_SIZES.items()} | {
        "activation_function": "gelu" if exact else "gelu_new",
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }


WRITTEN: Mapping[str, tuple[str, Callable[[Architecture], Settings]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "mistral": ("MistralForCausalLM", _mistral),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
}


def model_type(a: Architecture) -> str:
    """The first architecture, in the order of `WRITTEN`, that computes what a model computes."""
    attention = a["attention"]
    if a["positions"]["kind"] == "learned":
        return "gpt2"
    if a["ffn"]["kind"] == "moe":
        return "mixtral"
    if attention["qk_norm"]:
        return "qwen3"
    if attention["qkv_bias"] and not attention["out_bias"]:
        return "qwen2"
    uneven = a["d_model"] % a["n_heads"] != 0
    return "llama" if attention["window"] is None and not uneven else "mistral"


def config(a: Architecture, exported: Exported) -> Settings:
    """config.json."""
    kind = model_type(a)
    architecture, settings = WRITTEN[kind]
    return settings(a) | {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": exported.vocab_size,
        "bos_token_id": exported.eos_id,
        "eos_token_id": exported.eos_id,
        "torch_dtype": NAMES.get(exported.dtype),
    }


def wrong_settings(path: Path, exported: Exported) -> list[str]:
    """Settings of the documents that are not those of the model and its tokenizer, those that are
    left out, and those that no reader needs: many change what a reader does.
    """
    eos_id, length = exported.eos_id, exported.max_length
    end = next((piece for piece, i in exported.pieces.items() if i == eos_id), None)
    ends = {"bos_token_id": eos_id, "eos_token_id": eos_id}
    stated = {
        "config.json": config(exported.architecture, exported),
        "generation_config.json": ends | {"max_length": length},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
        },
    }
    wrong = []
    for name, truth in stated.items():
        found = json.loads((path / name).read_bytes())
        for key in sorted(found.keys() | truth.keys()):
            pair = found.get(key, ABSENT), truth.get(key, ABSENT)
            if pair[0] != pair[1] or isinstance(pair[0], bool) != isinstance(pair[1], bool):
                wrong.append(f"{name}: {key} is {pair[0]}, not {pair[1]}")
    return wrong + [f"{TOKENIZER}: {fault}" for fault in _wrong_tokenizer(path, exported)]


def _wrong_tokenizer(path: Path, exported: Exported) -> Iterator[str]:
    """How the written tokenizer and that of the run differ, read by the library itself."""
    from tokenizers import Tokenizer

    document = json.loads((path / TOKENIZER).read_bytes())
    for name in ("truncation", "padding"):
        if document.get(name) is not None:
            yield f"{name} is {document[name]}, not None"
    added = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    if exported.eos_id not in added.values():
        yield f"id {exported.eos_id}, which ends a text, is no added token"
    written, own = Tokenizer.from_file(str(path / TOKENIZER)), exported.tokenizer
    found = written.get_vocab(with_added_tokens=True)
    if other := sorted(
        piece
        for piece in found.keys() | exported.pieces.keys()
        if found.get(piece) != exported.pieces.get(piece)
    ):
        shown = f"{other[0]!r} is {found.get(other[0])}, not {exported.pieces.get(other[0])}"
        yield f"{len(other)} tokens have another id, first {shown}"
    written.encode_special_tokens = True
    written.no_truncation()
    written.no_padding()
    # Each piece by itself uses its merges.
    texts = [*HARD_TEXTS, *(own.decode([i]) for i in range(exported.vocab_size))]
    theirs = written.encode_batch(texts, add_special_tokens=False)
    pairs = zip(texts, (e.ids for e in theirs), (e.ids for e in own.encode_batch(texts)))
    if other_texts := [text for text, there, here in pairs if list(there) != list(here)]:
        yield f"{len(other_texts)} texts have other ids, first {other_texts[0][:40]!r}"
    if (document_of_run := exported.tokenizer_document) is not None:
        keys = sorted(document.keys() | document_of_run.keys())
        for key in keys:
            if document.get(key) != document_of_run.get(key):
                yield f"{key} is not that of the run's tokenizer"
