"""Every gate kills its plants; what is no kill is never counted as one."""

from contextlib import contextmanager

import pytest

from contracts.gate import failed, passed
from stack.museum import prove as prover
from stack.museum.plant import PLANTS, Plant, load_museum, swap, touch


@pytest.mark.slow
def test_every_plant_is_killed_by_its_gate_and_every_control_is_green():
    kills = prover.prove(())
    assert [(k.plant, k.outcome, k.message) for k in kills if k.outcome != "killed"] == []
    assert [(k.gate, k.control) for k in kills if k.control != "pass"] == []
    assert len(kills) >= 30 and {k.plant for k in kills} == set(PLANTS)


def test_each_gate_has_a_plant_and_each_plant_a_story(spec):
    museum = load_museum()
    assert len(museum) >= 30
    for gate in spec.gates.values():
        assert gate.plants and all(museum[p].gate == gate.id for p in gate.plants)
    for plant in museum.values():
        assert len(plant.story) > 80 and plant.sources and plant.title


def test_a_plant_leaves_no_trace():
    """After its context every patched attribute is what it was."""
    from stack.data import reader
    from stack.train import checkpoint, losses, step

    watched = [(m, n, v) for m in (reader, checkpoint, losses, step) for n, v in vars(m).items() if callable(v)]
    for plant in load_museum().values():
        with plant.apply():
            pass
    assert all(vars(m)[n] is v for m, n, v in watched)


@contextmanager
def doing(action):
    action()
    yield


def outcome_of(spec, verdict, *, plant_action=touch, error=None):
    """What the prover calls a verdict of a gate under a plant that does `plant_action`."""
    gate = spec.gates["loss.golden"]
    plant = Plant("x.y", gate.id, "t", "s", ("u",), lambda: doing(plant_action), "0" * 64)

    class Scripted(prover.Prover):
        def __init__(self):
            self.root, self.spec = __import__("pathlib").Path("/nonexistent"), spec

        def _run(self, gate):
            if error:
                raise error
            return verdict, "before step 1"

    return Scripted().planted(gate, plant)[0]


def test_outcomes_are_told_apart(spec):
    assert outcome_of(spec, failed("red")) == "killed"
    assert outcome_of(spec, passed()) == "missed"
    assert outcome_of(spec, passed(), plant_action=lambda: None) == "equivalent"
    assert outcome_of(spec, None, error=RuntimeError("boom")) == "crashed"


def test_another_gate_firing_is_no_kill(spec):
    from spec.errors import GateFailed

    assert outcome_of(spec, None, error=GateFailed("loss.golden", failed("red"))) == "killed"
    assert outcome_of(spec, None, error=GateFailed("data.order", failed("red"))) == "missed"


def test_swap_counts_calls_and_restores():
    class Owner:
        @staticmethod
        def value():
            return 1

    from stack.museum.plant import touches

    before = touches()
    with swap(Owner, "value", lambda: 2):
        assert Owner.value() == 2
    assert Owner.value() == 1 and touches() == before + 1
