"""Operations of a process group, and how ranks end together."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from stackproof.distributed import process_group
from stackproof.distributed.launch import exit_code, first_lost
from stackproof.distributed.ranks import ONE_PROCESS
from stackproof.distributed.starts import common_start
from stackproof.spec.errors import RankLost

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


@pytest.mark.parametrize("counting", [0, 1, None])
def test_all_ranks_join_a_restart_that_no_or_one_agent_counts(answers, counting):
    """And read nothing of the ranks before. None: the machine of a rank was replaced."""
    assert answers("starts", counting) == [[(False, False, 2), (True, False, 2)]] * 2


def test_the_rank_of_a_former_start_does_not_count_as_one_that_joins():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("stackproof/number/1", "lost")
    seconds = timedelta(seconds=60)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(common_start, store, 0, 2, seconds)
        beside = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        beside.wait(["stackproof/answer/lost"])  # the rank that joins comes later
        assert not first.done()
        start, _ = common_start(beside, 1, 2, seconds)
        assert first.result() == (start, 1)


@pytest.mark.parametrize(("rank", "missing"), [(0, "1, 2"), (1, "0")])
def test_a_rank_that_does_not_join_is_named(rank, missing):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RankLost, match=f"did not join: {missing}\n"):
        common_start(store, rank, 3, timedelta(seconds=0.2))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a rank")
@pytest.mark.parametrize("after", [10, 1])
def test_a_rank_whose_launcher_ended_before_it_was_watched_ends(monkeypatch, after):
    parents, asked = iter([10, after]), []
    library = SimpleNamespace(prctl=lambda *given: asked.append(given))
    monkeypatch.setattr(process_group.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(process_group.os, "getppid", lambda: next(parents))
    with pytest.raises(RankLost, match="launcher") if after != 10 else nullcontext():
        process_group._end_with_launcher()
    assert asked == [(1, SIGTERM)]


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


@pytest.mark.parametrize(
    ("codes", "lost", "named", "code", "where"),
    [
        ({1: -9}, 1, "SIGKILL", 7, "RUN/ranks/00001/output.log"),
        ({1: 3, 0: -15}, 1, "exit code 3", 3, "RUN/ranks/00001/output.log"),  # ended by the agent
        ({2: -9, 0: 75}, 2, "SIGKILL", 7, "RUN/ranks/00002/output.log"),
        ({0: -11, 1: 7}, 0, "SIGSEGV", 7, "RUN/ranks;"),  # it had the terminal
    ],
)
def test_the_first_lost_rank_is_named_if_rank_0_cannot(codes, lost, named, code, where):
    error = first_lost(codes, RUN)
    assert error.exit_code == code and error.what.startswith(f"rank {lost} ended")
    assert named in error.value and where in error.next_step
    assert first_lost({1: 7, 0: 7}, RUN) is None  # rank 0 has named it
