"""The plan of a run on many ranks states what ranks hold and send."""

import math
from collections import Counter

import pytest

from stackproof.config import load_config
from stackproof.distributed.mesh import MeshSizes, mesh_sizes
from stackproof.recipes import recipe
from stackproof.spec.errors import ConfigError
from stackproof.train.rank_plan import Cluster, Collective, admissible, plan
from tests.distributed.jobs import ROWS, TOKENS, VOCAB, configuration

ADAMW = {"optim.kind": "adamw", "optim.lr": 1e-3}
ONE_MICRO_STEP = {"train.tokens_per_step": ROWS * TOKENS // 2}  # of one row on four ranks
STATE = ("weights", "gradients", "moments")


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"shard": 2}, {}),
        ({"replicate": 2}, {}),
        ({"tensor": 2}, {}),
        ({"shard": 4}, ADAMW | ONE_MICRO_STEP | {"train.activation_checkpointing": "blocks"}),
        ({"replicate": 4}, ONE_MICRO_STEP),
        ({"shard": 2, "tensor": 2}, {"model.norm.kind": "layernorm", "model.tied_head": False}),
        ({"replicate": 2, "shard": 2}, {"model.ffn.kind": "moe"}),
        ({"shard": 2}, {"model.depth.kind": "mixture-of-depths"}),
    ],
    ids=str,
)
def test_plan_is_what_live_ranks_hold_and_send(answers, mesh, changes):
    n_ranks = math.prod(mesh.values())
    found = answers("held_and_sent", mesh, changes, n_ranks=n_ranks)
    planned = planned_of(mesh, changes)
    held, sent = found[0]
    # Rank 0 has the largest parts, to which torch pads those of the others.
    assert held == {part: planned["memory_bytes"][part] for part in STATE}
    assert all(other[part] <= held[part] for other, _ in found for part in STATE)
    named = Counter()
    for c in planned["collectives"]:
        named[c["operation"], c["dimension"], c["n_bytes"]] += c["per_step"]
    assert named == sent
    assert all(bytes_of(other) <= bytes_of(sent) for _, other in found)


def planned_of(mesh, changes, **assumed):
    cfg = configuration(mesh, changes)
    return plan(cfg, VOCAB, math.prod(mesh.values()), Cluster.of(cfg, assumed))


def bytes_of(sent):
    return sum(n_bytes * n for (_, _, n_bytes), n in sent.items())
