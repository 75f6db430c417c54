"""The resume certificate of several processes: what it compares, and real ones."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from stackproof.recipes import recipe
from stackproof.replay import certificate
from stackproof.replay.certificate import (
    HALF_LOSS_REL_MAX,
    LOSS_REL_MAX,
    Processes,
    differing_tensors,
    loss_distance,
    reasons_against,
    rows_by_source,
)
from stackproof.spec.errors import EnvironmentUnfit, RankLost, StackproofError
from stackproof.spec.records import read_record
from tests.cli.conftest import tiny
from tests.fault_injection.scale import STRESS

STATE = {"step": 8, "cursor": 64, "tokens_seen": 512, "curriculum": {}, "stopper": 1, "best": {}}


def loaded(**changes):
    weights = {"w": torch.tensor([1.0, -0.0])}
    moments = {"m": torch.tensor([float("nan")])}
    return SimpleNamespace(model=weights, tensors=moments, state=STATE | changes)


@pytest.mark.parametrize(
    ("processes", "changes", "distance", "reason"),
    [
        ((2, 2), {}, 0.0, None),
        ((2, 2), {}, 1e-9, "losses differ by 1e-09, more than 0"),
        ((2, 2), {"best": {"step": 4}}, 0.0, "best differs"),
        ((2, 4), {"best": {"step": 4}}, LOSS_REL_MAX, None),
        ((2, 4), {}, 2 * LOSS_REL_MAX, "losses differ by 2e-06, more than 1e-06"),
        ((2, 4), {}, float("nan"), "losses differ by nan, more than 1e-06"),
        ((2, 4, True), {}, HALF_LOSS_REL_MAX, None),
        ((2, 4, True), {}, 2 * HALF_LOSS_REL_MAX, "losses differ by 0.0004, more than 0.0002"),
        ((2, 2, True), {}, 1e-9, "losses differ by 1e-09, more than 0"),
        ((2, 4), {"cursor": 65}, 0.0, "cursor differs"),
        ((1, 1), {"step": 7}, 0.0, "step differs"),
    ],
)
def test_bits_count_on_one_number_of_processes_and_a_bound_on_another(
    processes, changes, distance, reason
):
    pair = loaded(), loaded(**changes)
    found = reasons_against(Processes(*processes), 8, *pair, [], distance, same_rows=True)
    assert found[:1] == ([reason] if reason else [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_is_that_of_the_precision(tmp_path, monkeypatch, dtype):
    for name in ("_finish", "_with_kills"):
        monkeypatch.setattr(certificate, name, lambda *given: None)
    monkeypatch.setattr(certificate, "_judge", lambda *given: given[-1])
    plan = {"steps": 24, "kills": 1, "sets": (f"train.dtype={dtype}",), "run_dir": tmp_path / "c"}
    found, _ = certificate.certify(recipe("pocket"), **plan, processes=Processes(1, 2))
    assert found == Processes(1, 2, half=dtype == "bfloat16")


@pytest.mark.parametrize(("said", "code"), [("error: gate x failed: 0.02\\n  got 3", 4), ("", -9)])
def test_a_run_that_fails_is_the_error_and_nothing_is_compared(tmp_path, monkeypatch, said, code):
    ends = f"import os; print('{said}', flush=True); "
    ends += f"os._exit({code})" if code > 0 else f"os.kill(os.getpid(), {-code})"
    monkeypatch.setattr(certificate, "_stack", lambda n, *given: [sys.executable, "-c", ends])
    plan = {"steps": 24, "kills": 1, "sets": (), "run_dir": tmp_path / "c"}
    with pytest.raises(StackproofError) as raised:
        certificate.certify(recipe("pocket"), **plan)
    record = read_record(tmp_path / "c" / "metadata.json")
    wanted = code if code > 0 else RankLost.exit_code
    assert (record.status, record.exit_code, raised.value.exit_code) == ("failed", wanted, wanted)
    cause = "gate x failed: 0.02" if said else "it has stated no error"
    assert raised.value.what == record.end_reason and raised.value.what.endswith(f": {cause}")
    assert "nothing was compared" in record.end_reason
    assert "straight.log" in raised.value.next_step and not (tmp_path / "c/killed.log").exists()


def test_a_run_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "DEADLINE_S", 0.01)
    with pytest.raises(RankLost, match="did not end within"):
        certificate._finish([sys.executable, "-c", WITHOUT_LAUNCHER], tmp_path / "straight")


def test_one_differing_tensor_counts_on_one_number_of_processes_alone():
    given = 8, loaded(), loaded(), ["m"], 0.0, True
    assert reasons_against(Processes(2, 2), *given) == ["1 tensors differ, the first is m"]
    assert reasons_against(Processes(2, 1), *given) == []


def test_each_step_draws_as_many_rows_of_each_source_on_any_number_of_processes(tmp_path):
    def log(name: str, *rows: dict[str, int]) -> Path:
        (tmp_path / name).mkdir()
        lines = [{"event": "rows", "rows": one, "step": i} for i, one in enumerate(rows, start=1)]
        lines.append({"event": "phase", "step": len(name)})
        (tmp_path / name / "curriculum.jsonl").write_text(
            "".join(f"{json.dumps(x)}\n" for x in lines)
        )
        return tmp_path / name

    one = rows_by_source(log("one", {"a": 3, "b": 1}, {"a": 2, "b": 2}))
    again = rows_by_source(log("again", {"a": 3, "b": 1}, {"a": 2, "b": 2}))
    other = rows_by_source(log("other", {"a": 2, "b": 2}, {"a": 3, "b": 1}))
    assert one == again and len(one) == 2 and one != other
    given = Processes(2, 4), 8, loaded(), loaded(), [], 0.0
    (reason,) = reasons_against(*given, one == other)
    assert reasons_against(*given, one == again) == [] and "numbers of rows" in reason


def test_tensors_are_compared_by_their_bits():
    other = loaded()
    assert differing_tensors(loaded(), other) == []
    other.model["w"] = torch.tensor([1.0, 0.0])
    del other.tensors["m"]
    assert differing_tensors(loaded(), other) == ["m", "w"]


def test_the_distance_of_losses_needs_the_same_steps(tmp_path):
    def log(name: str, losses: dict[int, float]) -> Path:
        (tmp_path / name).mkdir()
        lines = (json.dumps({"loss_nats": nats, "step": step}) for step, nats in losses.items())
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    one, near = log("one", {1: 2.0, 2: 4.0}), log("near", {1: 2.0, 2: 5.0})
    assert loss_distance(one, one) == 0.0 and loss_distance(one, near) == 0.2
    assert loss_distance(one, log("short", {1: 2.0})) == float("inf")
    assert loss_distance(one, log("nan", {1: 2.0, 2: "nan"})) == float("inf")
    assert loss_distance(log("zero", {1: 0.0}), tmp_path / "zero") == 0.0


# A launcher that starts two processes, logs step 5 and ends with an error if one of them is lost.
LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
start = [sys.executable, "-c", sys.argv[2]]
ranks = [subprocess.Popen(start, stdin=subprocess.PIPE) for _ in range(2)]
Path(sys.argv[1], "metrics.jsonl").write_text('{"step":5}\\n')
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
Path(sys.argv[1], "lost").touch()
"""
WITH_LAUNCHER = "import sys; sys.stdin.read()"
WITHOUT_LAUNCHER = "import time; time.sleep(60); print('went on')"


@pytest.mark.parametrize("n", [1, 2])
def test_one_of_several_processes_is_killed_and_of_one_process_no_helper(tmp_path, n):
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), WITH_LAUNCHER]
    assert certificate._kill_at(command, n, tmp_path, tmp_path / "log", 5, Random(0)) == 5
    assert (tmp_path / "lost").exists() is (n == 2)


def test_a_run_that_goes_on_without_a_killed_process_is_ended_with_its_ranks(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), WITHOUT_LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None
        with pytest.raises(RankLost, match="did not end within"):
            certificate._await_end(process, 0.1)
        assert process.returncode == -signal.SIGKILL
        assert process.stdout.read() == b"", "ranks that hold the pipe open have not gone on"


def test_a_system_that_lists_no_processes_is_refused_for_several(tmp_path, monkeypatch):
    certificate._require_list_of_children(Processes(1, 2))
    monkeypatch.setattr(certificate, "PROC", tmp_path)
    certificate._require_list_of_children(Processes(1, 1))
    plan = {"steps": 24, "kills": 1, "sets": (), "run_dir": tmp_path / "c"}
    with pytest.raises(EnvironmentUnfit, match="cannot be listed"):
        certificate.certify(recipe("pocket"), **plan, processes=Processes(1, 2))
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not STRESS, reason="a dozen processes of Python that import all")
@pytest.mark.parametrize("resumed", [2, 1])
def test_a_certificate_of_two_processes_states_both_numbers(stack, text_file, resumed):
    options = "--steps", "24", "--kills", "1", "--nproc", "2", "--resume-nproc", str(resumed)
    own = "train.max_steps", "checkpoint.every", "schedule.warmup_steps"
    pairs = zip(*[iter(tiny(text_file, eval__every="6", sample__every="12"))] * 2, strict=True)
    sets = [part for pair in pairs if pair[1].split("=")[0] not in own for part in pair]
    command = "evidence", "certify-resume", "pocket", *options, *sets, "--run-dir", "c", "--json"
    done = stack(*command)
    assert done.code == 0, done.err
    found = done.json["metrics"]
    assert (found["processes"], found["resumed_processes"], found["resumes"]) == (2, resumed, 1)
    assert found["weights_equal"] == (resumed == 2)
    bound = 0.0 if resumed == 2 else LOSS_REL_MAX
    assert found["loss_rel_distance"] <= found["loss_rel_max"] == bound
    stated = read_record(stack.folder / "c" / "metadata.json").environment
    assert (stated["mesh_shard"], stated["resumed_mesh_shard"]) == (2, resumed)
    print(f"loss_rel_distance {found['loss_rel_distance']:g} on {resumed} processes")
