"""Every gate kills its plants; what is no kill is never counted as one."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from stackproof.cli import app
from stackproof.contracts.gate import failed, passed
from stackproof.museum import observe, script
from stackproof.museum import prove as prover
from stackproof.museum.edit import Edit
from stackproof.museum.matrix import matrix
from stackproof.museum.plant import Plant, load_museum, swap, touch
from stackproof.spec.errors import GateFailed
from stackproof.spec.failures import load_catalogue

PARTS = 2  # each has a control run of its own


def command_line(arguments):
    """Performs a command line in this process; raises what the command raises."""
    get_command(app).main(arguments, prog_name="stack", standalone_mode=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_plant_is_killed_by_its_gate_and_every_control_is_green(spec, part):
    """All of one process at each commit: a plant goes into code that changes without it or its
    gate, which makes older records stale. Of gates of several ranks,
    tests/distributed/test_gates.py proves one plant each, and `make prove` all.
    """
    gates = sorted(g.id for g in spec.gates.values() if g.min_ranks == 1)[part::PARTS]
    kills = prover.prove(gates, command_line)
    assert [(k.plant, k.outcome, k.message) for k in kills if k.outcome != "killed"] == []
    assert [(k.gate, k.control) for k in kills if k.control != "pass"] == []
    assert {k.plant for k in kills} == {
        p.id for p in load_museum().values() if p.gate in gates
    } and len(kills) >= 10


def test_each_gate_has_a_plant_and_each_plant_a_story(spec):
    museum = load_museum()
    assert len(museum) >= 30
    for gate in spec.gates.values():
        assert gate.plants and all(museum[p].gate == gate.id for p in gate.plants)
    for plant in museum.values():
        assert len(plant.story) > 80 and plant.sources and plant.title


def test_a_plant_is_put_into_the_trainer_that_it_changes(spec):
    """Plants in the script run there, all others in our own trainer, and each gate is for the
    trainer of each of its plants.
    """
    museum = load_museum()
    assert museum["evaluation.foreign-dropout-on"].trainer == "script"
    assert museum["runtime.nan-in-a-weight"].trainer == "stack", "a function"
    assert museum["data.silent-wrap"].trainer == "stack", "an edit"
    for plant in museum.values():
        assert plant.trainer in prover.trainers_of(spec.gates[plant.gate]), plant.id


def test_a_gate_of_both_trainers_is_green_only_if_it_is_green_in_both(spec, monkeypatch):
    """Each control runs in its own trainer; one that is not green is the control of every plant
    of the gate, and the measurements beside a plant are those of its own trainer.
    """
    gate = spec.gates["optim.clip-norm"]
    assert prover.trainers_of(gate) == ("stack", "script")
    with prover.workshop() as root:
        controls = prover.Prover(root).control([gate])
    assert {key: c.outcome for key, c in controls.items()} == {
        (gate.id, "stack"): "pass",
        (gate.id, "script"): "pass",
    }
    both = [c.measured["clipped_grad_norm"] for c in controls.values()]
    assert both[0] != both[1], "each trainer has its own measurements"
    controls[gate.id, "script"] = prover.Control("fail", {"clipped_grad_norm": 9.0})
    judge = SimpleNamespace(spec=spec, planted=lambda *a: prover.Seen("killed", failed("red")))
    kill = prover._prove_one(judge, gate, load_museum()[gate.plants[0]], gate.plants[0], controls)
    assert kill.control == "fail" and kill.control_measured["clipped_grad_norm"] == both[0]


def test_a_plant_in_the_script_that_changes_nothing_is_equivalent(spec):
    """The trained weights of the script decide, where the gate measures the same."""
    gate = spec.gates["optim.clip-norm"]

    def plant(old, new):
        edit = Edit("stackproof.museum.script:make_optimizer", old, new)
        return Plant("x.y", gate.id, "t", "s", ("u",), edits=(edit,))

    with prover.workshop() as root:
        judge = prover.Prover(root)

        def blind(gate, trainer, *callbacks):
            script.make_optimizer(script.Small())
            return passed(z=1.0), None

        judge._run = blind
        clean = prover.Control("pass", {"z": 1.0})
        assert judge.planted(gate, plant("lr=1e-3", "lr=0.001"), clean).outcome == "equivalent"
        assert judge.planted(gate, plant("lr=1e-3", "lr=2e-3"), clean).outcome == "missed"


def test_a_plant_leaves_no_trace():
    """After its context every patched attribute is what it was."""
    from stackproof.data import data_loader
    from stackproof.train import checkpoint, losses, step

    watched = [
        (m, n, v)
        for m in (data_loader, checkpoint, losses, step)
        for n, v in vars(m).items()
        if callable(v)
    ]
    for plant in load_museum().values():
        with plant.apply():
            pass
    assert all(vars(m)[n] is v for m, n, v in watched)


@contextmanager
def doing(action):
    action()
    yield


def acting(apply, plant_id="x.y", gate_id="loss.golden"):
    """A plant that does what `apply` makes."""

    class Acting(Plant):
        def apply(self):
            return apply()

    return Acting(plant_id, gate_id, "t", "s", ("u",), function="loss:mean_of_means")


def seen(
    spec,
    verdict,
    *,
    plant_action=touch,
    error=None,
    step=None,
    gate_id="loss.golden",
    plant_id="x.y",
    brings=1,
    measured=None,
):
    """What the prover makes of a verdict of a gate under a plant that does `plant_action`; `brings`
    is what a run then brings forth.
    """
    gate = spec.gates[gate_id]
    plant = acting(lambda: doing(plant_action), plant_id, gate.id)

    class Scripted(prover.Prover):
        def __init__(self):
            self.root, self.cfg, self.spec, self.catalogue = (
                Path("/nonexistent"),
                None,
                spec,
                load_catalogue(),
            )
            self._fruits = {"stack": 1, "export": 1}

        def _run(self, gate, trainer, *callbacks):
            if error:
                raise error
            return verdict, step

        def _brought_forth(self, kind):
            return brings

    return Scripted().planted(gate, plant, prover.Control("pass", measured or {}))


def nothing():
    return None


def test_outcomes_are_told_apart(spec):
    assert seen(spec, failed("red")).outcome == "killed"
    assert seen(spec, None, error=RuntimeError("boom")).outcome == "crashed"
    assert seen(spec, passed(), brings=2).outcome == "missed", (
        "a run brings forth something else, and the gate is green"
    )
    assert seen(spec, passed(z=2.0), measured={"z": 1.0}).outcome == "missed", (
        "the gate measures something else, and is green"
    )
    assert seen(spec, passed(z=1.0), measured={"z": 1.0}).outcome == "equivalent", (
        "it ran, and nothing differs"
    )


def test_a_line_that_never_ran_kills_nothing(spec):
    """Neither where the gate is green nor where it is red for another reason,
    nor where it would halt a run.
    """
    assert seen(spec, passed(), plant_action=nothing).outcome == "equivalent"
    red = seen(spec, failed("red"), plant_action=nothing)
    assert red.outcome == "equivalent" and "never ran" in red.verdict.message
    halted = seen(spec, None, error=GateFailed("loss.golden", failed("red")), plant_action=nothing)
    assert halted.outcome == "equivalent"


def test_another_gate_firing_is_no_kill(spec):
    assert seen(spec, None, error=GateFailed("loss.golden", failed("red"))).outcome == "killed"
    assert seen(spec, None, error=GateFailed("data.order", failed("red"))).outcome == "missed"


def test_a_kill_that_comes_too_late_is_none(spec):
    """SF-R06 says eight steps; this plant began with the first, as no step was logged before it."""
    late = dict(gate_id="runtime.loss-spike", plant_id="runtime.lr-spike")
    assert load_catalogue().deadline(spec.gates["runtime.loss-spike"], "runtime.lr-spike") == (
        "within k steps",
        8,
    )

    def began_at_one(self, line_step):
        return line_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prover.Clock, "lived", began_at_one)
        assert seen(spec, failed("red"), step=8, **late).outcome == "killed"
        found = seen(spec, failed("red"), step=9, **late)
    assert (
        found.outcome == "missed"
        and "red 9 steps after it began, at most 8" in found.verdict.message
    )


def test_latency_counts_from_the_first_step_in_which_the_line_ran():
    clock = observe.Clock()
    clock.on_step(None, SimpleNamespace(step=1))
    touch()
    clock.on_step(None, SimpleNamespace(step=4))
    clock.on_step(None, SimpleNamespace(step=5))
    assert (clock.began, clock.lived(6)) == (4, 3)
    assert observe.Clock().lived(7) == 1, "seen before the first line of the log"


def test_what_a_run_brings_forth_tells_an_equivalent_plant_from_a_missed_one(tmp_path):
    """On the real stack: a renamed local is nothing, one percent of the learning rate is something;
    no gate is asked.
    """
    from stackproof.train import step as steps

    def plant(factor):
        original = steps.lr_at

        @contextmanager
        def apply():
            with swap(steps, "lr_at", lambda step, **declared: original(step, **declared) * factor):
                yield

        return acting(apply, f"x.{factor}")

    with prover.workshop() as root:
        judge = prover.Prover(root)
        gate = judge.spec.gates["loss.golden"]
        prover.use_cache(root / "cache")
        clean = prover.Control("pass", dict(judge.verdict_of(gate).measured))
        assert judge.planted(gate, plant(1.0), clean).outcome == "equivalent", (
            "a gate of preflight never runs the line"
        )

        def blind(gate, trainer, *callbacks):
            steps.lr_at(1, peak=1.0, schedule=judge.cfg.schedule, max_steps=9)
            return passed(**clean.measured), None

        judge._run = blind
        assert judge.planted(gate, plant(1.0), clean).outcome == "equivalent"
        assert judge.planted(gate, plant(1.01), clean).outcome == "missed"


def test_a_clean_run_tells_its_worst_and_not_its_last(spec):
    """Of a run whose second of three steps was the worst, in the direction of each limit."""
    gate = spec.gates["data.rows"]

    class Script:
        events = ()
        said = iter(
            [passed(valid_frac=0.9), passed(valid_frac=0.6), passed(valid_frac=0.8, other=3)]
        )

        def observe(self, event):
            return next(self.said)

    worst = {}
    check = observe._Attentive(Script(), gate.limits, worst)
    for _ in range(3):
        check.observe(None)
    assert worst == {"valid_frac": 0.6, "other": 3}


def test_matrix_shows_who_else_turns_red():
    """A missing file and a head too many are seen by the comparison as well, weights that are
    narrowed after it and another end of text are not; nothing is red without a plant.
    """
    rows = {row["plant"]: row for row in matrix(("export.folder",))}
    assert set(rows) == {
        "export.shard-left-out",
        "export.second-head",
        "export.narrowed-after-the-comparison",
        "export.other-end-of-text",
    }
    both = {"export.folder", "export.logit-parity"}
    documents = ("export.narrowed-after-the-comparison", "export.other-end-of-text")
    alone = {plant: {"export.folder"} for plant in documents}
    assert {p: set(row["red"]) for p, row in rows.items()} == dict.fromkeys(rows, both) | alone
    assert {row["asked"] for row in rows.values()} == {2}
    assert all(seen["seconds"] > 0 for row in rows.values() for seen in row["red"].values())


def test_a_row_of_the_matrix_stands_where_a_monitor_is_never_called(monkeypatch, spec):
    """All gates are waived there: the run has to come to its end and its record,
    and a gate that never looked is red.
    """
    wanted = {
        "runtime.evaluation-never-called": "runtime.cadence",
        "sampling.monitor-not-called": "sampling.coherence",
    }
    museum = {p: plant for p, plant in load_museum().items() if p in wanted}
    monkeypatch.setattr("stackproof.museum.matrix.load_museum", lambda: museum)
    held_out = ("evaluation.held-out", "evaluation.same-batches")
    few = {g: gate for g, gate in spec.gates.items() if g in (*wanted.values(), *held_out)}
    chosen = spec.model_copy(update={"gates": few})
    monkeypatch.setattr(prover, "load_spec", lambda: chosen)
    rows = {row["plant"]: row for row in matrix(tuple(wanted.values()))}
    assert rows.keys() == wanted.keys()
    for plant_id, row in rows.items():
        assert (
            row["raised"] == {}
            and wanted[plant_id] in row["red"]
            and row["gate"] == wanted[plant_id]
        )
    unevaluated, unsampled = (row["red"] for row in rows.values())
    assert unevaluated["runtime.cadence"]["step"] == 8, (
        "one step after the first evaluation was due"
    )
    assert {
        "evaluation.held-out",
        "evaluation.same-batches",
    } <= unevaluated.keys() and "sampling.coherence" not in unevaluated
    assert (
        unsampled["sampling.coherence"]["step"] is None and "evaluation.held-out" not in unsampled
    )


def test_swap_counts_calls_and_restores():
    class Owner:
        @staticmethod
        def value():
            return 1

    from stackproof.museum.plant import touches

    before = touches()
    with swap(Owner, "value", lambda: 2):
        assert Owner.value() == 2
    assert Owner.value() == 1 and touches() == before + 1


def test_a_plant_with_a_configuration_of_its_own_has_a_control_under_it(spec):
    gate = spec.gates["moe.balance"]
    plants = load_museum()
    term, bias = plants["moe.balance-left-out"], plants["moe.bias-sign-flipped"]
    with prover.workshop() as root:
        judge = prover.Prover(root)
        kinds = [judge.config(gate, p).model.ffn.balance.kind for p in (term, bias)]
        assert kinds == ["auxiliary-loss", "selection-bias"]
        controls = {(gate.id, "stack"): prover.Control("pass", {"formula_rel_error": 0.0})}
        kill = prover._prove_one(judge, gate, bias, bias.id, controls)
        assert (kill.outcome, kill.control) == ("killed", "pass")
        assert "skew_after" in kill.control_measured and "skew_after" in kill.measured
        judge._controls = dict.fromkeys(judge._controls, prover.Control("not_run", {}))
        assert prover._prove_one(judge, gate, bias, bias.id, controls).control == "not_run"
    assert bias.sha256 != Plant(**vars(bias) | {"museum": {}}).sha256
