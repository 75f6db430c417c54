"""The float64 oracle against cases worked out by hand, and against a second
implementation of every variant.
"""

import math

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.contracts.declared import parameter_shapes
from stackproof.contracts.oracle import (
    balance_of,
    choices,
    lambda_init,
    oracle_attention,
    oracle_experts,
    oracle_logits,
    oracle_reading,
    readers,
    room,
    rotary_rates,
)
from stackproof.spec.formulas import parameter_count
from tests.contracts import variants
from tests.contracts.test_oracle_transformers import (
    GPT2,
    SIZES,
    TOKENS,
    VOCAB,
    architecture,
    plain_ids,
    plain_weights,
)

# --- by hand --------------------------------------------------------------------------------------

ONE_HEAD = {
    "d_model": 8,
    "n_layers": 2,
    "n_heads": 1,
    "n_kv_heads": 1,
    "head_dim": 4,
    "d_ff": 8,
    "max_seq_len": 8,
    "norm_eps": 1e-6,
}


def small(**chosen):
    return ModelConfig(**ONE_HEAD, **chosen).model_dump()


def heads(a, **given):
    """Attention weights under which q, k and v are the first, second and third four features (the
    last from the front again).
    """
    eye = torch.eye(8, dtype=torch.float64)
    own = {"q.weight": eye[:4], "k.weight": eye[4:], "v.weight": eye[:4], "out.weight": eye[:, :4]}
    return own | {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}


X = torch.tensor(
    [[[1.0, 0.5, -1.0, 2.0, 0.3, 0.7, 1.1, -0.4], [0.2, -0.6, 0.9, 0.4, -0.8, 1.2, 0.5, 0.6]]],
    dtype=torch.float64,
)


def two_maps():
    """Weight of the first key for the second query in both maps, by scalars: q [0.2 −0.6 | 0.9
    0.4], k as the last four features.
    """
    first = [0.2 * 0.3 - 0.6 * 0.7, 0.2 * -0.8 - 0.6 * 1.2]
    second = [0.9 * 1.1 + 0.4 * -0.4, 0.9 * 0.5 + 0.4 * 0.6]
    return [1 / (1 + math.exp((s[1] - s[0]) / math.sqrt(2))) for s in (first, second)]


def test_scalar_differential_attention_by_hand():
    a = small(attention={"kind": "differential", "form": "scalar"}, positions={"kind": "learned"})
    got = oracle_attention(X, heads(a, lambda_weight=[0.3]), a, layer=1)[0, :, :4]
    one, two = two_maps()
    share = [one - 0.3 * two, (1 - one) - 0.3 * (1 - two)]
    expected = [
        share[0] * u + share[1] * v for u, v in zip((1.0, 0.5, -1.0, 2.0), (0.2, -0.6, 0.9, 0.4))
    ]
    assert got[1].tolist() == pytest.approx(expected, rel=1e-12)
    assert got[0].tolist() == pytest.approx([0.7 * v for v in (1.0, 0.5, -1.0, 2.0)], rel=1e-12)


def test_paper_differential_attention_by_hand():
    a = small(attention={"kind": "differential"}, positions={"kind": "learned"})
    vectors = {
        "lambda_q1": [0.5, 1.0],
        "lambda_k1": [0.2, 0.1],
        "lambda_q2": [0.3, -0.2],
        "lambda_k2": [1.0, 0.5],
    }
    got = oracle_attention(
        X, heads(a, **vectors, **{"head_norm.weight": [1.0, 2.0, 1.0, 0.5]}), a, layer=1
    )[0, 1, :4]
    start = 0.8 - 0.6 * math.exp(-0.3)  # the second layer
    learned = math.exp(0.5 * 0.2 + 1.0 * 0.1) - math.exp(0.3 * 1.0 - 0.2 * 0.5) + start
    one, two = two_maps()
    share = [one - learned * two, (1 - one) - learned * (1 - two)]
    mixed = [
        share[0] * u + share[1] * v for u, v in zip((1.0, 0.5, -1.0, 2.0), (0.2, -0.6, 0.9, 0.4))
    ]
    size = math.sqrt(sum(m * m for m in mixed) / 4 + 1e-6)
    assert got.tolist() == pytest.approx(
        [m / size * g * (1 - start) for m, g in zip(mixed, (1.0, 2.0, 1.0, 0.5))], rel=1e-12
    )


def test_lambda_starts_at_a_fifth_and_rises_to_four():
    assert (
        lambda_init(0) == pytest.approx(0.2)
        and lambda_init(100) == pytest.approx(0.8)
        and lambda_init(1) == pytest.approx(0.3555, abs=1e-4)
    )


def test_halves_of_a_differential_head_are_turned_apart():
    a = ModelConfig(**ONE_HEAD | {"head_dim": 8}, attention={"kind": "differential"}).model_dump()
    assert (
        rotary_rates(a) == pytest.approx([1.0, 0.01])
        and len(rotary_rates(a | {"attention": {"kind": "softmax"}})) == 4
    )


def test_llama3_scaling_by_hand():
    rates, plain = rotary_rates(architecture("llama3")), [500.0 ** (-j / 8) for j in range(8)]
    waves = [2 * math.pi / r for r in plain]
    assert waves[1] < 16 < waves[2] < 64 < waves[3]
    assert rates[:2] == pytest.approx(plain[:2]) and rates[3:] == pytest.approx(
        [r / 4 for r in plain[3:]]
    )
    smooth = (64 / waves[2] - 1) / (4 - 1)
    assert rates[2] == pytest.approx((1 - smooth) * plain[2] / 4 + smooth * plain[2])


def test_a_window_counts_the_query_itself():
    a = small(attention={"kind": "softmax", "window": 1}, positions={"kind": "learned"})
    assert torch.allclose(
        oracle_attention(X, heads(a), a, 0)[0, :, :4], X[0, :, :4], rtol=0, atol=1e-15
    )


def test_hard_capacity_by_hand():
    scores = torch.tensor([0.1, 0.5, 0.3, 0.3, 0.9, 0.2, 0.3], dtype=torch.float64)
    # room 1 1 2 2 3 3 4; higher before: 0 0 1 1 0 4 2 (an equal score is not higher)
    read, margin_T = readers(scores, 0.5)
    assert read == [0, 1, 2, 3, 4, 6]
    # the score that decides: none, 0.1, the second of 0.5 0.1, of 0.5 0.3 0.1, the third of 0.5 0.3
    # 0.3 0.1, of five, the fourth of six
    assert margin_T.tolist() == pytest.approx([math.inf, 0.4, 0.2, 0.0, 0.6, 0.1, 0.0])


def gated(gate):
    a = ModelConfig(**SIZES, depth={"kind": "mixture-of-depths", "gate": gate}).model_dump()
    return a, plain_weights(a)


def test_open_gates_leave_the_plain_model_and_shut_gates_nothing_of_it():
    a, weights = gated({"kind": "soft"})
    shut = weights | {
        f"layers.{i}.depth.router.{kind}": 0 * weights[f"layers.{i}.depth.router.{kind}"]
        for i in (0, 1)
        for kind in ("weight", "bias")
    }
    for bias, other in (
        (50.0, a | {"depth": {"kind": "full"}}),
        (-50.0, a | {"depth": {"kind": "full"}, "n_layers": 0}),
    ):
        gates = {f"layers.{i}.depth.router.bias": torch.tensor([bias]) for i in (0, 1)}
        assert torch.allclose(
            oracle_logits(plain_ids(), shut | gates, a),
            oracle_logits(plain_ids(), weights, other),
            rtol=0,
            atol=1e-12,
        )


def test_hard_capacity_reads_the_tokens_it_names_and_no_others():
    a, weights = gated({"kind": "hard", "capacity_frac": 0.3})
    one = a | {"n_layers": 1, "attention": a["attention"] | {"window": 4}}
    ids = torch.arange(TOKENS)[None]
    x_TD, own = (
        weights["embed.weight"][ids[0]],
        {n.removeprefix("layers.0."): w for n, w in weights.items() if n.startswith("layers.0.")},
    )
    score_T = x_TD @ own["depth.router.weight"][0] + own["depth.router.bias"]
    read, _ = readers(score_T, 0.3)
    skipped = [t for t in range(TOKENS) if t not in read]
    assert 3 < len(read) < TOKENS / 2
    final = (
        x_TD
        / torch.sqrt(x_TD.square().mean(-1, keepdim=True) + a["norm_eps"])
        * weights["final_norm.weight"]
    )
    logits = oracle_logits(ids, weights, one)[0]
    assert torch.allclose(
        logits[skipped], (final @ weights["embed.weight"].T)[skipped], rtol=0, atol=1e-12
    )
    assert not torch.allclose(logits[read], (final @ weights["embed.weight"].T)[read], atol=1e-2)


EXPERTS = {
    "kind": "moe",
    "n_experts": 3,
    "top_k": 2,
    "expert": {"kind": "gelu", "bias": True, "approximate": "none"},
    "capacity_factor": None,
}


def constant_experts(router):
    """Three experts that answer 1, 10 and 100 whatever they read."""
    own = {"router.weight": torch.tensor(router, dtype=torch.float64)}
    for e, answer in enumerate((1.0, 10.0, 100.0)):
        up, down = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        own |= {f"experts.{e}.up.weight": up, f"experts.{e}.up.bias": up[:, 0]}
        own |= {
            f"experts.{e}.down.weight": down,
            f"experts.{e}.down.bias": torch.full((2,), answer, dtype=torch.float64),
        }
    return own


def test_experts_by_hand():
    x_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    own = constant_experts([[math.log(6), 0.0], [math.log(3), 0.0], [0.0, math.log(2)]])
    # probabilities 6:3:1, 1:1:2, 6:3:2 of ten, four and eleven;
    # the tie of the second token goes to expert 0
    routed = oracle_experts(x_RD, own, EXPERTS)
    assert routed.experts_Rk.tolist() == [[0, 1], [2, 0], [0, 1]]
    assert routed.y_RD[:, 0].tolist() == pytest.approx(
        [6 / 9 + 30 / 9, 200 / 3 + 1 / 3, 6 / 9 + 30 / 9]
    )
    assert routed.margin_R.tolist() == pytest.approx([(3 - 1) / 3, 0.0, (3 - 2) / 3])
    assert routed.load_E.tolist() == [3, 2, 1] and routed.dropped == 0
    means = [(0.6 + 0.25 + 6 / 11) / 3, (0.3 + 0.25 + 3 / 11) / 3, (0.1 + 0.5 + 2 / 11) / 3]
    assert float(balance_of(routed.probs_RE, routed.experts_Rk)) == pytest.approx(
        3 * sum(f * p for f, p in zip((3 / 6, 2 / 6, 1 / 6), means))
    )


def test_experts_drop_later_tokens_and_do_not_renormalise_again():
    x_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    own = constant_experts([[math.log(6), 0.0], [math.log(3), 0.0], [0.0, math.log(2)]])
    routed = oracle_experts(x_RD, own, EXPERTS, capacity=1)
    assert routed.y_RD[:, 0].tolist() == pytest.approx([36 / 9, 200 / 3, 0.0])
    assert routed.load_E.tolist() == [1, 1, 1] and routed.dropped == 3
    assert (
        room(EXPERTS | {"capacity_factor": 1.25}, 3) == 3
        and room(EXPERTS | {"capacity_factor": 0.5}, 3) == 1
        and room(EXPERTS, 3) is None
    )


def test_one_choice_keeps_its_probability_and_a_bias_enters_the_choice_alone():
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert choices(probs, 1)[1].tolist() == [[0.5]]
    experts, weights, _ = choices(probs, 2, torch.tensor([-0.4, 0.0, 0.05]))
    assert experts.tolist() == [[1, 2]] and weights[0].tolist() == pytest.approx([0.6, 0.4])


# --- as a whole -----------------------------------------------------------------------------------

MOD = "mixture-of-depths"
VARIANTS = {
    "base": {},
    "gpt2": GPT2 | {"ffn": {"kind": "gelu", "approximate": "none"}},
    "windowed": {"attention": {"kind": "softmax", "window": 5, "qk_norm": True}},
    "paper": {"attention": {"kind": "differential", "qk_norm": True, "out_bias": True}},
    "scalar": {
        "attention": {"kind": "differential", "form": "scalar", "window": 6, "qkv_bias": True},
        "norm": {"kind": "layernorm"},
    },
    "experts": {"ffn": {"kind": "moe", "n_experts": 4}, "positions": {"kind": "learned"}},
    "biased": {
        "ffn": {
            "kind": "moe",
            "n_experts": 3,
            "top_k": 1,
            "expert": {"kind": "gelu"},
            "balance": {"kind": "selection-bias"},
        }
    },
    "soft": {"depth": {"kind": MOD, "every": 2}, "tied_head": False},
    "hard": {
        "depth": {"kind": MOD, "gate": {"kind": "hard"}},
        "ffn": {"kind": "moe"},
        "attention": {"kind": "softmax", "window": 4},
    },
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return ModelConfig(**SIZES | VARIANTS[request.param]).model_dump()


def test_names_and_shapes_add_up_to_the_formula(variant):
    counted = sum(
        math.prod(s)
        for n, s in parameter_shapes(variant, VOCAB).items()
        if not n.endswith("selection_bias")
    )
    assert counted == parameter_count(variant, VOCAB)


def test_oracle_equals_a_second_implementation(variant):
    model = variants.Decoder(variant, VOCAB).double().eval()
    model.tables = variants.rotary_tables(variant)
    model.load_state_dict(plain_weights(variant))
    ids, documents = (
        torch.arange(TOKENS).repeat(2, 1),
        torch.tensor([[0] * 7 + [1] * 12, [4] * 5 + [2] + [4] * 13]),
    )
    for given in (None, documents):
        with torch.no_grad():
            theirs = model(ids, given)
        ours = oracle_logits(ids, plain_weights(variant), variant, given)
        # rotary tables of float32; measured worst case 1e-7
        assert float((ours - theirs).norm() / ours.norm()) < 1e-6


def test_packed_documents_are_read_as_if_alone(variant):
    weights, ids = plain_weights(variant), plain_ids()[:1]
    packed = oracle_logits(ids, weights, variant, torch.tensor([[3] * 4 + [1] + [3] * 6 + [0] * 8]))
    for places in (slice(0, 4), slice(4, 5), slice(5, 11), slice(11, 19)):
        assert torch.equal(packed[:, places], oracle_logits(ids[:, places], weights, variant))


def test_margins_reach_every_token_that_depends_on_a_choice():
    a = architecture("mixtral")
    weights = plain_weights(a)
    weights["layers.0.ffn.router.weight"] = weights["layers.0.ffn.router.weight"].index_fill(
        0, torch.tensor([1, 2, 3]), 0
    )
    reading = oracle_reading(plain_ids(), weights, a)
    assert not bool((reading.margin_BT.diff(dim=1) > 0).any()), (
        "a token is as unsure as the ones before it"
    )
    assert bool((reading.margin_BT[:, -1] == 0).all()) and set(reading.balance) == {0, 1}
    base = architecture("llama")
    assert bool(oracle_reading(plain_ids(), plain_weights(base), base).margin_BT.isinf().all())


def test_gradients_of_the_balance_reach_the_routers():
    a = architecture("mixtral")
    weights = plain_weights(a)
    leaf = weights["layers.1.ffn.router.weight"].requires_grad_()
    before = oracle_reading(plain_ids(), weights, a).balance[1]
    (gradient,) = torch.autograd.grad(before, leaf)
    with torch.no_grad():
        step = 1e-6 * gradient / gradient.norm()
        after = oracle_reading(
            plain_ids(), weights | {"layers.1.ffn.router.weight": leaf + step}, a
        ).balance[1]
    assert float(after - before.detach()) == pytest.approx(1e-6 * float(gradient.norm()), rel=1e-4)
