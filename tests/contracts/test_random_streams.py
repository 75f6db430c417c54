"""The gate of random streams: green on the stack, red on its plants and on other formulas."""

import numpy as np
import pytest
import torch

from stackproof.config import HardCapacity, MixtureOfDepths
from stackproof.contracts.gate import call_check
from stackproof.contracts.random_streams import shuffled_windows, stream_seed
from stackproof.data import permutation
from stackproof.data.sampler import Source
from stackproof.model import dropout
from stackproof.museum.plant import load_museum
from stackproof.subject.assemble import subject_of
from stackproof.train.rng import stream_seed as seed_of_stack

CPU = torch.device("cpu")
GATE = "runtime.streams"


def verdict(spec, cfg, dataset, **changes):
    """The verdict on a configuration whose model has these changes."""
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=changes)})
    return call_check(spec.gates[GATE], subject_of(cfg, dataset, CPU))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.0},
        {"dropout": 0.01},
        {"dropout": 0.1},
        {"dropout": 0.5, "n_layers": 3},
        {"dropout": 0.1, "depth": MixtureOfDepths(every=1, gate=HardCapacity())},
    ],
    ids=str,
)
def test_gate_is_green_on_the_stack(spec, small_cfg, dataset, changes):
    found = verdict(spec, small_cfg, dataset, **changes)
    assert found.passed, found.message
    assert found.measured["rows"] > 0 and found.measured["wrong_elements_frac"] == 0
    assert (found.measured["elements"] > 0) == (changes["dropout"] > 0 and "depth" not in changes)


def test_gate_is_green_in_bfloat16(spec, small_cfg, dataset):
    train = small_cfg.train.model_copy(update={"dtype": "bfloat16"})
    for seed in range(5):
        cfg = small_cfg.model_copy(update={"train": train, "seed": seed})
        found = verdict(spec, cfg, dataset, dropout=0.1)
        assert found.passed, found.message
        print(found.measured)
        assert found.measured["wrong_elements_frac"] < 1e-3, "measured at most 6e-4"


def test_gate_is_red_on_its_plants(spec, small_cfg, dataset):
    for plant_id in spec.gates[GATE].plants:
        with load_museum()[plant_id].apply():
            found = verdict(spec, small_cfg, dataset, dropout=0.1)
            assert found.outcome == "fail", plant_id
            assert found.measured["wrong_rows"] > 0 and found.measured["wrong_elements_frac"] > 0.1


def _minus(x, key):
    return _mix(x, -key)


_mix = permutation._mix


@pytest.mark.parametrize(
    ("target", "name", "other"),
    [
        (permutation, "_mix", _minus),
        (permutation, "ROUNDS", 5),
        (dropout, "ROUNDS", 9),
        (dropout, "KEY_STEPS", (0x9E3779B9, 0xBB67AE86)),
    ],
)
def test_gate_is_red_on_another_stream(spec, small_cfg, dataset, monkeypatch, target, name, other):
    monkeypatch.setattr(target, name, other)
    found = verdict(spec, small_cfg, dataset, dropout=0.1)
    assert found.outcome == "fail", "one round or constant is another"


@pytest.mark.parametrize("n_windows", [1, 2, 7, 64, 257, 1000])
def test_the_order_is_that_of_the_stack(n_windows):
    source, names = Source("a", 5, n_windows, 1.0, 1.0, 0.0), {1: "", 3: "a"}
    for n_sources, name in names.items():
        n_rows = n_windows + n_windows // 2 + 1
        found = list(shuffled_windows(99, source, n_sources, n_rows))
        for epoch, start in ((0, 0), (1, n_windows)):
            part = found[start : start + n_windows]
            places = np.arange(len(part))
            key = permutation.order_key(99, epoch, name)
            truth = 5 + permutation.permute(places, n_windows, key)
            assert part == truth.tolist()


def test_seeds_are_those_of_the_stack():
    for seed, name in ((0, "order"), (7, "dropout-masks"), (2**40, "init")):
        assert stream_seed(seed, name) == seed_of_stack(seed, name)
