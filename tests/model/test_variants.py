"""Every choice of architecture, alone and combined: gradients, caches, packed rows, and what each
variant is by definition.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stackproof.config import (
    AuxiliaryLoss,
    BiasBalance,
    DifferentialAttention,
    FullDepth,
    Gelu,
    HardCapacity,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    RmsNorm,
    RotaryPositions,
    SoftGate,
    SoftmaxAttention,
    SwiGLU,
)
from stackproof.model import moe
from stackproof.model.build import build_model, n_parameters
from stackproof.model.forward_context import KVCache
from stackproof.model.positions import frequencies
from stackproof.model.transformer import Block
from stackproof.spec.formulas import flops_per_token, parameter_count

SIZES = dict(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_seq_len=36)
ATTENTIONS = [
    SoftmaxAttention(),
    SoftmaxAttention(qk_norm=True, qkv_bias=True, out_bias=True, window=7),
    DifferentialAttention(window=5),
    DifferentialAttention(form="scalar", qk_norm=True),
]
FFNS = [
    SwiGLU(),
    Gelu(),
    MixtureOfExperts(n_experts=4),
    MixtureOfExperts(
        n_experts=3, top_k=1, balance=BiasBalance(), expert=Gelu(bias=False), capacity_factor=1.0
    ),
]
DEPTHS = [
    FullDepth(),
    MixtureOfDepths(),
    MixtureOfDepths(gate=HardCapacity(capacity_frac=0.4), every=2),
]
POSITIONS = [
    RotaryPositions(),
    LearnedPositions(),
    RotaryPositions(scaling=Llama3Scaling(original_max_seq_len=16)),
]


@st.composite
def combinations(draw):
    pick = lambda options: draw(st.sampled_from(options))  # noqa: E731
    return ModelConfig(
        **SIZES,
        attention=pick(ATTENTIONS),
        ffn=pick(FFNS),
        depth=pick(DEPTHS),
        positions=pick(POSITIONS),
        norm=pick([RmsNorm(), LayerNorm()]),
        tied_head=pick([True, False]),
    )


def wide(cfg, seed=1, spread=5.0):
    """A float64 model whose choices are no near ties: rounding cannot send a token elsewhere."""
    model = build_model(cfg, 50, seed=seed).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.mul_(spread)
    return model


def draw_ids(rows, length, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- all combinations -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(combinations())
def test_every_parameter_gets_a_gradient_and_is_counted(cfg):
    model = build_model(cfg, 50, seed=1)
    assert n_parameters(model) == parameter_count(cfg.model_dump(), 50)
    x_BTD, report = model.hidden_states(draw_ids(4, 33))
    (
        model.logits(x_BTD).logsumexp(-1).sum() + sum(load.balance_sum for load in report.loads)
    ).backward()
    silent = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    assert not silent


@settings(max_examples=30, deadline=None)
@given(combinations(), st.integers(1, 32), st.integers(0, 99))
def test_a_cache_changes_nothing(cfg, first, seed):
    model, ids = wide(cfg, seed).eval(), draw_ids(2, 33, seed)
    cache = KVCache(cfg, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(ids[:, :first], cache)] + [
            model(ids[:, t : t + 1], cache) for t in range(first, 33)
        ]
        # float64 in another order of sums: measured worst case 7e-15
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(combinations(), st.integers(0, 99))
def test_packed_documents_are_read_as_if_alone(cfg, seed):
    model, ids = wide(cfg, seed).eval(), draw_ids(2, 33, seed)
    documents = torch.tensor([[0] * 1 + [1] * 20 + [2] * 12, [5] * 16 + [6] * 16 + [7]])
    with torch.no_grad():
        packed = model(ids, document_ids_BT=documents)
        for row in range(2):
            for document in documents[row].unique():
                own = documents[row] == document
                # measured 8e-15
                torch.testing.assert_close(
                    packed[row, own], model(ids[row, own][None])[0], rtol=0, atol=1e-11
                )


@settings(max_examples=30, deadline=None)
@given(combinations(), st.integers(1, 31), st.booleans())
def test_no_token_sees_a_later_one_and_no_row_another(cfg, position, training):
    model, ids = wide(cfg).train(training), draw_ids(2, 32)
    other = ids.clone()
    other[0, position:] = (other[0, position:] + 7) % 50
    with torch.no_grad():
        before, after = model(ids), model(other)
    torch.testing.assert_close(after[0, :position], before[0, :position], rtol=0, atol=1e-11)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-11)
    assert not torch.equal(after[0, position], before[0, position])


def test_operations_follow_the_share_of_the_model_that_a_token_meets():
    dense = ModelConfig(**SIZES)
    sparse = dense.model_copy(update={"ffn": MixtureOfExperts(n_experts=8, top_k=2)})
    gated = dense.model_copy(
        update={"depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5))}
    )
    count = lambda cfg: flops_per_token(cfg.model_dump(), 50, 32)  # noqa: E731
    # one more expert and the router, three layers
    assert count(sparse) - count(dense) == 6 * 3 * (3 * 32 * 40 + 8 * 32)
    head = 6 * 50 * 32
    router = 6 * 3 * 32 // 2
    attention = 12 * 3 * 32 * 32 // 2
    # half the tokens meet the matrices; half the queries see half the keys
    assert count(gated) - head - router == (count(dense) - head - attention) // 2 + attention // 4


# --- attention ------------------------------------------------------------------------------------


def test_scalar_lambda_of_zero_is_attention_on_the_first_halves():
    cfg = ModelConfig(
        **SIZES, attention=DifferentialAttention(form="scalar"), positions=LearnedPositions()
    )
    model = build_model(cfg, 50, seed=1).double()
    attention = model.layers[0].attention
    with torch.no_grad():
        attention.lambda_weight.zero_()
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (attention.heads(p(x)) for p in (attention.q, attention.k, attention.v))
    first = torch.nn.functional.scaled_dot_product_attention(
        q[..., :4], k[..., :4], v, is_causal=True, enable_gqa=True
    )
    expected = attention.out(first.transpose(1, 2).flatten(2))
    context = model.forward_context(torch.zeros(2, 9, dtype=torch.int64))
    # measured 3e-17
    torch.testing.assert_close(attention(x, context), expected, rtol=0, atol=1e-14)


def test_lambda_starts_as_the_paper_has_it_and_the_second_map_is_subtracted():
    model = build_model(ModelConfig(**SIZES, attention=DifferentialAttention()), 50, seed=1)
    for layer, block in enumerate(model.layers):
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        assert block.attention.lambda_init == pytest.approx(start, abs=1e-12)
        # vectors of four entries at spread 0.1
        assert float(block.attention.lambda_().detach()) == pytest.approx(start, abs=0.2)
    scalar = (
        build_model(
            ModelConfig(**SIZES, attention=DifferentialAttention(form="scalar")), 50, seed=1
        )
        .layers[0]
        .attention
    )
    with torch.no_grad():
        # both maps are uniform, so the difference is (1 − λ) times one of them
        scalar.k.weight.zero_()
        x, context = (
            torch.randn(1, 5, 32),
            model.forward_context(torch.zeros(1, 5, dtype=torch.int64)),
        )
        half = scalar(x, context)
        scalar.lambda_weight.zero_()
        torch.testing.assert_close(2 * half, scalar(x, context), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 33, SIZES["max_seq_len"]])
def test_a_window_is_that_many_keys(window):
    cfg = ModelConfig(**SIZES, attention=SoftmaxAttention(window=window))
    model, ids = build_model(cfg, 50, seed=1).double().eval(), draw_ids(1, 33)
    one_layer = lambda ids: model.layers[0].attention(model.embed(ids), model.forward_context(ids))  # noqa: E731
    with torch.no_grad():
        before = one_layer(ids)
        for t in range(33):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % 50
            changed = (one_layer(other) - before).abs().amax(-1)[0].nonzero()[:, 0].tolist()
            assert changed == list(range(t, min(33, t + window)))


def test_a_window_wider_than_the_context_is_refused_by_both_keys():
    length = SIZES["max_seq_len"]
    assert (
        ModelConfig(**SIZES, attention=SoftmaxAttention(window=length)).attention.window == length
    )
    for kind in (SoftmaxAttention, DifferentialAttention):
        with pytest.raises(
            ValueError,
            match=(
                rf"model\.attention\.window \({length + 1}\) is above model\.max_seq_len "
                rf"\({length}\)"
            ),
        ):
            ModelConfig(**SIZES, attention=kind(window=length + 1))


def test_scaled_frequencies():
    plain = frequencies(64, 500_000.0, RotaryPositions().scaling)
    assert torch.equal(frequencies(64, 500_000.0, LinearScaling(factor=4)), plain / 4)
    scaled = frequencies(64, 500_000.0, Llama3Scaling())
    waves = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[waves >= 4], plain[waves >= 4]) and torch.allclose(
        scaled[waves <= 1], plain[waves <= 1] / 8, rtol=1e-15
    )
    between = (waves > 1) & (waves < 4)
    assert between.any() and bool(
        (scaled < plain)[between].all() and (scaled > plain / 8)[between].all()
    )


# --- experts --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(3, 6), st.integers(1, 24), st.integers(0, 99))
def test_sparse_dispatch_equals_every_expert_on_every_token(top_k, n_experts, n_tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 8, generator=draw, dtype=torch.float64)
    experts = [torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(n_experts)]
    chosen, weights, probs = moe.route(
        torch.randn(n_tokens, n_experts, generator=draw, dtype=torch.float64), top_k
    )
    y, load, dropped = moe.dispatch(x, chosen, weights, experts)
    dense = torch.stack([e(x) for e in experts], 1)
    share = torch.zeros(n_tokens, n_experts, dtype=torch.float64).scatter_add(1, chosen, weights)
    # measured 4e-16
    torch.testing.assert_close(y, (share[..., None] * dense).sum(1), rtol=0, atol=1e-13)
    assert load.sum() == n_tokens * top_k and dropped == 0
    if top_k > 1:
        torch.testing.assert_close(
            weights.sum(1), torch.ones(n_tokens, dtype=torch.float64), rtol=0, atol=1e-15
        )
    else:
        assert torch.equal(weights[:, 0], probs.max(1).values)
    assert torch.equal(chosen, probs.argsort(dim=1, descending=True, stable=True)[:, :top_k])


def test_an_expert_beyond_capacity_drops_later_tokens_of_the_row():
    x, row = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1])
    chosen = torch.tensor([[0], [1], [0], [0], [0], [1]])
    double = [lambda t: 2 * t, lambda t: 3 * t]
    y, load, dropped = moe.dispatch(
        x, chosen, torch.ones(6, 1, dtype=torch.float64), double, capacity=2, row_R=row
    )
    assert y.diagonal().tolist() == [2, 3, 2, 0, 2, 3]
    assert load.tolist() == [3, 2] and int(dropped) == 1


def test_balance_is_one_when_even_and_does_not_depend_on_how_rows_are_cut():
    chosen = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    assert float(moe.balance(torch.full((4, 4), 0.25), chosen)) == 1.0
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 4)
    assert float(moe.balance(probs, torch.zeros(4, 1, dtype=torch.int64))) == pytest.approx(4 * 0.7)
    draw = torch.Generator().manual_seed(3)
    logits, row = (
        torch.randn(12, 4, generator=draw, dtype=torch.float64),
        torch.tensor([0] * 5 + [1] * 4 + [2] * 3),
    )
    chosen, _, probs = moe.route(logits, 2)
    parts = sum(
        moe.balance(probs[row == b], chosen[row == b]) * int((row == b).sum()) for b in range(3)
    )
    assert float(moe.balance(probs, chosen, row) * 12) == pytest.approx(float(parts), rel=1e-14)


def test_selection_bias_chooses_but_never_weighs_and_moves_against_the_load():
    cfg = ModelConfig(
        **SIZES, ffn=MixtureOfExperts(n_experts=4, top_k=2, balance=BiasBalance(rate=0.1))
    )
    logits, bias = torch.zeros(3, 4), torch.tensor([0.0, 0.0, 0.0, 1.0])
    chosen, weights, _ = moe.route(logits, 2, bias)
    assert chosen.tolist() == [[3, 0]] * 3 and torch.equal(weights, torch.full((3, 2), 0.5))
    model = build_model(cfg, 50, seed=1)
    moe.update_selection_bias(model, [torch.tensor([4, 2, 2, 0])] * 3, 0.1)
    assert model.layers[1].ffn.selection_bias.tolist() == pytest.approx([-0.1, 0.0, 0.0, 0.1])
    assert (
        not any("selection_bias" in n for n, _ in model.named_parameters())
        and "layers.2.ffn.selection_bias" in model.state_dict()
    )
    assert (
        build_model(
            cfg.model_copy(update={"ffn": MixtureOfExperts(balance=AuxiliaryLoss(weight=0.5))}),
            50,
            seed=1,
        ).balance_weight
        == 0.5
    )


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias, expected", [(40.0, "block"), (-800.0, "identity")])
def test_a_soft_gate_wide_open_is_the_block_and_shut_is_nothing(bias, expected):
    model = build_model(ModelConfig(**SIZES, depth=MixtureOfDepths()), 50, seed=1).double()
    block, x = model.layers[0], torch.randn(2, 9, 32, dtype=torch.float64)
    context = model.forward_context(torch.zeros(2, 9, dtype=torch.int64))
    with torch.no_grad():
        block.depth.router.weight.zero_()
        block.depth.router.bias.fill_(bias)
        whole = x if expected == "identity" else Block.forward(block, x, context)
        torch.testing.assert_close(block(x, context), whole, rtol=0, atol=1e-14)


def test_gates_sit_on_every_nth_block_and_start_half_open():
    model = build_model(
        ModelConfig(**SIZES, depth=MixtureOfDepths(gate=SoftGate(), every=2)), 50, seed=1
    )
    assert [hasattr(b, "depth") for b in model.layers] == [False, True, False]
    assert float(model.layers[1].depth.router(torch.zeros(32)).detach().sigmoid()) == 0.5


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(1, 36), st.integers(0, 99))
def test_hard_capacity_reads_the_highest_scores_so_far(share, length, seed):
    cfg = ModelConfig(**SIZES, depth=MixtureOfDepths(gate=HardCapacity(capacity_frac=share)))
    model, ids = build_model(cfg, 50, seed=seed).double().eval(), draw_ids(2, length, seed)
    gate, context = model.layers[0].depth, model.forward_context(ids)
    score = gate.rank(model.embed(ids))
    read = gate.chosen(score, context)
    for b in range(2):
        for t in range(length):
            higher = sum(float(score[b, s]) > float(score[b, t]) for s in range(t))
            assert bool(read[b, t]) == (higher < math.ceil(share * (t + 1)))
    with torch.no_grad():
        after = model.layers[0](model.embed(ids), context)
    assert torch.equal((after != model.embed(ids)).any(-1), read) and float(
        context.kept_fracs[0]
    ) == pytest.approx(float(read.double().mean()))


# --- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"head_dim": 6, "attention": DifferentialAttention()}, "model.head_dim"),
        ({"head_dim": 7}, "even"),
        ({"n_kv_heads": 3}, "model.n_kv_heads"),
        ({"positions": LearnedPositions(), "rope_theta": 5e5}, "model.rope_theta"),
        ({"depth": MixtureOfDepths(every=4)}, "model.depth.every"),
    ],
)
def test_what_does_not_fit_is_refused_by_key(change, words):
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**SIZES | change)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValidationError, match=r"model.ffn.top_k \(3\)"):
        MixtureOfExperts(n_experts=2, top_k=3)
    with pytest.raises(ValidationError, match="high_freq_factor"):
        Llama3Scaling(low_freq_factor=4.0, high_freq_factor=4.0)
