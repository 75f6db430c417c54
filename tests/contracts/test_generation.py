"""The gate of generation on the stack, its variants, its plants,
and on a generator that is wrong by one token.
"""

import pytest
import torch

from stackproof.config import load_config
from stackproof.contracts.gate import call_check
from stackproof.contracts.generation import N_NEW
from stackproof.museum.plant import load_museum
from stackproof.subject.assemble import subject_of
from tests.subjects import changed

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
    def subject(*sets):
        cfg, _ = load_config(small_cfg, sets=sets)
        return subject_of(cfg, dataset, torch.device("cpu"))

    return subject


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
    generate = honest.sampling.generate

    def last_token_off(model, ids, **options):
        got = generate(model, ids, **options)
        return (
            [*got[:-1], (got[-1] + 1) % 384]
            if options["temperature"] == 1.0 and options["use_cache"]
            else got
        )

    def endless(model, ids, **options):
        return generate(model, ids, **options | {"eos_id": None})

    def leaves_evaluation_mode(model, ids, **options):
        got = generate(model, ids, **options)
        model.layers[0].eval()
        return got

    for wrong in (last_token_off, endless, leaves_evaluation_mode):
        subject = changed(honest, sampling={"generate": wrong})
        assert call_check(spec.gates[GATE], subject).outcome == "fail", wrong.__name__
    assert torch.is_grad_enabled() and call_check(spec.gates[GATE], honest).outcome == "pass"
