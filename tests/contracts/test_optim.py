"""Gates of the optimizer: green on the stack, red on what they are for."""

import torch

from contracts.events import StepTaken
from contracts.gate import call_check, limits_of
from contracts.optim import ClipNorm


def step_taken(**changes) -> StepTaken:
    """A healthy step, changed where a test wants it."""
    values = {
        "step": 1,
        "loss_nats": 5.0,
        "grad_norm": 3.0,
        "clipped_grad_norm": 1.0,
        "max_grad_norm": 1.0,
        "lr": 1e-3,
        "n_valid_tokens": 100,
        "n_expected_tokens": 100,
        "tokens_seen": 100,
        "wall_s": 0.1,
        "flops": 1e9,
        "peak_flops": 1e11,
        "changed_tensor_frac": 1.0,
    }
    return StepTaken(**values | changes)


def test_census_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["optim.parameter-census"], ingredients)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["owned"] == len(list(ingredients["build_model"]().parameters()))


def test_census_sees_a_dead_parameter(spec, ingredients):
    def with_dead_weight():
        model = ingredients["build_model"]()
        model.unused = torch.nn.Parameter(torch.ones(3, 3))
        return model

    verdict = call_check(spec.gates["optim.parameter-census"], ingredients | {"build_model": with_dead_weight})
    assert verdict.outcome == "fail" and "unused" in verdict.message


def test_reference_update_is_green_on_the_stack(spec, ingredients):
    verdict = call_check(spec.gates["optim.reference-update"], ingredients)
    assert verdict.outcome == "pass", verdict.measured


def test_reference_update_is_red_on_one_percent(spec, ingredients):
    declared = ingredients["declared"] | {"weight_decay": ingredients["declared"]["weight_decay"] * 1.01 + 1e-2}
    assert call_check(spec.gates["optim.reference-update"], ingredients | {"declared": declared}).outcome == "fail"
    slower = ingredients["declared"] | {"lr": ingredients["declared"]["lr"] * 0.99}
    assert call_check(spec.gates["optim.reference-update"], ingredients | {"declared": slower}).outcome == "fail"


def test_clip_spike_is_green_on_the_stack(spec, ingredients):
    assert call_check(spec.gates["optim.clip-spike"], ingredients).outcome == "pass"


def test_clip_spike_is_red_on_a_sign_flip(spec, ingredients):
    honest = ingredients["clip"]

    def flipped(grads):
        bound = honest(grads)
        if max(float(g.abs().max()) for g in grads) > 0.1 * bound:
            grads[0].mul_(-1)
        return bound

    assert call_check(spec.gates["optim.clip-spike"], ingredients | {"clip": flipped}).outcome == "fail"


def test_clip_norm_band_is_two_sided(spec):
    check = ClipNorm(limits_of(spec.gates["optim.clip-norm"]))
    assert check.observe(step_taken()).passed
    assert check.observe(step_taken(grad_norm=0.4, clipped_grad_norm=0.4)).passed
    assert not check.observe(step_taken(clipped_grad_norm=1.01)).passed
    assert not check.observe(step_taken(clipped_grad_norm=0.99)).passed
    assert not check.observe(step_taken(clipped_grad_norm=float("nan"))).passed
