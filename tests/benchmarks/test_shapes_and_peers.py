"""Shapes, the corpus of random tokens, and the plain GPT-2 style model
against torch's own layers.
"""

import json

import nanogpt
import pytest
import torch
import torch.nn.functional as F
from shapes import SHAPES, Shape, words_of, write_corpus
from torch import nn

from stackproof.config import load_config
from stackproof.data.tokenizer import load_tokenizer
from stackproof.model.build import build_model
from stackproof.recipes import recipe
from stackproof.spec.formulas import flops_per_token


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_what_our_configuration_becomes(name):
    shape = SHAPES[name]
    cfg, _ = load_config(recipe("tiny"), sets=shape.sets())
    model = cfg.model
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (
        shape.n_layers,
        shape.d_model,
        shape.n_heads,
        shape.n_kv_heads,
    )
    assert (
        model.d_ff == shape.d_ff
        and model.head_dim * model.n_heads == model.d_model
        and model.tied_head == shape.tied_head
    )
    assert cfg.train.tokens_per_step == shape.tokens_per_step and cfg.accumulation() == 1


def test_operations_are_counted_as_the_spec_counts_them():
    shape = SHAPES["a"]
    cfg, _ = load_config(recipe("tiny"), sets=shape.sets())
    matrices = sum(
        p.numel()
        for p in build_model(cfg.model, shape.vocab_size, seed=1).parameters()
        if p.ndim == 2
    )
    expected = shape.tokens_per_step * flops_per_token(
        cfg.model.model_dump(), shape.vocab_size, shape.seq_len
    )
    assert shape.flops_per_step(matrices) == expected


def test_every_word_of_the_corpus_is_one_token(tmp_path):
    sets = write_corpus(tmp_path, 512, 1000)
    assert len(sets) == 5
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 512
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()
    ]
    ids = tokenizer.encode(texts[0]).ids
    assert tokenizer.decode(ids) == texts[0]
    n_words, n_line_ends = len(texts[0].split()), texts[0].count("\n")
    assert len(ids) == n_words + n_line_ends
    assert len(set(ids)) > 200


def test_words_come_with_all_their_beginnings():
    words = words_of(1000)
    assert len(set(words)) == 1000 and words[:2] == ["a", "b"] and words[26:28] == ["aa", "ab"]
    assert all(w[:-1] in words for w in words if len(w) > 1)


def torch_layer(block: nanogpt.Block, d_model: int, n_heads: int) -> nn.TransformerEncoderLayer:
    """torch's own pre-norm layer with the weights of a block."""
    layer = nn.TransformerEncoderLayer(
        d_model, n_heads, 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
    ).double()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.out_proj.weight.copy_(block.mixed.weight)
        layer.linear1.weight.copy_(block.up.weight)
        layer.linear2.weight.copy_(block.down.weight)
        layer.norm1.weight.copy_(block.norm_1.weight)
        layer.norm2.weight.copy_(block.norm_2.weight)
    return layer


def test_the_plain_model_equals_torchs_own_layers():
    torch.manual_seed(0)
    model = nanogpt.NanoGPT(n_layers=2, d_model=16, n_heads=4, seq_len=9, vocab_size=30).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids_BT = torch.randint(30, (3, 9))
    x_BTC = F.embedding(ids_BT, model.tokens.weight) + model.positions.weight
    for block in model.blocks:
        x_BTC = torch_layer(block, 16, 4)(
            x_BTC, src_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
        )
    expected_BTV = F.layer_norm(x_BTC, (16,), model.norm.weight) @ model.tokens.weight.T
    # float64 throughout; measured worst 2e-15 on logits up to 3.7.
    torch.testing.assert_close(model(ids_BT), expected_BTV, rtol=0, atol=1e-12)


def test_the_plain_model_counts_its_matrices_and_generates_the_likeliest():
    torch.manual_seed(0)
    model = nanogpt.NanoGPT(n_layers=2, d_model=16, n_heads=4, seq_len=8, vocab_size=30)
    assert model.matrix_parameters() == 30 * 16 + 2 * (3 + 1 + 4 + 4) * 16 * 16
    tokens = [3]
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert nanogpt.generate(model, [3], 10) == tokens[1:]


def test_a_shape_counts_attention_once_for_half_of_all_pairs():
    shape = Shape(2, 16, 4, 4, 32, seq_len=10, vocab_size=50, rows=3, fresh=False)
    # tokens · (forward + backward) of two products · layers · mean keys · width
    attention = 3 * 10 * (3 * 2 * 2) * 2 * (10 / 2) * 16
    assert shape.flops_per_step(0) == attention
    assert shape.flops_per_step(7) - shape.flops_per_step(0) == 6 * 7 * 30


@pytest.mark.parametrize("tied", [True, False])
def test_a_matrix_counts_if_it_is_multiplied_by(tied):
    from peers import matrix_parameters

    shape = Shape(2, 16, 2, 2, 24, 8, 40, 1, fresh=False, tied_head=tied)
    cfg, _ = load_config(recipe("tiny"), sets=shape.sets())
    model = build_model(cfg.model, shape.vocab_size, seed=1)
    layer = 4 * 16 * 16 + 3 * 16 * 24
    assert matrix_parameters(model) == 2 * layer + 40 * 16
