"""Operations of a process group, and how ranks end together."""

import pytest

from stackproof.distributed.launch import exit_code
from stackproof.distributed.ranks import ONE_PROCESS


def test_operations_give_every_rank_the_same(answers):
    first, second = answers("control_operations")
    assert (
        first
        == second
        == {
            "total": [3, 20],
            "highest": [1, 0],
            "sum": [2.0, 1.0],
            "maximum": [1.0, 1.0],
            "rows": [[0, 7], [1, 7]],
            "dealt": [0, 1, 4, 9, 16],
            "names": ("rank 1: odd",),
            "main": "of 0",
        }
    )


def test_ranks_of_a_tensor_group_count_once(answers):
    assert answers("tensor_counts", {"tensor": 2}) == [[1], [1]]
    assert answers("tensor_counts", {"shard": 2}) == [[2], [2]]


def test_one_process_is_its_own_sum():
    assert ONE_PROCESS.total(3, 4) == [3, 4] and ONE_PROCESS.highest(5) == [5]
    assert ONE_PROCESS.dealt([1, 2], str) == ["1", "2"]
    assert ONE_PROCESS.names_of_all(("a",)) == ("a",)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("killed", "rank 1 at step 3, reduce gradients"),
        ("hung", "rank 1 at step 3, reduce gradients"),
        ("failed", "rank 1 ended: the disk is full"),
    ],
)
def test_a_lost_rank_is_named(ranks, how, named):
    first, _ = ranks.run("tests.distributed.jobs:lose_a_rank", how)
    name, code, what = first.value
    assert name == "RankLost" and named in what
    assert code == (1 if how == "failed" else 7)


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([4, 7], 4),
        ([-9, 75], 7),  # killed; the agent has ended the other one by SIGTERM
        ([7, -9], 7),
        ([75, 75], 75),
        ([-15, -9], 75),  # before it handled signals
        ([-2], 130),
        ([200], 7),
    ],
)
def test_the_exit_code_of_a_launch_is_that_of_the_rank_that_ended_first(codes, wanted):
    assert exit_code(codes) == wanted
