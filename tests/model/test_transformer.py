"""Shapes, parameter count, gradients and caches of the decoder."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof.config import ModelConfig
from stackproof.contracts import kernel_reference as reference
from stackproof.contracts.conditions import ContractError
from stackproof.kernels import dispatch
from stackproof.model.attention import SoftmaxAttention
from stackproof.model.build import build_model, n_parameters
from stackproof.model.feed_forward import SwiGLU
from stackproof.model.forward_context import ForwardContext, KVCache
from stackproof.model.init import row_of
from stackproof.model.norm import RMSNorm
from stackproof.model.positions import Rotary, rotary_tables, rotate
from stackproof.model.transformer import document_starts
from stackproof.spec.errors import UsageError
from stackproof.spec.formulas import parameter_count

TINY = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=24,
    max_seq_len=20,
    dropout=0.1,
)


@st.composite
def model_configs(draw):
    kv = draw(st.sampled_from([1, 2, 3]))
    return ModelConfig(
        d_model=draw(st.integers(8, 24)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv * draw(st.integers(1, 3)),
        n_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 5)),
        d_ff=draw(st.integers(8, 40)),
        max_seq_len=draw(st.integers(4, 12)),
        tied_head=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(model_configs(), st.integers(2, 40), st.integers(1, 3), st.data())
def test_parameter_count_and_shapes_follow_from_the_configuration(cfg, vocab_size, rows, data):
    model = build_model(cfg, vocab_size, seed=1)
    assert n_parameters(model) == parameter_count(cfg.model_dump(), vocab_size)
    length = data.draw(st.integers(1, cfg.max_seq_len))
    logits = model(torch.zeros(rows, length, dtype=torch.int64))
    assert logits.shape == (rows, length, vocab_size) and logits.dtype == torch.float32


def test_seed_003_model_has_its_published_size():
    cfg = ModelConfig(
        d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=256, max_seq_len=512
    )
    assert parameter_count(cfg.model_dump(), 32_000) == 10_358_016


def test_a_tied_head_has_no_second_name_and_shares_storage():
    model = build_model(TINY, 30, seed=1)
    assert not any("head" in name for name in model.state_dict())
    assert model.head_weight.data_ptr() == model.embed.weight.data_ptr()
    untied = build_model(TINY.model_copy(update={"tied_head": False}), 30, seed=1)
    assert untied.head_weight is untied.head.weight


def test_one_seed_is_one_model_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    a, b, c = (build_model(TINY, 30, seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_the_table_names_every_parameter_and_nothing_else():
    model = build_model(TINY, 30, seed=1)
    for name, _ in model.named_parameters():
        law = "constant" if "norm" in name else "normal"
        value = (
            1.0
            if "norm" in name
            else TINY.init_std / (2 if name.endswith(("out.weight", "down.weight")) else 1)
        )
        assert row_of(TINY, name).law == law and row_of(TINY, name).value == pytest.approx(value)
    with pytest.raises(KeyError, match="no row"):
        row_of(TINY, "layers.0.attention.surprise")


def test_too_long_inputs_and_full_caches_are_refused():
    model = build_model(TINY, 30, seed=1)
    with pytest.raises(UsageError, match="exceeds the context"):
        model(torch.zeros(1, 21, dtype=torch.int64))
    cache = KVCache(TINY)
    model(torch.zeros(1, 20, dtype=torch.int64), cache)
    with pytest.raises(UsageError, match="context"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ContractError):
        build_model(TINY, 1, seed=1)


def test_cache_memory_is_the_share_of_key_value_heads():
    grouped = TINY.model_copy(update={"n_heads": 4, "n_kv_heads": 1})
    full = TINY.model_copy(update={"n_heads": 4, "n_kv_heads": 4})
    caches = KVCache(full), KVCache(grouped)
    for cfg, cache in zip((full, grouped), caches):
        build_model(cfg, 30, seed=1)(torch.zeros(1, 3, dtype=torch.int64), cache)
    # k,v · layers · heads · S · H · bytes
    assert caches[0].bytes() == 4 * caches[1].bytes() == 2 * 2 * 4 * 20 * 4 * 4


def test_every_parameter_gets_a_finite_gradient():
    model = build_model(TINY, 30, seed=1)
    model(torch.arange(20).view(1, -1)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), name


# --- layers against the slow reference ------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3), (4, 1)]),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(0, 99),
)
def test_attention_equals_the_reference(rows, heads, n_new, n_cached, seed):
    (n, k), s, draw = heads, n_new + n_cached, torch.Generator().manual_seed(seed)
    q, key, value = (
        torch.randn(rows, h, t, 4, generator=draw, dtype=torch.float64) * 3
        for h, t in ((n, n_new), (k, s), (k, s))
    )
    # float64, different summation order: measured worst case 4e-15 on values around 3
    torch.testing.assert_close(
        dispatch.attention(q, key, value), reference.attention(q, key, value), rtol=0, atol=1e-12
    )


def draw_starts(draw, rows, length):
    """First index of each token's document, for documents of random lengths."""
    return document_starts(torch.tensor([draw_documents(draw, length) for _ in range(rows)]))


def draw_documents(draw, length):
    """Ids of the documents in one row: every place may begin a document; ids may jump."""
    jumps = draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=length, max_size=length))
    return [sum(jumps[: t + 1]) for t in range(length)]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 1)]),
    st.integers(1, 9),
    st.integers(0, 99),
    st.data(),
)
def test_document_attention_equals_the_reference(heads, length, seed, data):
    (n, k), draw = heads, torch.Generator().manual_seed(seed)
    start = draw_starts(data.draw, 2, length)
    mask = dispatch.document_mask(start)
    assert torch.equal(mask, reference.visible(length, length, start, None))
    q, key, value = (
        torch.randn(2, h, length, 4, generator=draw, dtype=torch.float64) * 3 for h in (n, k, k)
    )
    expected = reference.attention(q, key, value, start_BS=start)
    # float64, different summation order: measured worst case 4e-15 on values around 3
    torch.testing.assert_close(
        dispatch.attention(q, key, value, mask_B1TS=mask), expected, rtol=0, atol=1e-12
    )


def test_one_document_is_plain_causal_attention():
    draw = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, h, 7, 4, generator=draw, dtype=torch.float64) for h in (4, 2, 2))
    mask = dispatch.document_mask(torch.zeros(2, 7, dtype=torch.int64))
    expected = reference.attention(q, k, v)
    for masked in (
        dispatch.attention(q, k, v, mask_B1TS=mask),
        reference.attention(q, k, v, mask_B1TS=mask),
    ):
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


def test_attention_gradient_equals_the_reference():
    draw = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(2, h, 6, 4, generator=draw, dtype=torch.float64, requires_grad=True)
        for h in (4, 2, 2)
    ]
    grads = [
        torch.autograd.grad(f(*inputs).pow(2).sum(), inputs)
        for f in (dispatch.attention, reference.attention)
    ]
    for fast, slow in zip(*grads):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)  # measured worst case 1e-14


@pytest.mark.parametrize("layer", ["attention", "swiglu", "rmsnorm"])
def test_gradients_equal_finite_differences_in_float64(layer):
    torch.manual_seed(0)
    module = {
        "attention": SoftmaxAttention(TINY, 0),
        "swiglu": SwiGLU(TINY),
        "rmsnorm": RMSNorm(16, 1e-6),
    }[layer].double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rotary = tuple(t.double() for t in rotary_tables(4, 3, 10_000.0))
    context = ForwardContext(torch.arange(3)[None], None, None, None, rotary, 3)
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters())

    def forward(x, *weights):
        extra = (context,) if layer == "attention" else ()
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, *extra))

    assert torch.autograd.gradcheck(forward, (x, *values), eps=1e-6, atol=1e-7, fast_mode=True)


def test_swiglu_and_norm_equal_the_reference():
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, 16, generator=draw, dtype=torch.float64) * 3
    norm, ffn = RMSNorm(16, 1e-6).double(), SwiGLU(TINY).double()
    with torch.no_grad():
        for p in ffn.parameters():
            p.normal_(generator=draw)
        norm.weight.normal_(generator=draw)
        expected = reference.swiglu(ffn.gate(x), ffn.up(x)) @ ffn.down.weight.T
        # measured worst case 3e-14
        torch.testing.assert_close(ffn(x), expected, rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(
            norm(x), reference.rms_norm(x, norm.weight, 1e-6), rtol=1e-13, atol=1e-12
        )


def test_norm_statistics_of_half_precision_are_float32():
    x = torch.full((1, 1, 4096), 300.0, dtype=torch.float16)  # 300² overflows float16
    norm = RMSNorm(4096, 1e-6)
    torch.nn.init.ones_(norm.weight)
    assert torch.equal(norm(x), torch.ones_like(x))


# --- packed documents -----------------------------------------------------------------------------


# measured worst cases 2e-16 and 1.2e-7
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
def test_a_packed_document_is_read_as_if_alone(dtype, atol, length, seed, data):
    model = build_model(TINY, 30, seed=seed).eval().to(dtype)
    documents = torch.tensor([draw_documents(data.draw, length) for _ in range(2)])
    ids = torch.randint(0, 30, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        packed = model(ids, document_ids_BT=documents)
        for row in range(2):
            for document in documents[row].unique():
                own = documents[row] == document
                torch.testing.assert_close(
                    packed[row, own], model(ids[row, own][None])[0], rtol=0, atol=atol
                )


def test_positions_restart_with_every_document():
    model, documents = (
        build_model(TINY, 30, seed=1),
        torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 9]]),
    )
    assert document_starts(documents).tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 5]]
    cos, sin = model.forward_context(documents, None, documents).rotary
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]])
    assert torch.equal(cos, model.positions.cos[positions][:, None]) and torch.equal(
        sin, model.positions.sin[positions][:, None]
    )


def test_plain_rows_take_the_plain_path_bit_for_bit(monkeypatch):
    model, ids = build_model(TINY, 30, seed=1).eval(), torch.arange(20).view(2, 10)
    x = model.embed(ids)
    for layer in model.layers:
        q, k, v = (
            layer.attention.heads(p(layer.attention_norm(x)))
            for p in (layer.attention.q, layer.attention.k, layer.attention.v)
        )
        q, k = (rotate(h, model.positions.cos[:10], model.positions.sin[:10]) for h in (q, k))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        x = x + layer.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + layer.ffn(layer.ffn_norm(x))
    monkeypatch.setattr(dispatch, "document_mask", None)
    assert torch.equal(model(ids), model.logits(model.final_norm(x))) and torch.equal(
        model(ids, document_ids_BT=None), model(ids)
    )


def test_mask_and_positions_are_made_once_per_forward(monkeypatch):
    model, documents, calls = build_model(TINY, 30, seed=1), torch.tensor([[0, 0, 1, 1]]), []
    monkeypatch.setattr(
        dispatch,
        "document_mask",
        lambda start: calls.append(1) or reference.visible(4, 4, start, None),
    )
    model(documents, document_ids_BT=documents)
    assert len(calls) == 1 < TINY.n_layers


def test_packed_rows_and_plain_rows_compile_without_a_graph_break():
    model, documents = build_model(TINY, 30, seed=1).eval(), torch.tensor([[0, 0, 1, 1, 2]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for packing in (None, documents):
        # a compiler gets bare formulas, whose sums round otherwise:
        # measured worst case 6e-8 on logits around 0.1
        torch.testing.assert_close(
            compiled(documents, document_ids_BT=packing),
            model(documents, document_ids_BT=packing),
            rtol=0,
            atol=1e-6,
        )


def test_packed_rows_refuse_a_cache_another_shape_and_too_many_tokens():
    model, documents = build_model(TINY, 30, seed=1), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UsageError, match="one document per row"):
        model(documents, KVCache(TINY), documents)
    with pytest.raises(UsageError, match="do not fit"):
        model(documents, document_ids_BT=documents[0])
    with pytest.raises(UsageError, match="exceeds the context"):
        model(torch.zeros(1, 21, dtype=torch.int64), document_ids_BT=torch.arange(21)[None])


# --- rotary positions -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 23), st.integers(0, 999))
def test_rotary_scores_depend_on_the_distance_only(m, n, shift, seed):
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=draw, dtype=torch.float64)
    cos, sin = (t.double() for t in rotary_tables(8, 64, 10_000.0))

    def score(i, j):
        return float(
            (
                rotate(q, cos[i : i + 1], sin[i : i + 1])
                * rotate(k, cos[j : j + 1], sin[j : j + 1])
            ).sum()
        )

    # float32 tables: each cosine is off by at most 3e-8; measured worst case 9e-7
    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=5e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 63), st.integers(0, 999))
def test_rotation_keeps_each_pairs_length(t, seed):
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_tables(8, 64, 10_000.0)
    y = rotate(x, cos[t : t + 1], sin[t : t + 1])
    torch.testing.assert_close(
        y[..., :4].hypot(y[..., 4:]), x[..., :4].hypot(x[..., 4:]), rtol=1e-6, atol=1e-6
    )


def test_rotary_tables_are_exact_to_float32_and_not_stored():
    cos, sin = rotary_tables(8, 5000, 10_000.0)
    for t, j in ((0, 0), (1, 3), (4999, 0), (4999, 2)):
        angle = t * 10_000.0 ** (-2 * j / 8)
        assert float(cos[t, j]) == pytest.approx(math.cos(angle), abs=6e-8)
        assert float(sin[t, j]) == pytest.approx(math.sin(angle), abs=6e-8)
    assert not Rotary(8, 16, 10_000.0).state_dict()


def test_dropout_acts_in_training_only():
    model, ids = build_model(TINY, 30, seed=1), torch.arange(20).view(1, -1)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_choices_are_json_ready():
    import json

    assert json.loads(json.dumps(dispatch.choices("cpu")))["attention"].endswith(
        "scaled_dot_product_attention"
    )
