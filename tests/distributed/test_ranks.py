"""Operations of a process group, and how ranks end together."""

from pathlib import Path

import pytest

from stackproof.distributed.launch import exit_code, first_lost
from stackproof.distributed.ranks import ONE_PROCESS

RUN = Path("RUN")


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
    assert name == "RankLost" and named in what and "RUN/ranks/00001/output.log" in what
    assert code == (1 if how == "failed" else 7)


def test_a_restart_reads_nothing_of_the_ranks_before(answers):
    assert answers("announcement_after_a_restart") == [(False, 2), (False, 2)]


def test_the_exit_code_of_a_launch_is_that_of_the_run():
    assert exit_code({0: 4, 1: 7}) == 4  # rank 0 has the gates
    assert exit_code({1: -9, 0: 7}) == 7
    assert exit_code({0: 75, 1: 75}) == 75


@pytest.mark.parametrize(
    ("codes", "lost", "named", "code", "where"),
    [
        ({1: -9}, 1, "SIGKILL", 7, "RUN/ranks/00001/output.log"),
        ({1: 3, 0: -15}, 1, "exit code 3", 3, "RUN/ranks/00001/output.log"),  # ended by the agent
        ({2: -9, 1: 4}, 2, "SIGKILL", 4, "RUN/ranks/00002/output.log"),
        ({0: -11, 1: 7}, 0, "SIGSEGV", 7, "RUN/ranks;"),  # it had the terminal
    ],
)
def test_the_first_lost_rank_is_named_if_rank_0_cannot(codes, lost, named, code, where):
    error = first_lost(codes, RUN)
    assert error.exit_code == code and error.what.startswith(f"rank {lost} ended")
    assert named in error.value and where in error.next_step
    assert first_lost({1: 7, 0: 7}, RUN) is None  # rank 0 has named it
