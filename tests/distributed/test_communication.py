"""Shares of communication of a step, and how often they are measured."""

import pytest

from stackproof.distributed.communication import (
    Communication,
    Event,
    duration_ns,
    operators,
    shares,
)
from stackproof.spec.rank_log import PEAK, over_ranks, rank_table
from stackproof.train.rank_times import facts_of, seldom_enough

S = 10**9


def event(name: str, start_s: float, end_s: float, line: int = 0) -> Event:
    return Event(name, int(start_s * S), int(end_s * S), line)


def test_overlapping_events_count_once():
    spans = [(0, 4), (1, 2), (3, 6), (6, 7), (9, 10), (9, 9)]
    assert duration_ns([event("x", *span) for span in spans]) == 8 * S
    assert duration_ns([]) == 0


def test_only_the_innermost_operators_compute():
    events = [
        event("aten::mm", 0, 10),  # of a distributed tensor, which holds a collective operation
        event("_c10d_functional::wait_tensor", 1, 5),
        event("aten::mm", 5, 10),
        event("FSDP::post_backward_rs_wait ()", 11, 12),
        event("autograd::node", 12, 14, 1),
        event("aten::add", 0, 3, 1),
        event("Optimizer.step#AdamW.step", 20, 30),
    ]
    found = {(e.name, e.start_ns // S) for e in operators(events)}
    assert found == {("aten::mm", 5), ("aten::add", 0), ("autograd::node", 12)}


def test_exposed_is_what_no_computation_overlaps():
    operations = [event("gloo:all_reduce", 0, 4, 7), event("gloo:all_gather", 3, 8, 8)]
    computing = [event("aten::mm", 2, 5), event("aten::mm", 7, 20)]
    calls = [event("c10d::allreduce_", 5, 7)]
    assert shares([*operations, *computing, *calls], on_gpu=False) == (8, 4)
    kernels = [event("ncclDevKernel_AllGather", 0, 4, 7), event("ampere_sgemm", 1, 2, 20)]
    assert shares(kernels, on_gpu=True) == (4, 3)
    assert shares(computing, on_gpu=False) == (0, 0)


def test_exposed_is_at_most_what_is_under_way_to_the_last_bit():
    under_way_ns, computing_ns = 2_000_840_731, 2_000_002
    assert (under_way_ns + computing_ns) / 1e9 - computing_ns / 1e9 > under_way_ns / 1e9
    wait = Event("gloo:all_reduce", 0, under_way_ns, 7)
    computing = Event("aten::mm", 3 * S, 3 * S + computing_ns, 0)
    assert shares([wait, computing], on_gpu=False) == (2.000840731, 2.000840731)


def test_a_rank_that_is_late_lets_the_others_wait(answers):
    late_s = 2.0
    first, last = answers("communication", late_s)
    for found in (first, last):
        assert 0 < found.exposed_s <= found.under_way_s <= found.step_s
    assert first.under_way_s > late_s / 2  # it began to wait while the other slept
    # Another thread notes the end of an operation, and on a busy machine it is late.
    assert last.own_s > late_s / 2


def test_shares_are_of_the_step():
    found = Communication(step_s=2.0, under_way_s=1.0, exposed_s=0.5)
    assert (found.communication_frac, found.exposed_frac, found.own_s) == (0.5, 0.25, 1.5)


@pytest.mark.parametrize(
    ("extra_s", "step_s", "every"), [(0, 1, 100), (1, 1, 100), (1.01, 1, 200), (5, 0.5, 1000)]
)
def test_profiling_is_so_seldom_that_it_takes_at_most_its_share(extra_s, step_s, every):
    assert seldom_enough(100, extra_s, step_s) == every
    assert extra_s <= 0.01 * step_s * every


def test_a_rank_states_what_belongs_to_it_and_what_differs():
    places = {"replicate": 0, "shard": 0, "tensor": 0, "node": 0, "local_rank": 0, "device": "cpu"}
    main = {"rank": 0, **places, "torch": "2.0", "cpu": "a", "os": "x"}
    own = main | {"rank": 1, "shard": 1, "torch": "2.1", "cpu": "a"}
    assert facts_of(own, main) == {"rank": 1, **places, "shard": 1, "cpu": "a", "torch": "2.1"}


MESH = {"step": 0, "event": "mesh", "mesh": {"shard": 2}, "ranks": [{"rank": 0}, {"rank": 1}]}


def times(step: int, own_s: list[float]) -> dict:
    return {"step": step, "event": "times", "own_s": over_ranks(own_s)}


def test_the_table_holds_medians_since_the_last_start():
    lines = [MESH | {"ranks": [{}] * 4}, times(1, [9.0] * 4), MESH]
    lines += [times(step, [step, 2.0 * step]) for step in (1, 2, 6)]
    table = rank_table(lines)
    assert table.rows() == [{"rank": 0, "own_s": 2.0}, {"rank": 1, "own_s": 4.0}]
    assert table.n_profiled == 3 and table.slowest_rank_ratio == 2.0
    assert rank_table([]) is None


def test_the_peak_of_a_rank_is_the_highest_of_its_lines():
    peaks = [[5, 1], [5, 4], [6, 4]]
    lines = [times(i, [1.0, 1.0]) | {PEAK: over_ranks(peak)} for i, peak in enumerate(peaks)]
    assert rank_table([MESH, *lines]).figures[PEAK] == [6.0, 4.0]


@pytest.mark.parametrize("lines", [[times(1, [1.0])], [MESH, times(1, [1.0])]])
def test_times_of_other_ranks_are_refused(lines):
    with pytest.raises(ValueError, match="mesh"):
        rank_table(lines)
