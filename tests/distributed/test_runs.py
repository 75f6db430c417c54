"""Whole runs on several ranks: stopped, resumed on another mesh, and from the command line."""

import json
import shutil

import pytest

from stackproof.train import checkpoint
from stackproof.train.run_dir import RunDir

STOPPED_AT = 6
# float32 sums of another number of ranks, over six steps; measured worst case 1.5e-7
LOSS_REL_MAX = 1e-5


@pytest.fixture(scope="module")
def stopped_run(run, cfg, tmp_path_factory):
    """A run on two ranks, of which one got a SIGTERM after a step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(cfg, folder, STOPPED_AT) == ["Stopped 75", "Stopped 75"]
    return folder


def tensors(folder):
    """Weights, moments and random state of the latest checkpoint of a run, whole."""
    loaded = checkpoint.load(checkpoint.find(folder))
    return loaded.model | loaded.tensors


def assert_same(found, wanted):
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)


def losses(folder):
    lines = RunDir(folder).lines("metrics.jsonl")
    return {line["step"]: line["loss_nats"] for line in lines}


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(stopped_run):
    assert (stopped_run / "checkpoints" / "latest").read_text().strip().endswith(f"{STOPPED_AT}")
    record = json.loads((stopped_run / "metadata.json").read_text())
    assert record["status"] == "preempted" and record["exit_code"] == 75
    assert record["environment"]["world_size"] == 2 and record["environment"]["mesh_shard"] == 2


def test_a_resume_on_the_same_mesh_is_bitwise(run, cfg, whole_run, stopped_run, tmp_path):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(cfg, folder) == ["completed", None]
    assert_same(tensors(folder), tensors(whole_run))
    assert losses(folder) == losses(whole_run)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_a_resume_on_another_mesh_goes_on(run, cfg, whole_run, stopped_run, tmp_path, n_ranks):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(cfg, folder, n_ranks=n_ranks)[0] == "completed"
    wanted, found = losses(whole_run), losses(folder)
    assert found.keys() == wanted.keys()
    assert all(abs(found[s] - wanted[s]) <= LOSS_REL_MAX * wanted[s] for s in wanted)
    rows = [
        [line for line in RunDir(f).lines("curriculum.jsonl") if line["event"] == "rows"]
        for f in (folder, whole_run)
    ]
    assert rows[0] == rows[1]


def test_only_rank_0_writes_the_record_and_each_rank_its_log(whole_run):
    assert sorted(p.name for p in (whole_run / "ranks").iterdir()) == ["00001"]
    assert not (whole_run / "ranks" / "00001" / "metadata.json").exists()
    assert losses(whole_run / "ranks" / "00001") == losses(whole_run)
