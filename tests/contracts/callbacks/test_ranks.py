"""Gates of several ranks in trainers that are not ours, in real processes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'stackproof[hf]'")
pytest.importorskip("accelerate", reason="pip install 'stackproof[hf]'")

from stackproof.contracts.adapters import FOREIGN_RANK_EVENTS
from stackproof.contracts.callbacks import ranks
from stackproof.contracts.callbacks.rank_watch import RowLedger, odd_ranks
from stackproof.contracts.callbacks.repeat import (
    Call,
    StepRepeat,
    compare_weights,
    sketch,
    step_repeated,
)
from stackproof.contracts.distributed import OneProcessStep, RanksAreAlike
from stackproof.contracts.events import RanksJoined
from stackproof.contracts.gate import limits_of, resolve
from stackproof.museum.ranks import pool
from stackproof.spec import ROOT
from stackproof.spec.gates import load_spec
from stackproof.spec.records import read_record
from tests.processes import server

JOBS = "tests.contracts.callbacks.rank_jobs"
GATES = [f"distributed.{name}" for name in ("ranks", "rows", "one-process-step", "replicas")]


@pytest.fixture(scope="module")
def processes():
    lightning = ("lightning.pytorch",) if find_spec("lightning") else ()
    server()
    with pool((JOBS, *lightning)) as found:
        yield found


@pytest.fixture
def both(processes, tmp_path):
    """What a run of the script gives on each rank."""

    def run(name: str) -> list[dict]:
        answers = processes.run(f"{JOBS}:run", name, tmp_path / "run")
        assert not [a.raised for a in answers if a.raised]
        return [answer.value for answer in answers]

    return run


def test_a_clean_run_is_green_with_one_record_and_one_log(both, tmp_path):
    first, second = both("clean")
    assert first["error"] is second["error"] is None and first["red"] == second["red"] == {}
    assert first["outcomes"] == second["outcomes"] and first["weights"] == second["weights"]
    green = {g for g, outcome in first["outcomes"].items() if outcome == "pass"}
    assert {*GATES, "checkpoint.reloads", "loss.logit-gradient"} <= green
    record = read_record(tmp_path / "run" / "record" / "metadata.json")
    assert record.environment["world_size"] == 2 and record.status == "completed"
    assert {g.id for g in record.gates} >= {*GATES}
    series = tmp_path / "run" / "record" / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in series.read_text().splitlines()]
    assert steps == list(range(1, 9)), "one line for each step"
    lines = (tmp_path / "run" / "record" / "gates.jsonl").read_text().splitlines()
    preflight = [json.loads(line)["gate"] for line in lines if '"step": null' in line]
    assert len(preflight) == len(set(preflight)) > 3, "one line for each preflight gate"


def test_a_mean_over_ranks_that_is_declared_is_green(both):
    for found in both("declared mean of ranks"):
        assert found["red"] == {} and found["outcomes"]["distributed.one-process-step"] == "pass"


PLANTS = {
    "not connected": ("distributed.ranks", 0, "2 processes were started"),
    "own weights": ("distributed.replicas", 0, "weights.model.embed_tokens.weight"),
    "moved on one": ("distributed.replicas", 1, "weights.model.embed_tokens.weight"),
    "moved before a save": ("distributed.replicas", 2, "weights.model.embed_tokens.weight"),
    "moved, not compared": ("checkpoint.reloads", 2, "two processes hold 1 other tensor"),
    "same rows": ("distributed.rows", 4, "8 on more than one rank"),
    "own order": ("distributed.rows", 8, "on more than one rank"),
    "never reduced": ("distributed.one-process-step", 1, "the gradient of 20 tensors"),
    "mean of ranks": ("distributed.one-process-step", 1, "the tokens of rank"),
    "divided twice": ("distributed.one-process-step", 1, "is off by 0.5,"),
    "own loss logged": ("distributed.one-process-step", 3, "the loss of 2"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_ends_all_ranks_with_its_gate(both, name):
    gate, step, text = PLANTS[name]
    for found in both(name):
        assert found["red"] == {gate: step}
        assert found["error"].startswith(f"GateFailed: gate {gate} failed")
        assert text in found["error"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((1, 2, 1), " on rank 1"),
        ((1, 2, 3, 1, 1), " on rank 1, 2"),
        ((1, 2), ""),
        ((1, 1, 2, 2), ""),
    ],
)
def test_ranks_that_differ_from_most_are_named(values, named):
    assert odd_ranks("w", [{"w": value, "v": 0} for value in values]) == named


def test_ranks_that_do_not_hold_a_part_are_not_counted():
    holders = [{}] * 5 + [{"w": 1}, {"w": 1}, {"w": 2}]
    assert odd_ranks("w", holders) == " on rank 7"
    assert odd_ranks("w", [{}] * 6 + [{"w": 1}, {"w": 2}]) == ""


def test_what_is_red_on_one_rank_ends_all_with_its_number(both):
    first, second = both("unshifted on one")
    assert first["red"] == second["red"] == {"loss.logit-gradient": 1}
    assert "gate loss.logit-gradient failed: rank 1: step 1" in first["error"]
    assert "gate loss.logit-gradient failed: step 1" in second["error"]


def test_an_order_that_does_not_change_is_a_warning_of_every_rank(both):
    for found in both("one order"):
        assert found["error"] is None and found["red"] == {"data.fresh-rows": 4}


def test_a_rank_that_has_ended_is_not_waited_for(processes):
    """By the gates. Ranks that reduce gradients wait for it before."""
    for steps, red in (([3, 3], {}), ([5, 3], {"distributed.replicas": 4})):
        first, second = processes.run(f"{JOBS}:loop", steps)
        assert not first.raised and not second.raised
        assert first.value["red"] == red and second.value["red"].keys() == red.keys()
        assert not red or "number of steps" in first.value["message"]
        assert first.value["groups"] == second.value["groups"] == 0


def test_a_callback_on_one_rank_alone_is_an_error_and_no_hang(processes, tmp_path):
    first, second = processes.run(f"{JOBS}:run_on_one", tmp_path / "run")
    assert "not every process has opened the gates" in first.value["error"]
    assert "Connection closed" in second.raised or "gloo" in second.raised


def test_lightning_is_judged_but_for_its_gradient(processes, tmp_path):
    pytest.importorskip("lightning", reason="pip install 'stackproof[lightning]'")
    for sampler in (True, False):
        answers = processes.run(f"{JOBS}:lightning", tmp_path / str(sampler), sampler)
        assert not [a.raised for a in answers if a.raised]
        for found in (a.value for a in answers):
            outcomes = [found["outcomes"][g] for g in GATES]
            assert outcomes == ["pass", "pass" if sampler else "fail", "not_run", "pass"]
            assert "updated the weights before" in found["messages"][GATES[2]]
            assert bool(found["error"]) is not sampler
            assert found["red"] == ({} if sampler else {"distributed.rows": 4})
    assert read_record(tmp_path / "True" / "record" / "metadata.json").status == "completed"


@pytest.mark.slow
def test_torchrun_ends_with_an_error_that_names_the_gate_on_both_ranks(tmp_path):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.contracts.callbacks.torchrun_script", tmp_path],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1
    assert "gate loss.logit-gradient failed: rank 1: step 1" in done.stderr
    assert "gate loss.logit-gradient failed: step 1" in done.stderr
    record = read_record(tmp_path / "record" / "metadata.json")
    assert record.status == "halted" and record.environment["world_size"] == 2


# --- instruments ----------------------------------------------------------------------------------


def dealt(ledger, *steps, epoch=None):
    """The last event of some steps, each given as the rows of every rank."""
    events = [ledger.dealt(i, rows, epoch) for i, rows in enumerate(steps)]
    return events[-1]


def test_rows_are_told_apart_from_equal_rows_of_the_data():
    distinct = [list(range(0, 8)), list(range(10, 18))]
    assert dealt(RowLedger(2), [r[:7] for r in distinct]) is None, "too few"
    assert dealt(RowLedger(2), distinct).n_repeated == 0
    assert dealt(RowLedger(2), [distinct[0]] * 2).n_repeated == 8
    assert dealt(RowLedger(2), [[0, 1, *range(2, 8)], [0, 1, *range(12, 18)]]).n_repeated == 2
    # A row that stands in the data many times comes twice on one rank as well.
    assert dealt(RowLedger(2), [[0, 0, *range(2, 8)], [0, 0, *range(12, 18)]]).n_repeated == 0


def test_an_epoch_may_end_with_rows_of_its_beginning_and_no_more():
    def epoch(second):
        first = [list(range(4 * i, 4 * i + 4)) for i in range(8)]
        return list(zip(first, second))

    clean = [list(range(100 + 4 * i, 104 + 4 * i)) for i in range(8)]
    filled = [*clean[:7], [0, 1, 2, 3]]
    shuffled = [list(range(4 * i, 4 * i + 4)) for i in reversed(range(8))]
    assert dealt(RowLedger(2), *epoch(clean), epoch=0).n_repeated == 0
    assert dealt(RowLedger(2), *epoch(filled), epoch=0).n_repeated == 0
    assert dealt(RowLedger(2), *epoch(shuffled), epoch=0).n_repeated > 8
    # In another epoch the same rows come again, on any rank.
    ledger = RowLedger(2)
    dealt(ledger, *epoch(clean), epoch=0)
    assert dealt(ledger, *[(b, a) for a, b in epoch(clean)], epoch=1).n_repeated == 0


def weights(*ranks):
    return [{"weight": w, "counts": [n, n, n], "half": False} for w, n in ranks]


@pytest.mark.parametrize(
    ("found", "declared", "error"),
    [
        (weights((2 / 40, 10), (2 / 40, 30)), False, 0.0),  # a mean over ranks of sums / N
        (weights((1 / 40, 10), (1 / 40, 30)), False, 0.0),  # a sum
        (weights((1 / 10, 10), (1 / 30, 30)), False, 1.0),  # a mean of means
        (weights((1 / 10, 10), (1 / 30, 30)), True, 0.0),
        (weights((1 / 20, 20), (1 / 20, 20)), False, 0.0),  # with equal counts
    ],
)
def test_the_weight_of_a_token_is_that_of_one_process(found, declared, error):
    assert compare_weights(found, declared)[0] == pytest.approx(error, abs=1e-12)


STEP_OF_4 = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("started", "outcome"),
    [
        ({}, "pass"),  # sbatch --ntasks 4, whose script starts one process without srun
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "pass"),  # salloc -n 4
        (STEP_OF_4, "fail"),  # srun -n 4
    ],
)
def test_the_tasks_of_a_slurm_job_are_processes_within_a_step_alone(monkeypatch, started, outcome):
    for name in (*ranks.STARTED, *ranks.RANK):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"} | started).items():
        monkeypatch.setenv(name, value)
    found = ranks.Ranks.joined()
    assert found.is_main is (outcome == "pass")
    gate = RanksAreAlike(limits_of(load_spec().gates["distributed.ranks"]))
    event = RanksJoined(0, found.world_size, found.n_started, 1, ())
    assert gate.observe(event).outcome == outcome


def test_a_group_that_the_trainer_has_destroyed_is_left_without_an_error():
    assert ranks.Ranks(1, 2, 2, group=object()).left() == ranks.Ranks(1, 1, 2)


class Once(torch.nn.Module):
    """A model that is called a second time in vain."""

    def __init__(self, error: Exception):
        super().__init__()
        self.net, self.error, self.calls = torch.nn.Linear(3, 5), error, 0

    def forward(self, values):
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return self.net(values)


@pytest.mark.parametrize(
    "error", [ValueError("called twice"), IndexError(), RuntimeError("memory")]
)
def test_a_pass_that_cannot_be_repeated_ends_the_comparison_and_not_the_training(error):
    model, values = Once(error), torch.ones(1, 2, 3)
    repeat, call = StepRepeat(model, 64), Call.of(model, (values,), {})
    logits = model(values)
    repeat.add(call, torch.ones_like(logits), None, None)
    repeat.settle()
    assert model.calls == 2 and f"{type(error).__name__}: {error}" in repeat.unknown
    repeat.settle()
    assert model.calls == 2, "a pass is made again once"
    document = weights((1 / 4, 4))[0] | repeat.end(1.0) | {"unknown": repeat.unknown}
    assert step_repeated(1, repeat.names, [document], False).unknown == repeat.unknown


def gradients(n_ranks: int, change) -> list[dict]:
    """Sketches of random gradients that are averaged, after a change of the reduced ones."""
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(n_ranks, 3, 5000, generator=draw)
    reduced = change(own, own.mean(0).expand(n_ranks, 3, 5000).clone())
    return [
        {
            "own": torch.stack([sketch(g, 64) for g in own[r]]),
            "reduced": torch.stack([sketch(g, 64) for g in reduced[r]]),
            "unknown": "",
        }
        | weights((n_ranks / 40, 40 // n_ranks))[0]
        for r in range(n_ranks)
    ]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda own, reduced: reduced, "pass"),
        (lambda own, reduced: reduced * 0.5, "fail"),
        (lambda own, reduced: own, "fail"),
        (lambda own, reduced: torch.cat([reduced[:, :2], own[:, 2:]], 1), "fail"),
        # A term of the loss beside the logits, and a reduction in few bits: not judged.
        (lambda own, reduced: reduced + 0.1 * own.roll(1, 2).mean(0), "not_run"),
        (lambda own, reduced: reduced.bfloat16().float(), "not_run"),
    ],
)
def test_a_wrong_reduction_is_told_apart_from_what_does_not_come_from_the_logits(change, outcome):
    event = step_repeated(1, ["a", "b", "c"], gradients(2, change), False)
    gate = OneProcessStep(limits_of(load_spec().gates["distributed.one-process-step"]))
    assert gate.observe(event).outcome == outcome


def test_every_event_that_these_gates_watch_is_emitted_by_trainers_that_are_not_ours():
    spec = load_spec()
    watched = {e for g in GATES for e in resolve(spec.gates[g]).events}
    assert watched == set(FOREIGN_RANK_EVENTS)
    on_ranks = {g.id for g in spec.required("foreign") if g.min_ranks > 1}
    assert on_ranks == set(GATES)
