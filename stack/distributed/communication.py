"""What share of a step its collective operations take, by torch's profiler.

An operation is under way while the backend has work for it, which includes the wait for the data of
other ranks. It is exposed while no operator computes: on a GPU, no kernel.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = ("gloo:", "nccl")  # names of what lasts as long as an operation
# Operators that start or await an operation; the others compute.
CALLS = ("c10d::", "_c10d_functional::", "FSDP::")


class Event(NamedTuple):
    """An event of the profiler: nanoseconds, and the thread or stream that it belongs to."""

    name: str
    start_ns: int
    end_ns: int
    line: int = 0


@dataclass
class Communication:
    """Of a step on one rank: its seconds, those with a collective operation under way, and those of
    them without a computation.
    """

    step_s: float = 0.0
    under_way_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def own_s(self) -> float:
        """Seconds of the step without those in which the rank only communicated."""
        return self.step_s - self.exposed_s

    @property
    def communication_frac(self) -> float:
        """Share of the step with an operation under way (0-1)."""
        return self.under_way_s / self.step_s

    @property
    def exposed_frac(self) -> float:
        """Share of the step in which the rank only communicated (0-1)."""
        return self.exposed_s / self.step_s


@contextmanager
def profiled(device: torch.device) -> Iterator[Communication]:
    """Measure a block that ends with the work of the device done. What is yielded is filled in
    after the block.
    """
    # The library of the profiler notes each start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    on_gpu, found = device.type == "cuda", Communication()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        started = perf_counter()
        yield found
        found.step_s = perf_counter() - started
    # Not profiler.events(), which builds a tree and takes longer than a step.
    of_device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [
        Event(e.name(), e.start_ns(), e.end_ns(), e.start_thread_id())
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == of_device
    ]
    found.under_way_s, found.exposed_s = shares(events, on_gpu=on_gpu)


def shares(events: Sequence[Event], *, on_gpu: bool) -> tuple[float, float]:
    """Seconds with a collective operation under way, and those of them without a computation."""
    under_way = [e for e in events if e.name.startswith(COLLECTIVES)]
    others = [e for e in events if not e.name.startswith(COLLECTIVES)]
    computing = others if on_gpu else operators(others)
    # Of two sets A and B: |A without B| = |A or B| - |B|.
    exposed_ns = duration_ns([*under_way, *computing]) - duration_ns(computing)
    return duration_ns(under_way) / 1e9, exposed_ns / 1e9


def operators(events: Sequence[Event]) -> list[Event]:
    """The innermost operators of each thread: one that holds others may await an operation."""
    ordered = sorted(events, key=lambda e: (e.line, e.start_ns, -e.end_ns))
    inner = [
        e
        for e, after in zip(ordered, [*ordered[1:], None])
        if after is None or after.line != e.line or after.start_ns >= e.end_ns
    ]
    return [e for e in inner if "::" in e.name and not e.name.startswith(CALLS)]


def duration_ns(events: Sequence[Event]) -> int:
    """How long at least one of them lasts."""
    if not events:
        return 0
    spans = np.array(sorted((e.start_ns, e.end_ns) for e in events))
    reached = np.maximum.accumulate(spans[:, 1])  # by all that began before
    begins = np.maximum(spans[1:, 0], reached[:-1])
    first = spans[0, 1] - spans[0, 0]
    return int(first + np.maximum(spans[1:, 1] - begins, 0).sum())
