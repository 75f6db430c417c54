"""Meshes of a configuration, and those that are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackproof.config import load_config
from stackproof.distributed.mesh import MeshSizes, mesh_sizes
from stackproof.recipes import recipe
from stackproof.spec.errors import ConfigError


def cfg(**changes):
    keys = {key.replace("__", "."): (value, "test") for key, value in changes.items()}
    return load_config(recipe("pocket"), fixed=keys)[0]


def test_shard_takes_what_is_left():
    assert mesh_sizes(cfg(), 1) == MeshSizes(1, 1, 1)
    assert mesh_sizes(cfg(), 4) == MeshSizes(1, 4, 1)
    assert mesh_sizes(cfg(parallel__replicate=2), 4) == MeshSizes(2, 2, 1)
    assert mesh_sizes(cfg(parallel__tensor=2), 4) == MeshSizes(1, 2, 2)


def test_a_rank_has_its_place_in_the_mesh_of_torch(answers):
    mesh = {"replicate": 2, "tensor": 2}
    sizes = MeshSizes(2, 1, 2)
    assert [sizes.place(rank) for rank in range(4)] == answers("place", mesh, n_ranks=4)


@pytest.mark.parametrize(
    ("changes", "world_size", "named"),
    [
        ({"parallel__replicate": 2}, 3, "parallel.replicate"),
        ({"parallel__shard": 2}, 1, "parallel.shard"),
        ({"parallel__tensor": 2}, 1, "parallel.tensor"),
        ({"parallel__tensor": 3}, 3, "model.n_heads"),
        ({}, 3, "train.tokens_per_step"),
        ({"parallel__tensor": 2, "model__ffn__kind": "moe"}, 2, "model.ffn.kind"),
    ],
)
def test_impossible_meshes_are_refused_by_their_keys(changes, world_size, named):
    with pytest.raises(ConfigError) as caught:
        mesh_sizes(cfg(**changes), world_size)
    assert named in str(caught.value) and caught.value.next_step


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_every_rank_has_whole_micro_batches(n_data_ranks, micro):
    run = cfg(train__micro_batch_size=micro) if 8 % micro == 0 else cfg()
    rows = run.micro_batch_rows(n_data_ranks)
    assert rows * run.accumulation(n_data_ranks) * n_data_ranks == run.rows_per_step
    assert 1 <= rows <= run.train.micro_batch_size
