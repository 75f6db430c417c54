"""Gates of the model: green on the stack, red on every plant,
and sharp enough to see small errors.
"""

from types import SimpleNamespace

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.contracts.gate import call_check
from stackproof.contracts.model import packing
from stackproof.gate_inputs.preflight import gather
from stackproof.kernels import attention
from stackproof.model import transformer
from stackproof.model.build import build_model
from stackproof.museum.plant import load_museum, swap, touches
from tests.contracts.test_model_variants import declared

GATES = [
    "model.init-law",
    "model.causality",
    "model.document-isolation",
    "model.reference-differential",
    "model.gradient",
    "model.training-forward",
    "model.overfit-one-batch",
]
PLANTS = [
    "model.far-keys-unseen",
    "model.layers-drawn-alike",
    "model.branches-drawn-wide",
    "model.dropout-undeclared",
    "model.scaled-in-training",
    "model.head-init-wrong",
    "model.init-std-too-big",
    "model.norm-garbage-buffer",
    "model.causal-mask-off-by-one",
    "model.rows-mixed",
    "model.document-mask-lost",
    "model.document-mask-off-by-one",
    "model.positions-restart-late",
    "model.missing-scale",
    "model.double-scale",
    "model.rope-bf16-table",
    "model.shared-gradient-clobbered",
    "model.attention-branch-lost",
    "model.labels-of-the-past",
]


def test_the_museum_can_show_what_the_gates_look_for(small_cfg):
    model = small_cfg.model
    assert 1 < model.n_kv_heads < model.n_heads and model.dropout > 0 and model.max_seq_len > 256


@pytest.mark.parametrize("gate_id", GATES)
def test_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize("plant_id", PLANTS)
def test_gate_is_red_on_its_plant(spec, small_cfg, dataset, plant_id):
    plant, before = load_museum()[plant_id], touches()
    with plant.apply():
        verdict = call_check(
            spec.gates[plant.gate], gather(small_cfg, dataset, torch.device("cpu"))[1]
        )
    assert verdict.outcome == "fail" and verdict.message and touches() > before
    assert plant.id in spec.gates[plant.gate].plants


def test_a_plant_leaves_nothing_behind(spec, small_cfg, dataset):
    for plant_id in PLANTS:
        with load_museum()[plant_id].apply():
            pass
    assert call_check(
        spec.gates["model.reference-differential"],
        gather(small_cfg, dataset, torch.device("cpu"))[1],
    ).passed


def test_training_forward_sees_one_percent(spec, ingredients):
    original = transformer.Transformer.logits
    with swap(
        transformer.Transformer,
        "logits",
        lambda self, x: original(self, x) * (1.01 if self.training else 1.0),
    ):
        verdict = call_check(spec.gates["model.training-forward"], ingredients)
    assert verdict.outcome == "fail" and verdict.measured["rel_error"] == pytest.approx(
        0.01, rel=0.01
    )


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_init_law_sees_five_percent(spec, factor):
    gate, parts = spec.gates["model.init-law"], wide_ingredients()
    assert call_check(gate, parts).passed
    with torch.no_grad():
        parts["model"].layers[0].ffn.up.weight.mul_(factor)
    verdict = call_check(gate, parts)
    assert verdict.outcome == "fail" and verdict.measured["worst"] == "layers.0.ffn.up.weight"


@pytest.mark.parametrize("seed", range(10))
def test_init_law_raises_no_false_alarm(spec, seed):
    verdict = call_check(spec.gates["model.init-law"], wide_ingredients(seed))
    assert verdict.passed and verdict.measured["z"] < 5  # measured worst of ten seeds 2.97


def wide_ingredients(seed=5):
    from stackproof.data.tokenizer import Bytes
    from stackproof.evaluate.ingredients import model_ingredients
    from stackproof.recipes.pocket import pocket

    cfg = pocket()
    return model_ingredients(cfg, build_model(cfg.model, 257, seed=seed), Bytes())


@pytest.mark.parametrize("change", ["uniform", "halves"])
def test_init_law_sees_draws_of_another_shape_and_draws_made_twice(spec, change):
    parts = wide_ingredients()
    weight = parts["model"].layers[0].ffn.up.weight
    with torch.no_grad():
        if change == "uniform":
            weight.uniform_(
                -(3**0.5) * 0.02, 3**0.5 * 0.02, generator=torch.Generator().manual_seed(1)
            )
        else:
            weight[len(weight) // 2 :] = weight[: len(weight) // 2]
    verdict = call_check(spec.gates["model.init-law"], parts)
    assert verdict.outcome == "fail" and "layers.0.ffn.up.weight" in verdict.message
    assert verdict.measured["z" if change == "uniform" else "likeness_z"] > 10


@pytest.mark.parametrize("change", ["gain", "nan", "untied", "stranger"])
def test_init_law_sees_other_breaches(spec, small_cfg, dataset, change):
    parts = gather(small_cfg, dataset, torch.device("cpu"))[1]
    model = parts["model"]
    with torch.no_grad():
        match change:
            case "gain":
                model.final_norm.weight[3] = 1.0001
            case "nan":
                model.layers[1].ffn.up.weight[0, 0] = float("nan")
            case "untied":
                parts["head_weight"] = model.embed.weight.clone()
            case "stranger":
                model.extra = torch.nn.Linear(2, 2)
    assert call_check(spec.gates["model.init-law"], parts).outcome == "fail"


def test_differential_sees_one_percent_of_scale(spec, ingredients):
    original = attention.whole
    with swap(attention, "whole", lambda q, k, v, **more: original(q * 1.01, k, v, **more)):
        verdict = call_check(spec.gates["model.reference-differential"], ingredients)
    assert verdict.outcome == "fail"
    assert (
        verdict.measured["attention_rel_error"]
        > 5 * spec.gates["model.reference-differential"].limits["rel_error_max"].value
    )


def test_differential_is_far_below_its_limit_on_the_stack(spec, ingredients):
    measured = call_check(spec.gates["model.reference-differential"], ingredients).measured
    errors = [
        measured[f"{part}_rel_error"] for part in ("attention", "logit", "drawn", "full_length")
    ]
    assert max(errors) < 2e-6  # measured worst case 3.3e-7
    assert measured["table_abs_error"] < 1e-7


def test_causality_refuses_a_model_that_ignores_its_input(spec, ingredients):
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            return self.weight.expand(*ids.shape, 4)

    assert (
        "sees nothing"
        in call_check(spec.gates["model.causality"], ingredients | {"model": Deaf()}).message
    )


def test_causality_leaves_mode_and_random_state(spec, ingredients):
    state, modes = torch.get_rng_state(), [m.training for m in ingredients["model"].modules()]
    assert call_check(spec.gates["model.causality"], ingredients).passed
    assert (
        torch.equal(torch.get_rng_state(), state)
        and [m.training for m in ingredients["model"].modules()] == modes
    )


def packed_parts(model):
    return {
        "declared_architecture": model.cfg.model_dump(),
        "model": model,
        "packed_logits": lambda ids, documents: model(ids, document_ids_BT=documents),
        "embedding": model.embed,
        "vocab_size": model.vocab_size,
        "max_seq_len": model.cfg.max_seq_len,
    }


@pytest.mark.parametrize(
    "heads, max_seq_len, tied",
    [((6, 3), 131, False), ((4, 1), 20, True), ((2, 2), 7, True), ((1, 1), 2, True)],
)
def test_isolation_holds_for_other_shapes(spec, heads, max_seq_len, tied):
    cfg = ModelConfig(
        d_model=24,
        n_layers=3,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=6,
        d_ff=40,
        max_seq_len=max_seq_len,
        tied_head=tied,
    )
    verdict = call_check(
        spec.gates["model.document-isolation"], packed_parts(build_model(cfg, 61, seed=3))
    )
    assert verdict.passed, verdict.message
    assert verdict.measured["rel_error"] < 2e-6  # measured worst case 2.6e-7


def test_isolation_looks_at_short_documents_full_rows_and_padding():
    for length in (17, 129):
        full, padded = (
            row.unique_consecutive(return_counts=True)[1].tolist() for row in packing(length)
        )
        assert (
            full[0] == 1
            and len(full) == 3
            and padded[1] == 1
            and len(padded) == 4
            and sum(full) == sum(padded) == length
        )


def test_isolation_is_far_from_its_limit_on_both_sides(spec, small_cfg, dataset, ingredients):
    gate = spec.gates["model.document-isolation"]
    limit = gate.limits["rel_error_max"].value
    assert call_check(gate, ingredients).measured["rel_error"] < limit / 100  # measured 2e-7
    for plant_id in gate.plants:
        with load_museum()[plant_id].apply():
            measured = call_check(gate, gather(small_cfg, dataset, torch.device("cpu"))[1]).measured
        assert measured["rel_error"] > 10 * limit  # measured 4.4e-3 or more
        assert (
            (measured["leak_abs"] > 0.05)
            == (measured["gradient_abs"] > 0.05)
            == ("mask" in plant_id)
        )


def test_isolation_sees_a_leak_in_the_gradient_alone(spec, ingredients):
    original = attention.document_attention

    def leaks_backward(q, k, v, mask, *, scale=None, chunks=False):
        seen = original(q, k, v, mask.new_ones(mask.shape).tril(), scale=scale)
        return original(q, k, v, mask, scale=scale) + (seen - seen.detach())

    with swap(attention, "document_attention", leaks_backward):
        verdict = call_check(spec.gates["model.document-isolation"], ingredients)
    assert verdict.outcome == "fail" and verdict.measured["gradient_abs"] > 0.1
    assert verdict.measured["leak_abs"] == 0 and verdict.measured["rel_error"] < 1e-5


def test_isolation_sees_packed_rows_that_are_scored_another_way(spec, ingredients):
    honest = ingredients["packed_logits"]
    shifted = ingredients | {"packed_logits": lambda ids, documents: honest(ids, documents) * 1.001}
    verdict = call_check(spec.gates["model.document-isolation"], shifted)
    assert (
        verdict.outcome == "fail"
        and verdict.measured["leak_abs"] == verdict.measured["gradient_abs"] == 0
    )


def test_isolation_refuses_a_model_that_ignores_its_input(spec):
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 4)

        def forward(self, ids):
            return 0 * self.embed(ids) + torch.arange(4)

    model = Deaf()
    parts = {
        "model": model,
        "packed_logits": lambda ids, documents: model(ids),
        "embedding": model.embed,
        "vocab_size": 4,
    }
    parts |= {"max_seq_len": 32, "declared_architecture": declared()}
    verdict = call_check(spec.gates["model.document-isolation"], parts)
    assert (
        verdict.outcome == "fail"
        and "sees nothing" in verdict.message
        and verdict.measured["unlearned"] > 0
    )


def test_isolation_leaves_modes_gradients_and_random_state(spec, ingredients):
    model = ingredients["model"].train()
    model.layers[0].ffn.eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert call_check(spec.gates["model.document-isolation"], ingredients).passed
    assert (
        torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    )
    assert all(p.grad is None for p in model.parameters()) and not model.embed._forward_hooks
    model.train()


def test_overfit_refuses_a_batch_without_ambiguity(spec, ingredients):
    ids = torch.arange(10).view(1, -1)
    batch = SimpleNamespace(input_ids=ids, labels=ids + 1)
    verdict = call_check(
        spec.gates["model.overfit-one-batch"], ingredients | {"overfit_batch": batch}
    )
    assert verdict.outcome == "fail" and "one successor" in verdict.message


def test_overfit_is_red_when_nothing_is_learned(spec, ingredients):
    idle = ingredients | {"train_on": lambda model, optimizer, batch: 0.01}
    verdict = call_check(spec.gates["model.overfit-one-batch"], idle)
    assert verdict.outcome == "fail" and verdict.measured["loss_nats"] > 1
