"""Whole runs on several ranks: stopped, resumed on another mesh, and from the command line."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from stackproof.config import load_config
from stackproof.museum.ranks import SETTINGS
from stackproof.train.run_dir import RunDir
from tests.distributed.rows import rows_of

STOPPED_AT = 6
# float32 sums of another number of ranks, over six steps; measured worst case 1.5e-7
LOSS_REL_MAX = 1e-5


@pytest.fixture(scope="module")
def cfg(small_cfg):
    fixed = {key: (value, "test") for key, value in (SETTINGS | {"model.dropout": 0.1}).items()}
    return load_config(small_cfg, fixed=fixed)[0]


@pytest.fixture(scope="module")
def whole_run(ranks, cfg, cache, tmp_path_factory):
    """A run on two ranks that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(ranks, cfg, folder, cache) == ["completed", None]
    return folder


@pytest.fixture(scope="module")
def stopped_run(ranks, cfg, cache, tmp_path_factory):
    """A run on two ranks, of which one got a SIGTERM after a step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(ranks, cfg, folder, cache, STOPPED_AT) == ["Stopped 75", "Stopped 75"]
    return folder


def run(ranks, *arguments, n_ranks: int = 2) -> list:
    found = ranks.run("tests.distributed.jobs:run", *arguments, n_ranks=n_ranks)
    assert not [a.raised for a in found if a.raised]
    return [answer.value for answer in found]


def weights(folder):
    (latest,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    return load_file(latest / "model.safetensors")


def losses(folder):
    lines = RunDir(folder).lines("metrics.jsonl")
    return {line["step"]: line["loss_nats"] for line in lines}


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(stopped_run):
    assert (stopped_run / "checkpoints" / "latest").read_text().strip().endswith(f"{STOPPED_AT}")
    record = json.loads((stopped_run / "metadata.json").read_text())
    assert record["status"] == "preempted" and record["exit_code"] == 75
    assert record["environment"]["world_size"] == 2 and record["environment"]["mesh_shard"] == 2


def test_a_resume_on_the_same_mesh_is_bitwise(ranks, cfg, cache, whole_run, stopped_run, tmp_path):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(ranks, cfg, folder, cache) == ["completed", None]
    wanted, found = weights(whole_run), weights(folder)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)
    assert losses(folder) == losses(whole_run)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_a_resume_on_another_mesh_goes_on(
    ranks, cfg, cache, whole_run, stopped_run, tmp_path, n_ranks
):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    assert run(ranks, cfg, folder, cache, n_ranks=n_ranks)[0] == "completed"
    wanted, found = losses(whole_run), losses(folder)
    assert found.keys() == wanted.keys()
    assert all(abs(found[s] - wanted[s]) <= LOSS_REL_MAX * wanted[s] for s in wanted)
    rows = [
        [line for line in RunDir(f).lines("curriculum.jsonl") if line["event"] == "rows"]
        for f in (folder, whole_run)
    ]
    assert rows[0] == rows[1]


def test_a_chain_of_meshes_draws_the_rows_of_one_process(ranks, cfg, cache, stopped_run, tmp_path):
    folder, alone = shutil.copytree(stopped_run, tmp_path / "run"), tmp_path / "alone"
    shutil.copy(stopped_run.with_suffix(".rows"), folder.with_suffix(".rows"))
    assert run(ranks, cfg, folder, cache, STOPPED_AT + 3, n_ranks=4) == ["Stopped 75"] * 4
    assert run(ranks, cfg, folder, cache, n_ranks=1) == ["completed"]
    assert run(ranks, cfg, alone, cache, n_ranks=1) == ["completed"]
    rows = rows_of(alone.with_suffix(".rows"))
    assert rows_of(folder.with_suffix(".rows")) == rows
    assert sorted(rows) == list(range(cfg.train.max_steps * cfg.rows_per_step))
    wanted, found = losses(alone), losses(folder)
    assert found.keys() == wanted.keys()
    assert all(abs(found[s] - wanted[s]) <= LOSS_REL_MAX * wanted[s] for s in wanted)


def test_only_rank_0_writes_the_record_and_each_rank_its_log(whole_run):
    assert sorted(p.name for p in (whole_run / "ranks").iterdir()) == ["00001"]
    assert not (whole_run / "ranks" / "00001" / "metadata.json").exists()
    assert losses(whole_run / "ranks" / "00001") == losses(whole_run)
