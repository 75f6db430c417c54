"""Each check of the events of another trainer, on numbers alone: one step inside its limit it is
green, one step outside red.
"""

from dataclasses import replace

import pytest
import torch

from stackproof.contracts.callbacks import reading
from stackproof.contracts.callbacks.reading import STRIPS, is_ahead, read, silent_places
from stackproof.contracts.events import (
    GradientsAccumulated,
    LossMeasured,
    ModelInput,
    ModuleModes,
    RatesUsed,
    Started,
    StateCompared,
    StateRestored,
    WeightsUpdated,
)
from stackproof.contracts.gate import limits_of, resolve
from stackproof.spec.gates import load_spec

BATCH = ModelInput(1, 2, 8, 16, 0, 31, 32, 16, 9, 2, 2)
LOSS = LossMeasured(1, 3.4, 100, 32, n_judged=64, weight_min=0.999, weight_max=1.001)
GRADIENTS = GradientsAccumulated(1, 4, 0.0, 0, 1e-6)
UPDATED = WeightsUpdated(1, 1e-3, moved_frac=0.5)
RATES = RatesUsed(3, {"a": 1e-3, "b": 1e-3}, {"a": 1e-3, "b": 1e-3}, 2, 2)
MODE = ModuleModes(1, "evaluation", (), 0.0)
STATE = StateRestored(5, (), 12)
CASES = [
    (
        "data.learnable-batch",
        BATCH,
        [
            {"max_id": 32},
            {"min_id": -1},
            {"length": 17},
            {"n_valid": 0},
            {"n_stops_learned": 0},
            {"n_padding_labels": 1},
            {"n_left_padded": 1},
            {"n_places": 9, "n_places_up": 4},
        ],
    ),
    (
        "loss.logit-gradient",
        LOSS,
        [
            {"n_off_target": 1, "offset": 0},
            {"n_changed_rows": 1},
            {"weight_min": 0.99},
            {"weight_max": 1.03, "half": True},
            {"single_max": 1.5, "half": True},
            {"n_masked_learned": 1},
            {"weight_max": float("nan")},
        ],
    ),
    ("loss.first", LOSS, [{"mean_nats": 4.5}, {"reported_nats": 3.4001}]),
    (
        "optim.gradient-kept",
        GRADIENTS,
        [
            {"stale_norm": 1e-9},
            {"lost": 1},
            {"factor_spread": 0.03},
            {"factor_spread": float("nan")},
            {"micro_steps": 33, "usual": 4},
            {"micro_steps": 1025},
        ],
    ),
    (
        "optim.movement",
        UPDATED,
        [
            {"frozen_changed": ("a",)},
            {"longest_still": 4},
            {"uphill": 1e-9},
            {"uphill": float("nan")},
        ],
    ),
    ("optim.movement", StateCompared(16, "section", 20, ()), [{"differing": ("a",)}]),
    ("schedule.rate", RATES, [{"used": {"a": 1e-3, "b": 1.001e-3}}, {"ticks": 3}]),
    ("runtime.mode", MODE, [{"wrong": ("drop",)}, {"repeat_abs": 1e-6}]),
    ("checkpoint.state-restored", STATE, [{"differing": ("weights.a",)}, {"compared": 0}]),
]


def watcher(gate_id):
    gate = load_spec().gates[gate_id]
    check = resolve(gate)(limits_of(gate))
    if Started in check.events:
        assert check.observe(Started(0, {})) is None
    return check


@pytest.mark.parametrize(("gate_id", "event", "changes"), CASES, ids=[c[0] for c in CASES])
def test_each_check_is_green_inside_and_red_outside(gate_id, event, changes):
    assert watcher(gate_id).observe(event).outcome == "pass"
    for change in changes:
        assert watcher(gate_id).observe(replace(event, **change)).outcome == "fail", change


@pytest.mark.parametrize(
    ("gate_id", "event", "unmeasured", "fields"),
    [
        ("runtime.mode", MODE, {"repeat_abs": None}, {"repeat_abs"}),
        ("optim.movement", replace(UPDATED, uphill=-0.5), {"uphill": None}, {"uphill_cosine"}),
        (
            "optim.movement",
            UPDATED,
            {"changed_frac": 1.0, "moved_frac": None},
            {"frozen_moved", "longest_still", "moved_frac"},
        ),
    ],
)
def test_a_field_that_was_not_measured_is_left_out(gate_id, event, unmeasured, fields):
    measured = set(watcher(gate_id).observe(event).measured)
    without = set(watcher(gate_id).observe(replace(event, **unmeasured)).measured)
    assert fields <= measured and not fields & without


def test_gradient_kept_sees_a_tensor_scaled_alone():
    verdict = watcher("optim.gradient-kept").observe(replace(GRADIENTS, factor_spread=0.5))
    assert verdict.outcome == "fail" and "factors 0.5 apart" in verdict.message


def test_movement_counts_updates_without_a_change():
    check = watcher("optim.movement")
    assert [check.observe(replace(UPDATED, longest_still=n)).outcome for n in (2, 3, 4)] == [
        "pass",
        "pass",
        "fail",
    ]


def test_a_rate_may_be_zero_once():
    check, zero = watcher("schedule.rate"), RatesUsed(1, {"a": 0.0}, {"a": 0.0})
    assert [check.observe(e).outcome for e in (zero, RATES, zero, zero)] == [
        "pass",
        "pass",
        "pass",
        "fail",
    ]


def test_nothing_that_could_be_judged_is_no_pass():
    assert watcher("loss.logit-gradient").observe(replace(LOSS, n_judged=0)).outcome == "not_run"


def fetched(*given, **told):
    return reading.resolve([read(*given, **told)])[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_target_and_weight_are_read_off_a_gradient(dtype, offset):
    """Worst relative weight error over 20 draws and three offsets: 3.5e-7 in float32,
    2.6e-3 in bfloat16.
    """
    draw = torch.Generator().manual_seed(offset)
    ids = torch.randint(0, 50, (3, 12), generator=draw)
    logits = torch.randn(3, 12, 50, generator=draw).to(dtype).requires_grad_()
    targets = torch.full_like(ids, -100)
    targets[:, :-2] = ids[:, offset : offset + 10]
    (
        0.25
        * torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
    ).backward()
    found = fetched(logits.detach(), logits.grad, ids, torch.zeros(3, 11, dtype=torch.bool))
    same = (ids[:, 1:11] == targets[:, :10]).flatten().tolist()
    assert found.n_learned == found.n_judged == 30
    assert all(o == offset or (o == 1 and s) for o, s in zip(found.offsets, same))
    assert max(abs(w - 0.25) for w in found.weights) < 0.25 * (
        1e-5 if dtype == torch.float32 else 1e-2
    )


def test_a_gradient_is_read_through_a_head_as_at_the_logits():
    draw = torch.Generator().manual_seed(3)
    ids, head = torch.randint(0, 50, (2, 9), generator=draw), torch.randn(50, 24, generator=draw)
    hidden = torch.randn(2, 9, 24, generator=draw).requires_grad_()
    logits = hidden @ head.T
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = fetched(
        hidden.detach(), hidden.grad, ids, torch.zeros(2, 8, dtype=torch.bool), head=head
    )
    assert set(found.offsets) == {1} and max(abs(w * 16 - 1) for w in found.weights) < 1e-4


def test_silence_is_read_from_labels_of_either_convention_mask_or_trailing_padding():
    ids = torch.tensor([[5, 6, 7, 1, 0, 0]])
    labels = torch.tensor([[5, 6, 7, 1, -100, -100]])
    ahead = torch.tensor([[6, 7, 1, -100, -100, -100]])
    wanted = [[False, False, False, True, True]]
    assert not is_ahead(ids, labels) and is_ahead(ids, ahead)
    assert silent_places(ids, None, labels, None, None).tolist() == wanted
    assert silent_places(ids, None, ahead, None, None).tolist() == wanted
    assert silent_places(ids, (ids > 0).long(), None, None, None).tolist() == wanted
    assert silent_places(ids, None, None, 0, 1).tolist() == wanted
    assert silent_places(ids, None, None, 0, 0).tolist() == [[False, False, False, False, True]]


def test_a_nan_among_the_values_is_found_at_its_place_at_once_and_in_one_column_within_all_turns():
    ids, silent = (
        torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3)),
        torch.zeros(2, 8, dtype=torch.bool),
    )
    clean, gradient = torch.zeros(2, 9, 50), torch.full((2, 9, 50), 0.01)
    place, column = clean.clone(), clean.clone()
    # the last place of a row is never among those judged one by one
    place[1, 8], column[1, 8, 37] = torch.nan, torch.nan
    found = {
        name: sum(not fetched(values, gradient, ids, silent, turn=t).finite for t in range(STRIPS))
        for name, values in (("clean", clean), ("place", place), ("column", column))
    }
    assert found == {"clean": 0, "place": STRIPS, "column": 1}


@pytest.mark.parametrize("n", [0, 1, 5, 63, 64, 65, 300])
def test_places_are_spread_over_all_that_count_without_waiting_for_the_device(n):
    flags = torch.zeros(4, 100, dtype=torch.bool)
    chosen = torch.randperm(400, generator=torch.Generator().manual_seed(n))[:n].sort().values
    flags.view(-1)[chosen] = True
    rows, at, counts = reading._spread(flags, torch.zeros_like(flags))
    found = (rows * 100 + at)[counts]
    wanted = chosen[torch.linspace(0, max(n - 1, 0), min(64, n)).round().long()]
    assert found.tolist() == wanted.tolist()
