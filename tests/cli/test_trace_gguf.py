"""`stack trace` on a .gguf file: exact weights compute what the folder computes,
quantised ones are told from them.
"""

import numpy as np
import pytest
import torch

from stackproof.export import parity
from tests.export.models import stirred

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SHORT = ("--input-ids", "5,80,3,9,77,42,11,6,20,33")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 40,
        "initializer_range": 0.12,
        "rms_norm_eps": 1e-5,
    }
    return stirred(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))


def pairs_apart(weight, n_heads):
    """The order of rows in which llama.cpp keeps queries and keys:
    both halves of a head interleaved.
    """
    return (
        weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1)
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write(path, model, quantisation=None):
    """A .gguf file as converters write it."""
    c, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if name not in NAMES:
            _, layer, rest = name.split(".", 2)
            base, _, kind = rest.rpartition(".")
            name, array = f"blk.{layer}.{OF_LAYERS[base]}.{kind}", tensor.numpy()
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(
                OF_LAYERS[base]
            )
            array = pairs_apart(array, heads) if heads else array
        else:
            name, array = NAMES[name], tensor.numpy()
        array = np.ascontiguousarray(array)
        if quantisation is not None and array.ndim == 2:
            writer.add_tensor(
                name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation
            )
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def stack(in_process):
    return in_process


def test_exact_weights_compute_the_same_to_the_bit(stack, model, tmp_path):
    file = write(tmp_path / "exact.gguf", model)
    model.save_pretrained(tmp_path / "folder")
    code, document = stack("trace", file, "--against", tmp_path / "folder", *SHORT)
    assert code == 0 and document["logits"]["rel_err"] == 0 and document["first_divergence"] is None
    code, document = stack("trace", file, *SHORT)
    assert (
        code == 0
        and len(document["points"]) == 39
        and document["architecture"] == "LlamaForCausalLM"
    )


def test_quantised_weights_are_dequantised_and_told_from_exact_ones(stack, model, tmp_path):
    """8 bits: errors of half a percent are made at every matrix,
    and at none of the points between them.
    """
    file = write(tmp_path / "small.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    model.save_pretrained(tmp_path / "folder")
    code, document = stack("trace", file, "--against", tmp_path / "folder", *SHORT)
    assert (
        code == 0
        and 1e-3 < document["logits"]["rel_err"] < 0.05
        and document["first_divergence"]["point"] == "embedding"
    )
    matrices = {
        "embedding",
        "q",
        "k",
        "v",
        "attention_out",
        "ffn.gate",
        "ffn.up",
        "ffn.out",
        "logits",
    }
    suspects = {p["slot"] for p in document["points"] if p["excess"] > 1}
    assert suspects == matrices


def test_a_text_needs_a_tokenizer_beside_it(stack, model, tmp_path):
    code, document = stack("trace", write(tmp_path / "exact.gguf", model), "--prompt", "hello")
    assert code == 2 and "--input-ids" in document["next_step"]


def test_without_the_library_the_line_to_install_it_is_said(stack, model, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "reads_gguf", lambda: False)
    code, document = stack("trace", write(tmp_path / "exact.gguf", model), *SHORT)
    assert code == 7 and "stackproof[gguf]" in document["next_step"]


def test_a_file_that_is_no_gguf_is_refused(stack, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    assert stack("trace", "bad.gguf", *SHORT)[0] == 5
    assert stack("trace", "none.gguf", *SHORT)[0] == 2
