"""A divided model computes what the whole one does."""

import math

import pytest
import torch

from stackproof.model.dropout import Dropout, DropoutStream, Places
from stackproof.train.rng import stream_seed
from tests.distributed.jobs import ROWS, TOKENS, configuration

ROUNDING = 1e-12  # of float64 sums in another order; measured worst case 3e-16
DROPOUT = {"model.dropout": 0.1}
ONE_LAYER = {"model.n_layers": 1}  # how layers follow one another is in the gradients
EPS = torch.finfo(torch.float32).eps
FLOAT32 = 1e-4  # the limit of loss.partition-equivalence; measured worst case 1.5e-7


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"replicate": 2}, {}),
        ({"shard": 2}, {}),
        ({"tensor": 2}, {}),
        ({"shard": 2}, {"train.activation_checkpointing": "blocks"}),
        ({"tensor": 2}, {"model.norm.kind": "layernorm", "model.positions.kind": "learned"}),
        ({"tensor": 2}, {"model.tied_head": False, "model.n_kv_heads": 2}),
        ({"replicate": 2, "shard": 2}, {}),
        ({"shard": 2, "tensor": 2}, {}),
        ({"replicate": 2, "tensor": 2}, {}),
        ({"replicate": 2}, DROPOUT),
        ({"shard": 2}, DROPOUT | {"train.activation_checkpointing": "blocks"}),
        ({"tensor": 2}, DROPOUT),
        ({"shard": 2, "tensor": 2}, DROPOUT),
        ({"shard": 4}, DROPOUT),
    ],
    ids=str,
)
def test_gradient_is_that_of_one_process(answers, mesh, changes):
    n_ranks = 1
    for size in mesh.values():
        n_ranks *= size
    found = answers("gradient_error", mesh, changes, "float64", n_ranks=n_ranks)
    assert all(gradient <= ROUNDING and loss <= ROUNDING for gradient, loss in found)


def test_float32_gradient_stays_within_the_limit_of_the_gate(answers):
    found = answers("gradient_error", {"shard": 2}, {}, "float32")
    assert all(0 < gradient <= FLOAT32 for gradient, _ in found)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"replicate": 2}, {}),
        ({"shard": 2}, DROPOUT | {"train.activation_checkpointing": "blocks"}),
        ({"shard": 2, "tensor": 2}, {}),
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_the_units_of_fsdp2(answers, mesh, changes):
    n_ranks = math.prod(mesh.values())
    found = answers("gradient_error", mesh, changes, "float64", 0, n_ranks=n_ranks)
    assert all(gradient <= ROUNDING and loss <= ROUNDING for gradient, loss in found)


@pytest.mark.parametrize("mesh", [{"replicate": 2}, {"shard": 2}], ids=str)
def test_gradients_of_half_precision_are_reduced_in_float32(answers, mesh):
    # Each micro-batch rounds as in one process, so only the order of float32 sums is left.
    half = mesh, {"train.dtype": "bfloat16"}, "float32", None
    assert all(0 < gradient <= 1e-6 for gradient, _ in answers("gradient_error", *half))
    reduced_in_half = answers("gradient_error", *half, "bfloat16")
    assert all(1e-4 < gradient < 1e-1 for gradient, _ in reduced_in_half)


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"tensor": 2}], ids=str)
def test_all_ranks_skip_a_step_that_overflows_on_one(answers, mesh):
    first, second = answers("overflow_on_one_rank", mesh)
    assert first == second and len(first) == 2, "on either rank"
    for retries, loss_nats, norm, scale in first:
        assert (retries, scale) == (1, 2.0**9)
        assert math.isfinite(loss_nats) and 0 < norm < math.inf


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"tensor": 2}], ids=str)
def test_losses_of_training_are_those_of_one_process(answers, mesh):
    # float64: 1e-9 is the bound, measured worst case of 100 steps 4.4e-16
    found = answers("loss_distance", mesh, DROPOUT | ONE_LAYER, 12)
    assert max(distance for distance, _ in found) <= 1e-9


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"tensor": 2}, {"shard": 2, "tensor": 2}], ids=str)
def test_float32_losses_are_as_near_as_those_of_permuted_micro_batches(answers, mesh):
    # Of 100 steps: see docs/adr/0053. In few steps both may be 0; the loss itself is rounded once.
    n_ranks = math.prod(mesh.values())
    (distance, permuted), *_ = answers(
        "loss_distance", mesh, ONE_LAYER, 6, "float32", 2, n_ranks=n_ranks
    )
    assert distance <= max(permuted, EPS) <= 4 * EPS


def test_losses_of_a_tensor_group_in_half_precision_are_further_apart(answers):
    half = {"train.dtype": "bfloat16"}
    (distance, _), *_ = answers("loss_distance", {"tensor": 2}, half, 2, "float32")
    assert 4 * EPS < distance < 1e-3


@pytest.fixture(scope="module")
def masks_of_two(ranks):
    return masks_of(ranks, {"shard": 2})


def masks_of(ranks, mesh):
    """The masks of all ranks together, each of one rank."""
    n_ranks = math.prod(mesh.values())
    found = ranks.run("tests.distributed.jobs:masks", mesh, DROPOUT, n_ranks=n_ranks)
    assert not [answer.raised for answer in found if answer.raised]
    together = {place: kept for answer in found for place, kept in answer.value.items()}
    assert len(together) == sum(len(answer.value) for answer in found)
    return together


@pytest.mark.parametrize(
    "mesh", [{"tensor": 2}, {"shard": 4}, {"replicate": 2, "tensor": 2}], ids=str
)
def test_masks_are_the_same_bits_on_every_mesh(ranks, masks_of_two, mesh):
    assert masks_of(ranks, mesh) == masks_of_two


def test_masks_of_ranks_are_those_of_one_process(masks_of_two):
    left = dict(masks_of_two)
    cfg = configuration({}, DROPOUT)
    stream = DropoutStream(stream_seed(cfg.seed, "dropout-masks"))
    index_1T = torch.arange(TOKENS)[None]
    for row in range(ROWS):
        places = Places(stream.of_rows(1, [row]), index_1T)
        for layer, branch in ((layer, branch) for layer in (0, 1) for branch in (0, 1)):
            y_BTD = Dropout(0.1, layer)(torch.ones(1, TOKENS, cfg.model.d_model), branch, places)
            for position, kept_D in enumerate(y_BTD[0] != 0):
                kept = bytes(kept_D.tolist())
                assert left.pop((row, layer, branch, position)) == kept
    assert not left
