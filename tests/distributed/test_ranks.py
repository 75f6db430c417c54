"""Operations of a process group, and how ranks end together."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from stackproof.distributed import failure, process_group
from stackproof.distributed.launch import exit_code, first_lost, order_of
from stackproof.distributed.process_group import joined
from stackproof.distributed.ranks import ONE_PROCESS
from stackproof.distributed.started import Ended
from stackproof.distributed.starts import common_start
from stackproof.spec.errors import RankLost, StackproofError
from tests.distributed.jobs import CPU, configuration

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


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([4, 7], 4),
        ([-9, 75], 7),  # killed; the other one has ended because of it
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
    ("codes", "told", "code", "where"),
    [
        ({1: -9}, "rank 1 (pid 101) was ended by SIGKILL", 7, "RUN/ranks/00001/output.log"),
        ({1: 3, 0: -15}, "rank 1 (pid 101) ended with exit code 3", 3, "RUN/ranks/00001/"),
        ({2: -9, 0: 75}, "rank 2 (pid 102) was ended by SIGKILL", 7, "RUN/ranks/00002/"),
        ({0: -11, 1: 7}, "rank 0 (pid 100) was ended by SIGSEGV", 7, "RUN/ranks,"),  # the terminal
    ],
)
def test_the_first_lost_rank_is_named_if_rank_0_cannot(codes, told, code, where):
    error = first_lost(ends(codes), RUN, 3)
    assert error.exit_code == code and error.what.startswith(f"{told}, ")
    assert where in error.next_step and error.next_step.endswith(", then give the command again")
    assert first_lost(ends({1: 7, 0: 7}), RUN, 2) is None  # rank 0 has named it
    assert first_lost([], RUN, 2) is None


def test_within_a_second_a_stated_error_comes_before_ends_that_follow_from_it():
    assert sorted([75, 7, 1, -15, -6, 4], key=order_of)[:2] == [4, -6]


def ends(codes: dict[int, int]) -> list[Ended]:
    return [Ended(rank, 100 + rank, code) for rank, code in codes.items()]


def test_a_rank_without_the_store_of_its_launcher_ends_after_the_timeout(monkeypatch):
    """By default torch tries for half an hour."""
    given = []

    def refused(url, timeout):
        given.append((url, timeout))
        raise dist.DistNetworkError("connection refused")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "end_with_launcher", lambda: None)
    monkeypatch.setattr(dist, "rendezvous", refused)
    cfg = configuration({}, {"parallel.timeout_s": 5})
    with pytest.raises(RankLost, match="launcher of the ranks does not answer"), joined(cfg, CPU):
        pass
    assert given == [("env://", timedelta(seconds=5))]


@pytest.fixture
def survivor(monkeypatch, tmp_path):
    """What rank 1 of four has, whose operation has failed, in a run that `launch` has started."""
    monkeypatch.setenv("STACKPROOF_RESTARTS", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(failure, "SURVIVORS_S", 0.0)
    shared = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.PrefixStore("start", shared)
    store.set(failure.place_of(2), "step 39, train step")
    (tmp_path / "run.json").touch()
    return SimpleNamespace(rank=1, world_size=4, store=store, run_dir=tmp_path)


def test_a_survivor_that_names_another_rank_is_not_blamed(survivor):
    """It has announced nothing, and the others look for the cause themselves."""
    found = failure.find(survivor)
    assert "of which one at least is lost: rank 0 at start, rank 2 at step 39" in found.what
    failure.announce(survivor.store, 1, found)
    assert failure.ended(survivor.store, 1) is None
    failure.announce(survivor.store, 1, StackproofError("the disk is full"))
    assert failure.ended(survivor.store, 1)["what"] == "the disk is full"
    for rank in (0, 3):
        survivor.store.set(f"stackproof/alive/{rank}", b"1")
    assert "without an answer: rank 2 at step 39, train step\n" in str(failure.find(survivor))
