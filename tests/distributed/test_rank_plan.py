"""The plan of a run on many ranks states what ranks hold and send."""

import math
from collections import Counter

import pytest

from stackproof.config import load_config
from stackproof.distributed.mesh import MeshSizes, mesh_sizes
from stackproof.model import parallelize
from stackproof.recipes import recipe
from stackproof.spec.errors import ConfigError
from stackproof.train.rank_plan import Cluster, Collective, admissible, plan
from tests.distributed.jobs import ROWS, TOKENS, VOCAB, configuration

ADAMW = {"optim.kind": "adamw", "optim.lr": 1e-3}
ONE_MICRO_STEP = {"train.tokens_per_step": ROWS * TOKENS // 2}  # of one row on four ranks
STATE = ("weights", "gradients", "moments")


@pytest.mark.parametrize(
    ("mesh", "changes", "unit_bytes"),
    [
        ({"shard": 2}, {}, 0),
        ({"shard": 2}, {}, parallelize.UNIT_BYTES),  # small blocks, which are no units
        ({"replicate": 2}, {}, 0),
        ({"tensor": 2}, {}, 0),
        ({"shard": 4}, ADAMW | ONE_MICRO_STEP | {"train.activation_checkpointing": "blocks"}, 0),
        ({"replicate": 4}, ONE_MICRO_STEP, parallelize.UNIT_BYTES),
        ({"shard": 2, "tensor": 2}, {"model.norm.kind": "layernorm", "model.tied_head": False}, 0),
        ({"replicate": 2, "shard": 2}, {"model.ffn.kind": "moe"}, 0),
        ({"shard": 2}, {"model.depth.kind": "mixture-of-depths"}, 0),
    ],
    ids=str,
)
def test_plan_is_what_live_ranks_hold_and_send(answers, monkeypatch, mesh, changes, unit_bytes):
    n_ranks = math.prod(mesh.values())
    found = answers("held_and_sent", mesh, changes, unit_bytes, n_ranks=n_ranks)
    monkeypatch.setattr(parallelize, "UNIT_BYTES", unit_bytes)
    planned = planned_of(mesh, changes)
    held, sent = found[0]
    # Rank 0 has the largest parts, to which torch pads those of the others.
    assert held == {part: planned["memory_bytes"][part] for part in STATE}
    assert all(other[part] <= held[part] for other, _ in found for part in STATE)
    assert operations(planned) == sent
    assert all(bytes_of(other) <= bytes_of(sent) for _, other in found)


def test_a_plan_of_another_run_is_noticed(answers):
    held, sent = answers("held_and_sent", {"shard": 2}, {}, parallelize.UNIT_BYTES)[0]
    for changes in ({"model.d_ff": 28}, {"model.norm.kind": "layernorm"}, ADAMW):
        planned = planned_of({"shard": 2}, changes)
        assert held != {part: planned["memory_bytes"][part] for part in STATE}
        assert operations(planned) != sent
    once = planned_of({"shard": 2}, {"train.micro_batch_size": ROWS // 2})
    assert held == {part: once["memory_bytes"][part] for part in STATE}
    assert operations(once) != sent, "other micro-steps gather weights as often"


def operations(planned):
    found = Counter()
    for c in planned["collectives"]:
        found[c["operation"], c["dimension"], c["n_bytes"]] += c["per_step"]
    return found


def planned_of(mesh, changes, **assumed):
    cfg = configuration(mesh, changes)
    return plan(cfg, VOCAB, math.prod(mesh.values()), Cluster.of(cfg, assumed))


def bytes_of(sent):
    return sum(n_bytes * n for (_, _, n_bytes), n in sent.items())


# --- the choice of a mesh -------------------------------------------------------------------------


def large(**changes):
    """A configuration with room for a thousand data ranks."""
    keys = {"train.tokens_per_step": 2048 * 256, **changes}
    fixed = {key.replace("__", "."): (value, "test") for key, value in keys.items()}
    return load_config(recipe("pocket"), fixed=fixed)[0]


def test_meshes_are_those_that_are_not_refused():
    """Of four heads and two key-value heads a tensor group takes two; 2,048 rows are not dealt to
    three.
    """
    found = [(s.replicate, s.shard, s.tensor) for _, s in admissible(large(), 6)]
    assert found == []
    found = [(s.replicate, s.shard, s.tensor) for _, s in admissible(large(), 4)]
    assert found == [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
    for cfg, sizes in admissible(large(), 4):
        assert cfg.parallel.model_dump() | sizes.as_dict() == cfg.parallel.model_dump()
        assert mesh_sizes(cfg, 4) == sizes


def test_cheapest_mesh_is_the_fastest_that_fits():
    cfg = large()
    everything = planned_on(cfg, 8)
    meshes = everything["meshes"]
    assert len(meshes) == len(list(admissible(cfg, 8))) > 5
    fastest = min(meshes, key=lambda m: m["step_s"])
    assert everything["cheapest"] == fastest and all(m["fits"] for m in meshes)
    # Without room for the fastest, the fastest of those that are left; without any room, none.
    least = sorted(m["peak_bytes"] for m in meshes)
    assert fastest["peak_bytes"] > least[0], "there is something to choose"
    narrow = planned_on(cfg, 8, memory_bytes=fastest["peak_bytes"] - 1)
    left = [m for m in meshes if m["peak_bytes"] < fastest["peak_bytes"]]
    assert narrow["cheapest"] == min(left, key=lambda m: m["step_s"])
    assert planned_on(cfg, 8, memory_bytes=least[0] - 1)["cheapest"] is None


def test_mesh_that_is_refused_in_a_run_is_refused_in_a_plan():
    with pytest.raises(ConfigError, match="cannot be dealt evenly"):
        planned_on(recipe("pocket"), 1024)


def test_a_thousand_ranks_hold_a_thousandth_of_the_state():
    one, many = planned_on(large(), 2), planned_on(large(), 1024)
    assert many["world_size"] == many["mesh"]["shard"] == 1024
    # Rows are dealt whole: a matrix of fewer rows than ranks has one row on some of them.
    for part in STATE:
        assert one["memory_bytes"][part] / 512 <= many["memory_bytes"][part]
        assert many["memory_bytes"][part] < one["memory_bytes"][part] / 50
    whole = sum(one["memory_bytes"][part] for part in STATE)
    assert many["memory_bytes"]["peak"] > whole / 50


def planned_on(cfg, world_size, **assumed):
    return plan(cfg, 2048, world_size, Cluster.of(cfg, assumed))


# --- predicted times ------------------------------------------------------------------------------

RING = Cluster(
    flops_per_s=1, node_ranks=8, node_bytes_per_s=100.0, network_bytes_per_s=10.0, latency_s=2.0
)


@pytest.mark.parametrize(
    ("operation", "sizes", "dimension", "expected_s"),
    [
        # Seven hops, and seven eighths of 800 bytes within a node.
        ("all-gather", MeshSizes(1, 8, 1), "shard", 7 * 2 + 700 / 100),
        ("reduce-scatter", MeshSizes(1, 8, 1), "shard", 7 * 2 + 700 / 100),
        # Both, one after the other.
        ("all-reduce", MeshSizes(8, 1, 1), "replicate", 14 * 2 + 1400 / 100),
        # Two ranks of one group are on two nodes.
        ("all-gather", MeshSizes(2, 8, 1), "replicate", 2 + 400 / 10),
        ("all-gather", MeshSizes(1, 8, 2), "shard", 7 * 2 + 700 / 10),
        ("all-gather", MeshSizes(1, 8, 2), "tensor", 2 + 400 / 100),
        # Groups of three do not fill nodes of eight, so that one lies on two of them.
        ("all-gather", MeshSizes(4, 3, 1), "shard", 2 * 2 + 800 * 2 / 3 / 10),
        ("all-gather", MeshSizes(2, 3, 1), "shard", 2 * 2 + 800 * 2 / 3 / 100),
    ],
)
def test_time_of_an_operation_is_that_of_a_ring(operation, sizes, dimension, expected_s):
    found = Collective(operation, dimension, "weights", 800)
    assert found.time_s(sizes, RING) == pytest.approx(expected_s, rel=1e-12)


def test_step_time_follows_the_assumptions():
    cfg = large()
    slow, fast = (planned_on(cfg, 8, flops_per_s=rate)["predicted_s"] for rate in (1e12, 2e12))
    assert slow["compute"] == 2 * fast["compute"] and slow["data"] == fast["data"]
    for times in (slow, fast):
        longer = max(times["compute"], times["data"])
        assert times["step"] == longer + times["tensor"] + times["update"]
