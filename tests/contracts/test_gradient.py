"""The gate of gradients: green on the stack and on a second implementation of every variant, red on
its plant and on one percent.
"""

import pytest
import torch

from stackproof.contracts import differential
from stackproof.contracts.declared import kind_of, kinds, parameter_shapes, silent_kinds
from stackproof.contracts.gate import call_check
from stackproof.museum.plant import load_museum, swap, touches
from stackproof.subject.assemble import subject_of
from tests.contracts import variants
from tests.contracts.test_model_variants import VARIANTS, declared
from tests.subjects import changed

GATE = "model.gradient"
PLANT = "model.shared-gradient-clobbered"
VOCAB_SIZE = 61


def altered_gradients(a, alter):
    """A subject whose gradients are others: `alter(nats, gradients)` gives the mean loss and the
    gradients by name.
    """

    class Altered(variants.VariantTrainee):
        def accumulate(self, batches):
            nats = super().accumulate(batches)
            found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            nats, found = alter(nats, found)
            for name, p in self.model.named_parameters():
                p.grad = found.get(name)
            return nats

    return changed(variants.subject_of(a), training={"trainee_of": Altered})


def test_gate_is_green_on_the_stack(spec, subject):
    verdict = call_check(spec.gates[GATE], subject)
    assert verdict.outcome == "pass", verdict.message
    # measured 9e-7 and 8e-8
    assert verdict.measured["rel_error"] < 1e-5 and verdict.measured["loss_rel_error"] < 1e-6
    assert verdict.measured["judged_frac"] == 1 and verdict.measured["gradients"] == len(
        list(subject.model.module.parameters())
    )


def test_gate_is_red_on_its_plant_alone(spec, subject):
    """The forward is right, and so is every comparison of the stack with itself."""
    before = touches()
    with load_museum()[PLANT].apply():
        verdict = call_check(spec.gates[GATE], subject)
        others = [
            "model.reference-differential",
            "model.isolation",
            "loss.golden",
            "loss.partition-equivalence",
        ]
        assert all(call_check(spec.gates[gate_id], subject).passed for gate_id in others)
    assert verdict.outcome == "fail" and verdict.measured["rel_error"] > 1 and touches() > before
    assert verdict.measured["loss_rel_error"] < 1e-6 and spec.gates[GATE].plants == (PLANT,)


@pytest.mark.parametrize("blocks", [True, False])
def test_recomputed_blocks_are_judged_where_a_run_has_them(spec, small_cfg, dataset, blocks):
    train = small_cfg.train.model_copy(
        update={"activation_checkpointing": "blocks" if blocks else "none"}
    )
    cfg = small_cfg.model_copy(update={"train": train})
    subject, seen = subject_of(cfg, dataset, torch.device("cpu")), []
    fresh = subject.model.fresh

    def kept():
        seen.append(fresh())
        return seen[-1]

    assert call_check(spec.gates[GATE], changed(subject, model={"fresh": kept})).passed
    assert [model.activation_checkpointing for model in seen] == [blocks]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gate_is_green_on_every_variant(spec, variant):
    verdict = call_check(spec.gates[GATE], variants.subject_of(declared(variant)))
    assert verdict.outcome == "pass", verdict.message
    # measured worst case 6.5e-6
    assert verdict.measured["rel_error"] < 2e-5 and verdict.measured["judged_frac"] == 1


@pytest.mark.parametrize(
    "variant", ["llama", "gpt2", "paper", "scalar", "experts", "hard and learned"]
)
def test_gate_sees_one_percent_of_every_kind_of_parameter(spec, variant):
    a = declared(variant, n_layers=2)
    names = dict(variants.Decoder(a, VOCAB_SIZE).named_parameters())
    judged = [
        kind
        for kind in kinds(parameter_shapes(a, VOCAB_SIZE))
        if kind not in silent_kinds(a) | {"ffn.selection_bias"}
    ]
    of_lambda = {kind for kind in judged if ".lambda_" in kind}
    for kind in [*(k for k in judged if k not in of_lambda), *([of_lambda] if of_lambda else [])]:
        louder = [n for n in names if kind_of(n) in (kind if isinstance(kind, set) else {kind})]
        off = altered_gradients(
            a, lambda nats, g, louder=louder: (nats, g | {n: 1.01 * g[n] for n in louder})
        )
        verdict = call_check(spec.gates[GATE], off)
        assert verdict.outcome == "fail" and verdict.measured["rel_error"] == pytest.approx(
            0.01, rel=0.05
        ), kind
    assert call_check(
        spec.gates[GATE], altered_gradients(a, lambda *as_they_are: as_they_are)
    ).passed


def test_gate_sees_a_lost_gradient_and_one_that_should_be_none(spec):
    a = declared("gpt2", n_layers=2)
    lost, other = "layers.1.ffn.up.bias", "layers.0.ffn.up.bias"
    query, key = "layers.1.attention.q.bias", "layers.1.attention.k.bias"
    for alter in (
        lambda nats, g: (nats, {n: x for n, x in g.items() if n != lost}),
        lambda nats, g: (nats, g | {key: g[query][: len(g[key])]}),
        lambda nats, g: (nats, g | {other: g[other] * float("nan")}),
        lambda nats, g: (1.01 * nats, g),
    ):
        assert call_check(spec.gates[GATE], altered_gradients(a, alter)).outcome == "fail"


def test_gate_sees_a_balance_term_that_is_not_the_declared_one(spec):
    a = declared(
        "experts",
        n_layers=2,
        ffn={"kind": "moe", "n_experts": 4, "balance": {"kind": "auxiliary-loss", "weight": 0.5}},
    )
    subject = variants.subject_of(a)
    assert call_check(spec.gates[GATE], subject).passed
    other = a | {"ffn": a["ffn"] | {"balance": a["ffn"]["balance"] | {"weight": 0.4}}}
    verdict = call_check(spec.gates[GATE], changed(subject, declared={"architecture": other}))
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
    verdict = call_check(spec.gates[GATE], variants.subject_of(declared(variant)))
    assert verdict.passed and verdict.measured["judged_frac"] == (40 + 40 + 30 + 30) / 160
    places["every"] = True
    verdict = call_check(spec.gates[GATE], variants.subject_of(declared(variant)))
    assert verdict.outcome == "fail" and verdict.measured["judged_frac"] == 0


@pytest.mark.parametrize(
    "sizes", [{"max_seq_len": 2}, {"max_seq_len": 17}, {"tied_head": False, "n_layers": 1}]
)
def test_gate_holds_for_other_sizes(spec, sizes):
    a = declared("llama", **sizes)
    assert call_check(spec.gates[GATE], variants.subject_of(a)).passed
    with swap(variants, "rotate", lambda x, cos, sin: x.detach()):
        assert call_check(spec.gates[GATE], variants.subject_of(a)).outcome == "fail"
