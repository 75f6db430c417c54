"""Checkpoints that several ranks write: equal in both layouts, refused together, lost by none."""

import shutil

import pytest

from stackproof.config import load_config
from stackproof.train import checkpoint
from tests.distributed.conftest import SAVED_AT
from tests.distributed.test_runs import assert_same, losses, tensors


def with_keys(cfg, keys: dict):
    return load_config(cfg, fixed={key: (value, "test") for key, value in keys.items()})[0]


@pytest.fixture(scope="module")
def single_run(run, cfg, tmp_path_factory):
    """The same run, with checkpoints in the single layout, written behind training."""
    folder = tmp_path_factory.mktemp("single") / "run"
    keys = {"checkpoint.layout": "single", "checkpoint.async_save": True}
    assert run(with_keys(cfg, keys), folder) == ["completed", None]
    return folder


def test_each_rank_writes_a_file_and_no_more_than_its_share(whole_run):
    folder = checkpoint.find(whole_run)
    files = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert sorted(files) == [f"shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2)]
    assert max(files.values()) < 0.55 * sum(files.values())


def test_both_layouts_hold_the_same_bits(whole_run, single_run):
    layouts = [checkpoint.layout_in(checkpoint.find(f)) for f in (whole_run, single_run)]
    assert layouts == ["sharded", "single"]
    assert_same(tensors(single_run), tensors(whole_run))


def test_parts_written_behind_training_are_those_of_their_step(run, cfg, whole_run, tmp_path):
    folder = tmp_path / "run"
    assert run(with_keys(cfg, {"checkpoint.async_save": True}), folder) == ["completed", None]
    for step in (SAVED_AT, 2 * SAVED_AT):
        folders = [checkpoint.at(f / "checkpoints", step) for f in (whole_run, folder)]
        wanted, found = map(checkpoint.load, folders)
        assert_same(found.model | found.tensors, wanted.model | wanted.tensors)


@pytest.mark.parametrize("written", ["whole_run", "single_run"])
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"shard": 2, "tensor": 2}, {"replicate": 2}])
def test_every_mesh_reads_both_layouts(run, cfg, request, written, mesh):
    folder = checkpoint.find(request.getfixturevalue(written))
    n_ranks = max(2, mesh.get("shard", 1) * mesh.get("tensor", 1))
    n_divided = run(cfg, folder, mesh, job="parts_read", n_ranks=n_ranks)
    assert min(n_divided) > 10


def test_a_full_disk_of_one_rank_ends_all_and_loses_nothing(run, cfg, whole_run, tmp_path):
    folder = tmp_path / "run"
    ends = run(cfg, folder, 1, 2, job="run_with_full_disk")  # the second save of rank 1
    assert ends == ["RankLost 5", "CheckpointError 5"]
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["best", "latest", f"step-{SAVED_AT:08}"]
    assert run(cfg, folder) == ["completed", None]
    assert_same(tensors(folder), tensors(whole_run))
    assert losses(folder) == losses(whole_run)


def test_a_damaged_file_is_refused_by_all_ranks(run, cfg, whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "metadata.json").unlink()
    path = sorted(checkpoint.find(folder).glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert run(cfg, folder) == ["CheckpointError 5", "CheckpointError 5"]
