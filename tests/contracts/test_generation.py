"""The gate of generation on the stack, its variants, its plants,
and on a generator that is wrong by one token.
"""

import pytest
import torch

from stackproof.config import load_config
from stackproof.contracts.gate import call_check
from stackproof.contracts.generation import N_NEW
from stackproof.evaluate.ingredients import model_ingredients
from stackproof.model.build import build_model
from stackproof.museum.plant import load_museum

GATE = "sampling.generation"
VARIANTS = {
    "museum": (),
    "soft depth": ("model.depth.kind=mixture-of-depths",),
    "hard depth": ("model.depth.kind=mixture-of-depths", "model.depth.gate.kind=hard"),
    "experts": ("model.ffn.kind=moe", "model.ffn.n_experts=4"),
    "differential": ("model.attention.kind=differential",),
    "window": ("model.attention.window=8",),
    "gpt-2's parts": (
        "model.ffn.kind=gelu",
        "model.norm.kind=layernorm",
        "model.positions.kind=learned",
    ),
}


@pytest.fixture
def asked(small_cfg, dataset):
    def ingredients(*sets):
        cfg, _ = load_config(small_cfg, sets=sets)
        return model_ingredients(
            cfg, build_model(cfg.model, dataset.tokenizer.vocab_size, seed=1), dataset.tokenizer
        )

    return ingredients


@pytest.mark.parametrize("variant", VARIANTS)
def test_gate_is_green_on_the_stack_and_its_variants(spec, asked, variant):
    verdict = call_check(spec.gates[GATE], asked(*VARIANTS[variant]))
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["judged_tokens"] >= 0.85 * 6 * N_NEW, "measured 0.90 at least"


def test_gate_is_red_on_its_plants(spec, asked):
    for plant_id in spec.gates[GATE].plants:
        with load_museum()[plant_id].apply():
            assert call_check(spec.gates[GATE], asked()).outcome == "fail", plant_id


def test_gate_sees_one_token_and_an_end_that_ends_nothing(spec, asked):
    honest = asked()
    generate = honest["generate"]

    def last_token_off(ids, **options):
        got = generate(ids, **options)
        return (
            [*got[:-1], (got[-1] + 1) % 384]
            if options["temperature"] == 1.0 and options["use_cache"]
            else got
        )

    def endless(ids, **options):
        return generate(ids, **options | {"eos_id": None})

    def leaves_evaluation_mode(ids, **options):
        got = generate(ids, **options)
        honest["generating_model"].layers[0].eval()
        return got

    for wrong in (last_token_off, endless, leaves_evaluation_mode):
        assert call_check(spec.gates[GATE], honest | {"generate": wrong}).outcome == "fail", (
            wrong.__name__
        )
    assert torch.is_grad_enabled() and call_check(spec.gates[GATE], honest).outcome == "pass"
