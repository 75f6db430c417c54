"""The gate of gradients: green on the stack and on a second implementation of every variant, red on
its plant and on one percent.
"""

import pytest
import torch
import torch.nn.functional as F

from stackproof.contracts import differential
from stackproof.contracts.declared import kind_of, kinds, parameter_shapes, silent_kinds
from stackproof.contracts.gate import call_check
from stackproof.contracts.loss import IGNORE
from stackproof.gate_inputs.preflight import accumulated_gradients
from stackproof.museum.plant import load_museum, swap, touches
from tests.contracts import variants
from tests.contracts.test_model_variants import VARIANTS, declared

GATE = "model.gradient"
PLANT = "model.shared-gradient-clobbered"
VOCAB_SIZE = 61


def by_autograd(a):
    """(model, parts) ↦ (mean nats, gradients) of the second implementation."""

    def accumulated(model, parts):
        n_valid, n_tokens = (
            sum(f(*part) for part in parts)
            for f in (lambda x, y, d: int((y != IGNORE).sum()), lambda x, y, d: x.numel())
        )
        nats = balance = 0.0
        for ids, labels, documents in parts:
            nats = nats + F.cross_entropy(
                model(ids, documents).flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            )
            found = [layer.ffn.found for layer in model.layers if a["ffn"]["kind"] == "moe"]
            balance = balance + sum(variants.balance(*routed) * len(routed[0]) for routed in found)
        weight = a["ffn"].get("balance", {}).get("weight", 0.0)
        (nats / n_valid + weight * balance / n_tokens).backward()
        return float(nats.detach()) / n_valid, {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    return accumulated


def parts(a):
    return {
        "build_model": lambda: variants.Decoder(a, VOCAB_SIZE, 3),
        "accumulated_gradients": by_autograd(a),
        "declared_architecture": a,
        "vocab_size": VOCAB_SIZE,
    }


def test_gate_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates[GATE], ingredients)
    assert verdict.outcome == "pass", verdict.message
    # measured 9e-7 and 8e-8
    assert verdict.measured["rel_error"] < 1e-5 and verdict.measured["loss_rel_error"] < 1e-6
    assert verdict.measured["judged_frac"] == 1 and verdict.measured["gradients"] == len(
        list(ingredients["model"].parameters())
    )


def test_gate_is_red_on_its_plant_alone(spec, ingredients):
    """The forward is right, and so is every comparison of the stack with itself."""
    before = touches()
    with load_museum()[PLANT].apply():
        verdict = call_check(spec.gates[GATE], ingredients)
        others = [
            "model.reference-differential",
            "model.document-isolation",
            "loss.golden",
            "loss.partition-equivalence",
        ]
        assert all(call_check(spec.gates[gate_id], ingredients).passed for gate_id in others)
    assert verdict.outcome == "fail" and verdict.measured["rel_error"] > 1 and touches() > before
    assert verdict.measured["loss_rel_error"] < 1e-6 and spec.gates[GATE].plants == (PLANT,)


@pytest.mark.parametrize("blocks", [True, False])
def test_recomputed_blocks_are_judged_where_a_run_has_them(spec, small_cfg, ingredients, blocks):
    train = small_cfg.train.model_copy(
        update={"activation_checkpointing": "blocks" if blocks else "none"}
    )
    cfg, seen = small_cfg.model_copy(update={"train": train}), []

    def accumulated(model, parts):
        found = accumulated_gradients(cfg, torch.device("cpu"), model, parts)
        seen.append(model.activation_checkpointing)
        return found

    assert call_check(
        spec.gates[GATE], ingredients | {"accumulated_gradients": accumulated}
    ).passed and seen == [blocks]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gate_is_green_on_every_variant(spec, variant):
    verdict = call_check(spec.gates[GATE], parts(declared(variant)))
    assert verdict.outcome == "pass", verdict.message
    # measured worst case 6.5e-6
    assert verdict.measured["rel_error"] < 2e-5 and verdict.measured["judged_frac"] == 1


def one_percent_off(accumulated, names):
    def skewed(model, parts):
        nats, gradients = accumulated(model, parts)
        return nats, gradients | {n: 1.01 * gradients[n] for n in names}

    return skewed


@pytest.mark.parametrize(
    "variant", ["llama", "gpt2", "paper", "scalar", "experts", "hard and learned"]
)
def test_gate_sees_one_percent_of_every_kind_of_parameter(spec, variant):
    a = declared(variant, n_layers=2)
    honest = parts(a)
    seen = honest["accumulated_gradients"](*_as_the_gate_calls(spec, honest))
    names = dict(variants.Decoder(a, VOCAB_SIZE).named_parameters())
    judged = [
        kind
        for kind in kinds(parameter_shapes(a, VOCAB_SIZE))
        if kind not in silent_kinds(a) | {"ffn.selection_bias"}
    ]
    of_lambda = {kind for kind in judged if ".lambda_" in kind}
    for kind in [*(k for k in judged if k not in of_lambda), *([of_lambda] if of_lambda else [])]:
        louder = [n for n in names if kind_of(n) in (kind if isinstance(kind, set) else {kind})]
        off = one_percent_off(lambda model, parts: seen, louder)
        verdict = call_check(spec.gates[GATE], honest | {"accumulated_gradients": off})
        assert verdict.outcome == "fail" and verdict.measured["rel_error"] == pytest.approx(
            0.01, rel=0.05
        ), kind
    assert call_check(
        spec.gates[GATE], honest | {"accumulated_gradients": lambda model, parts: seen}
    ).passed


def _as_the_gate_calls(spec, honest):
    """The (model, parts) that the gate hands to the accumulation."""
    caught = []

    def catching(*call):
        caught.append(call)
        return honest["accumulated_gradients"](*call)

    call_check(spec.gates[GATE], honest | {"accumulated_gradients": catching})
    caught[0][0].zero_grad()
    return caught[0]


def test_gate_sees_a_lost_gradient_and_one_that_should_be_none(spec):
    a = declared("gpt2", n_layers=2)
    honest = parts(a)
    seen = honest["accumulated_gradients"](*_as_the_gate_calls(spec, honest))
    for changed in (
        {n: g for n, g in seen[1].items() if n != "layers.1.ffn.up.bias"},
        seen[1] | {"layers.1.attention.k.bias": seen[1]["layers.1.attention.q.bias"]},
        seen[1] | {"layers.0.ffn.up.bias": seen[1]["layers.0.ffn.up.bias"] * float("nan")},
    ):
        assert (
            call_check(
                spec.gates[GATE],
                honest | {"accumulated_gradients": lambda *_, g=changed: (seen[0], g)},
            ).outcome
            == "fail"
        )
    assert (
        call_check(
            spec.gates[GATE],
            honest | {"accumulated_gradients": lambda *_: (1.01 * seen[0], seen[1])},
        ).outcome
        == "fail"
    )


def test_gate_sees_a_balance_term_that_is_not_the_declared_one(spec):
    a = declared(
        "experts",
        n_layers=2,
        ffn={"kind": "moe", "n_experts": 4, "balance": {"kind": "auxiliary-loss", "weight": 0.5}},
    )
    assert call_check(spec.gates[GATE], parts(a)).passed
    other = a | {"ffn": a["ffn"] | {"balance": a["ffn"]["balance"] | {"weight": 0.4}}}
    verdict = call_check(spec.gates[GATE], parts(a) | {"declared_architecture": other})
    assert verdict.outcome == "fail" and verdict.measured["worst"].endswith("ffn.router.weight")


@pytest.mark.parametrize("variant", ["experts", "hard"])
def test_rows_end_before_a_tie(spec, variant, monkeypatch):
    """One tie in a packed row costs the rest of that row; ties
    everywhere leave nothing to judge.
    """
    original, places = differential.oracle_reading, {"every": False}

    def tied(ids_BT, weights, a, documents_BT=None):
        reading = original(ids_BT, weights, a, documents_BT)
        if places["every"]:
            reading.margin_BT.zero_()
        elif documents_BT is not None and ids_BT.shape[1] > 30:
            reading.margin_BT[0, 30] = 0
        return reading

    monkeypatch.setattr(differential, "oracle_reading", tied)
    verdict = call_check(spec.gates[GATE], parts(declared(variant)))
    assert verdict.passed and verdict.measured["judged_frac"] == (40 + 40 + 30 + 30) / 160
    places["every"] = True
    verdict = call_check(spec.gates[GATE], parts(declared(variant)))
    assert verdict.outcome == "fail" and verdict.measured["judged_frac"] == 0


@pytest.mark.parametrize(
    "sizes", [{"max_seq_len": 2}, {"max_seq_len": 17}, {"tied_head": False, "n_layers": 1}]
)
def test_gate_holds_for_other_sizes(spec, sizes):
    a = declared("llama", **sizes)
    assert call_check(spec.gates[GATE], parts(a)).passed
    with swap(variants, "rotate", lambda x, cos, sin: x.detach()):
        assert call_check(spec.gates[GATE], parts(a)).outcome == "fail"
