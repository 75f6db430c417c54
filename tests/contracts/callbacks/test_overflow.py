"""Where the direction of the first update is not known: after steps that a loss scale skips,
and where nothing tells it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stackproof.contracts.callbacks.movement import MovementTracker
from stackproof.contracts.callbacks.plain import gated
from stackproof.contracts.events import StateCompared, WeightsUpdated
from stackproof.contracts.gate import Verdict, limits_of, resolve
from stackproof.museum import script
from stackproof.spec.gates import load_spec


class Scaled(torch.optim.SGD):
    """Skips a step whose gradients are not finite, as an optimizer does that is
    handed what a loss scale found.
    """

    def __init__(self, parameters, lr: float, direction: float = 1.0):
        super().__init__(parameters, lr=lr)
        self.direction = direction

    def step(self):
        held = [p for g in self.param_groups for p in g["params"]]
        if all(bool(p.grad.isfinite().all()) for p in held):
            for p in held:
                p.data.sub_(p.grad, alpha=self.direction * self.defaults["lr"])


def overflown(direction: float, value: float, at: tuple[int, ...]) -> list[float | None]:
    """`uphill` of three updates; one gradient is `value` in those `at`: of a kept tensor in the
    first, of one too large in the second.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 300_000, bias=False))
    optimizer, found = Scaled(model.parameters(), 1e-6, direction), []
    movement = MovementTracker(model, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        if step in at:
            model[1 if step else 0].weight.grad[0, 0] = value
        movement.prepare()
        optimizer.step()
        found.append(movement.judge(step + 1, (1e-6,)))
    assert {len(m.unknown) for m in found} == {0}
    return [m.uphill for m in found]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_step_that_was_skipped_for_its_overflow_hides_no_climbing(value):
    for direction, cosine in ((1.0, -1.0), (-1.0, 1.0)):
        assert overflown(direction, value, ()) == [pytest.approx(cosine, abs=1e-3), None, None]
        assert overflown(direction, value, (0,)) == [None, pytest.approx(cosine, abs=1e-3), None]
        assert overflown(direction, value, (0, 1)) == [None, None, pytest.approx(cosine, abs=1e-3)]


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, 1e30])
def test_a_direction_that_nothing_tells_is_no_pass(value):
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    movement = MovementTracker(model, optimizer)
    model.weight.grad = torch.full((4, 4), value)
    movement.prepare()
    optimizer.step()
    moved = movement.judge(1, (1e-3,))
    assert moved.uphill is None and "not known" in moved.unknown
    gate = load_spec().gates["optim.movement"]
    check = resolve(gate)(limits_of(gate))
    assert check.observe(moved).outcome == "not_run"
    after, compared = WeightsUpdated(2, 1e-3, moved_frac=1.0), StateCompared(16, "section", 20, ())
    assert [check.observe(e).outcome for e in (after, compared)] == ["not_run"] * 2
    wrong = (replace(after, longest_still=9), replace(compared, differing=("a",)))
    assert [check.observe(e).outcome for e in wrong] == ["fail"] * 2
    assert resolve(gate)(limits_of(gate)).observe(after).outcome == "pass"


def test_gradients_that_are_gone_after_the_update_are_said_to_be():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    movement = MovementTracker(model, optimizer)
    model(torch.ones(2, 4)).square().sum().backward()
    movement.prepare()
    optimizer.step()
    optimizer.zero_grad()
    moved = movement.judge(1, (1e-3,))
    assert moved.uphill is None and "gradients were freed" in moved.unknown


class Climbs(torch.optim.SGD):
    """Is handed scale and overflow by a GradScaler, as fused optimizers are, and goes up."""

    _step_supports_amp_scaling = True

    def step(self):
        for p in () if self.found_inf else (p for g in self.param_groups for p in g["params"]):
            p.data.add_(p.grad / self.grad_scale, alpha=self.defaults["lr"])


def scaled(make) -> Verdict:
    """`optim.movement` after two steps under a GradScaler that calls the optimizer in a step that
    overflows too; the first does.
    """
    torch.manual_seed(0)
    model = script.Small()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scaler, drawn = (
        torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117),
        script.batches(),
    )
    with gated(model, optimizer, scaler=scaler, mode="log", only=("optim.movement",)) as gate:
        for overflows in (True, False):
            one = next(drawn)
            loss = script.loss_of(model(**script.inputs_of(one)), one, script.tokens_in([one]))
            scaler.scale(loss * (1e6 if overflows else 1.0)).backward()
            assert (
                all(
                    bool(p.grad.isfinite().all())
                    for g in optimizer.param_groups
                    for p in g["params"]
                )
                is not overflows
            )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return gate.verdicts()["optim.movement"]


def test_a_loss_scale_that_overflows_first_hides_no_climbing():
    verdict = scaled(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    assert verdict.outcome == "pass" and -0.99 < verdict.measured["uphill_cosine"] < -0.1
    verdict = scaled(lambda p: Climbs(p, lr=1e-3))
    assert verdict.outcome == "fail" and verdict.measured["uphill_cosine"] > 0.9
