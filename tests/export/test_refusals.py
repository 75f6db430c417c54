"""What cannot be said or read is refused by name, and nothing is left behind."""

import json
import struct

import pytest
import torch

from stackproof import tensorfile
from stackproof.config import (
    BiasBalance,
    DifferentialAttention,
    Gelu,
    HardCapacity,
    LayerNorm,
    LearnedPositions,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    SoftmaxAttention,
)
from stackproof.export import reading
from stackproof.model import hugging_face
from stackproof.spec.errors import CheckpointError, ConfigError, EnvironmentUnfit, UsageError
from tests.export import models

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
    "hidden_act": "silu",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
}
GPT2 |= {"n_positions": 40}


def read(document):
    return hugging_face.kind_of(document).read(document)


@pytest.mark.parametrize("document", [LLAMA, QWEN2, MIXTRAL, GPT2])
def test_the_plain_documents_are_read(document):
    assert isinstance(read(document)[0], ModelConfig)


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        (
            LLAMA,
            {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
            "architecture cannot be read",
        ),
        (LLAMA, {"architectures": None}, "architecture cannot be read"),
        (LLAMA, {"model_type": "mistral"}, "contradicts itself"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "no factor"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
            "beta_fast",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_theta": 1e4},
            "rope_theta",
        ),
        (
            LLAMA,
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "contradict each other",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"logit_scale": 0.5}, "logit_scale"),
        (LLAMA, {"sliding_window": 7}, "sliding_window"),
        (LLAMA, {"num_key_value_heads": 3}, "must divide"),
        (LLAMA, {"hidden_size": 50, "head_dim": 12}, "must be a multiple"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers"),
        (LLAMA, {"num_attention_heads": 0}, "no heads"),
        (QWEN2, {"attention_bias": True}, "attention_bias"),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            "layer_types",
        ),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"]},
            "layer_types",
        ),
        (MIXTRAL, {"num_experts_per_tok": 1}, "top_k = 1"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "relu"}, "activation_function"),
    ],
)
def test_a_configuration_that_cannot_be_computed_is_refused_by_key(base, change, says):
    with pytest.raises(ConfigError, match=says):
        read(base | change)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "max_position_embeddings", "intermediate_size"]
)
def test_a_size_that_is_not_there_is_not_guessed(key):
    with pytest.raises(ConfigError, match=f"no {key}"):
        read({k: v for k, v in LLAMA.items() if k != key})


def test_keys_of_training_are_left_aside_and_said():
    _, aside = read(GPT2 | {"attn_pdrop": 0.1, "embd_pdrop": 0.0, "n_ctx": 40})
    assert aside == ["attn_pdrop = 0.1"]


LEARNED = {
    "positions": LearnedPositions(),
    "norm": LayerNorm(),
    "n_kv_heads": 4,
    "attention": models.ALL_BIASES,
    "ffn": Gelu(),
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": DifferentialAttention()}, "model.attention.kind = differential"),
        (
            {"attention": DifferentialAttention(form="scalar")},
            "model.attention.kind = differential",
        ),
        ({"depth": MixtureOfDepths()}, "model.depth.kind = mixture-of-depths"),
        ({"depth": MixtureOfDepths(gate=HardCapacity())}, "model.depth.kind = mixture-of-depths"),
        ({"ffn": MixtureOfExperts(top_k=1)}, "model.ffn.top_k = 1"),
        ({"ffn": MixtureOfExperts(expert=Gelu())}, "model.ffn.expert.kind = gelu"),
        (
            {"ffn": MixtureOfExperts(balance=BiasBalance())},
            "model.ffn.balance.kind = selection-bias",
        ),
        (
            {"ffn": MixtureOfExperts(), "attention": SoftmaxAttention(qk_norm=True)},
            "model.attention.qk_norm",
        ),
        ({"attention": SoftmaxAttention(out_bias=True)}, "model.attention.out_bias = True"),
        (
            {"attention": SoftmaxAttention(qk_norm=True, qkv_bias=True)},
            "model.attention.out_bias = False",
        ),
        ({"ffn": Gelu()}, "model.ffn.kind = gelu"),
        ({"norm": LayerNorm()}, "model.norm.kind = layernorm"),
        (
            LEARNED | {"attention": SoftmaxAttention(qkv_bias=True, out_bias=True, window=4)},
            "model.attention.window = 4",
        ),
        (LEARNED | {"ffn": Gelu(bias=False)}, "model.ffn.bias = False"),
        (LEARNED | {"n_kv_heads": 2}, "model.n_kv_heads = 2"),
        (LEARNED | {"head_dim": 16}, "model.head_dim = 16"),
    ],
)
def test_a_model_that_no_kind_says_is_refused_by_key_naming_all_kinds(change, says):
    with pytest.raises(ConfigError) as refused:
        hugging_face.kind_for(ModelConfig(**(models.BASE | change)))
    assert says in str(refused.value) and all(
        k.architecture in str(refused.value.value) for k in hugging_face.KINDS
    )


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"ffn": MixtureOfExperts(capacity_factor=1.5)}, "capacity"),
    ],
)
def test_what_acts_in_training_only_leaves_unsaid_but_is_told(change, left):
    from stackproof.export.card import training_only

    cfg = ModelConfig(**(models.BASE | change))
    assert hugging_face.kind_for(cfg) and left in " ".join(training_only(cfg))


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(exported):
    return exported(models.ours("plain", 257))[0]


def tensors_of(folder):
    path = folder / "model.safetensors"
    return {
        n: torch.from_numpy(tensorfile.memmap(path, n).copy())
        for n in tensorfile.read_header(path).tensors
    }


def rewrite(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    tensorfile.write(folder / "model.safetensors", tensors, {})


def load(folder):
    return reading.load_weights(reading.open_folder(folder))


EMBED, NORM, Q = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(Q), f"lacks {Q}"),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(48)}),
            "model.layers.2.input_layernorm.weight",
        ),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(48)}), "q_proj.bias"),
        (lambda t: t.update({NORM: torch.ones(47)}), f"shape of tensor {NORM} contradicts"),
        (lambda t: t.update({NORM: torch.full((48,), float("nan"))}), "not finite"),
        (lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)}), "I8"),
        (lambda t: t.update({f"module.{NORM}": torch.ones(48)}), "twice"),
        (lambda t: t.update({"lm_head.weight": t[EMBED] * 1.01}), "two different tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_an_untied_model_without_its_head_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name_with_the_way_out(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match="pickles") as refused:
        load(folder)
    assert name in str(refused.value) and "save_pretrained" in str(refused.value)


def test_a_pickle_with_the_right_name_is_refused(folder):
    torch.save({"w": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)


def test_damaged_and_absent_files_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


@pytest.fixture
def shards(exported):
    return exported(models.ours("plain", 257), max_shard_bytes=30_000)[0]


def edit_index(shards, change):
    index = json.loads((shards / hugging_face.INDEX).read_text())
    change(index["weight_map"])
    (shards / hugging_face.INDEX).write_text(json.dumps(index))


def test_an_index_that_disagrees_with_its_files_is_refused(shards):
    whole = (shards / hugging_face.INDEX).read_text()
    edit_index(shards, lambda m: m.pop(NORM))
    with pytest.raises(CheckpointError, match=f"disagree on {NORM}"):
        load(shards)
    edit_index(shards, lambda m: m.update({NORM: "../model.safetensors"}))
    with pytest.raises(CheckpointError, match=r"lists \.\./model"):
        load(shards)
    (shards / hugging_face.INDEX).write_text("{}")
    with pytest.raises(ConfigError, match="does not map tensors to files"):
        load(shards)
    (shards / hugging_face.INDEX).write_text(whole)
    sorted(shards.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        load(shards)


def test_one_file_beside_an_index_is_refused(shards):
    (shards / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(CheckpointError, match="single weight file and an index"):
        load(shards)


@pytest.mark.parametrize(("name", "length"), [("plain", 41), ("plain", 1), ("gpt2", 16)])
def test_a_context_that_cannot_be_cut_is_refused(exported, name, length):
    folder, _ = exported(models.ours(name, 257))
    with pytest.raises(ConfigError, match="cannot be reduced"):
        reading.open_folder(folder, max_seq_len=length)


def test_an_occupied_place_is_refused_and_kept(exported, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    for place in (tmp_path / "kept", tmp_path / "kept" / "thesis.txt"):
        with pytest.raises(UsageError, match="not an empty folder"):
            exported(models.ours("plain", 257), place)
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "mine"


def test_an_export_that_breaks_leaves_nothing(exported, tmp_path, monkeypatch):
    import os

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentUnfit, match="No space left"):
        exported(models.ours("plain", 257), tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_no_other_file_of_the_stack_holds_names_of_hugging_face():
    from pathlib import Path

    words = (
        "hidden_size num_attention_heads self_attn q_proj lm_head n_embd c_attn block_sparse_moe "
        "wte rope_scaling weight_map"
    ).split()
    root = Path(hugging_face.__file__).parents[1]
    held = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if any(w in p.read_text("utf-8") for w in words)
    }
    assert held == {"model/hugging_face.py"}


def test_an_unsupported_model_is_refused_with_the_nearest_architecture():
    """GPT-2 has no rotary positions, Qwen3 normalises queries and keys: a model with both is
    nearest to the one that lacks less.
    """
    llama = ModelConfig(
        d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_seq_len=16
    )
    assert hugging_face.kind_for(llama).architecture == "LlamaForCausalLM"
    gated = llama.model_copy(update={"depth": MixtureOfDepths()})
    with pytest.raises(ConfigError) as caught:
        hugging_face.kind_for(gated)
    nearest = caught.value.what.partition("; ")[2].partition(" ")[0]
    lacks = {
        part.partition(" does not support ")[0]: part.partition(" does not support ")[2]
        for part in caught.value.value.split("; ")
    }
    assert (
        set(lacks) == {k.architecture for k in hugging_face.KINDS}
        and lacks[nearest] in caught.value.what
    )
    assert len(lacks[nearest].split(", ")) == min(
        len(v.split(", ")) for k, v in lacks.items() if "config.json" not in v
    )


@pytest.mark.parametrize("key", ["hidden_size", "rope_scaling", "architectures", "head_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "x", True, [[1]], {"a": []}])
def test_a_value_of_another_type_is_refused_by_class(key, value):
    with pytest.raises(ConfigError):
        read(LLAMA | {key: value})


def test_sizes_that_no_file_holds_are_refused_before_anything_is_built():
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "max_position_embeddings"):
        with pytest.raises(ConfigError, match="less than or equal"):
            read(LLAMA | {key: 10**9} | ({"head_dim": 8} if key == "hidden_size" else {}))
