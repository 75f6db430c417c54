"""Compares all kernels of a device: with their reference, and their times with each other."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from typing import Any

import torch

from stackproof.contracts.kernel_call import Case
from stackproof.contracts.loss import gradient_errors
from stackproof.kernels import dispatch, measured, parity, samples
from stackproof.kernels.choice import device_name
from stackproof.kernels.table import OPERATIONS, TORCH, Operation
from stackproof.spec.errors import StackproofError


def seconds_of(call: Callable[[], object], times: int, device: str) -> float:
    """Mean seconds per call over `times` calls, by the clock of the device."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - started) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def work(
    case: Case, function: Callable[..., Any], drawn: Mapping[str, Any]
) -> Callable[[], object]:
    """One forward and backward of a case, to be timed."""
    leaves = case.leaves(drawn)
    arguments = drawn | leaves
    cotangents = case.weighed(case.call(function, arguments))[1]

    def once() -> object:
        outputs = [o for o in case.call(function, arguments) if o.requires_grad]
        return torch.autograd.grad(outputs, tuple(leaves.values()), cotangents)

    return once


@dataclass
class Raced:
    """One kernel on one case: seconds per round and worst relative error, or the reason why it did
    not run.
    """

    case: Case
    kernel: str
    seconds: list[float] = field(default_factory=list)
    rel_error: float | None = None
    missing: str = ""

    def row(self, torch_seconds: list[float]) -> dict[str, Any]:
        """JSON-ready, with the median and the minimum over rounds of torch's time over its time."""
        ratios = [a / b for a, b in zip(torch_seconds, self.seconds)]
        return {
            "operation": self.case.operation,
            "kernel": self.kernel,
            "shapes": self.case.shapes,
            "milliseconds": statistics.median(self.seconds) * 1e3 if self.seconds else None,
            "times_torch": statistics.median(ratios) if ratios else None,
            "times_torch_min": min(ratios) if ratios else None,
            "rel_error": self.rel_error,
            "missing": self.missing,
        }


def race(case: Case, names: Iterable[str], *, rounds: int, seconds: float) -> list[Raced]:
    """Time the kernels of one case in turn, and compare each with the reference in float64."""
    found, works, drawn = [Raced(case, name) for name in names], {}, case.draw()
    expected = case.expected(drawn)
    for raced in found:
        kernel = OPERATIONS[case.operation].kernels[raced.kernel]
        if missing := kernel.why_not(case.device) or (
            kernel.is_triton and parity.why_not(case.operation)
        ):
            raced.missing = missing
            continue
        try:
            function = dispatch.function_of(kernel)
            raced.rel_error = max(gradient_errors(case.results(function, drawn), expected).values())
            once = work(case, function, drawn)
            once()
            times = max(1, round(seconds / max(seconds_of(once, 2, case.device.type), 1e-6)))
        except (RuntimeError, StackproofError) as e:
            # out of memory, or shapes that the kernel refuses
            raced.missing = f"does not run here: {str(e).splitlines()[0][:80]}"
            continue
        works[raced.kernel] = (raced, once, times)
    for number in range(rounds + 1):
        for raced, once, times in works.values():
            taken = seconds_of(once, times, case.device.type)
            if number:  # the first round warms up
                raced.seconds.append(taken)
    return found


def winner(raced: list[list[Raced]], limit: Callable[[Case], float]) -> str:
    """The fastest kernel among those faster than torch's own in every round of every case and
    within its error; else torch's own.
    """
    least: dict[str, float] = {}
    for case in raced:
        base = next(r for r in case if r.kernel == TORCH).seconds
        for r in case:
            fits = r.seconds and r.rel_error is not None and r.rel_error <= limit(r.case)
            ratio = min(a / b for a, b in zip(base, r.seconds)) if fits and base else 0.0
            least[r.kernel] = min(least.get(r.kernel, math.inf), ratio)
    best = max(least, key=least.__getitem__)
    return best if best != TORCH and least[best] > 1 else TORCH


def measure(
    device: torch.device,
    limit: Callable[[Case], float],
    *,
    rounds: int = 5,
    seconds: float = 0.05,
    on_case: Callable[[list[Raced]], None] = lambda raced: None,
    cases: Callable[[Operation, torch.device, torch.dtype], list[Case]] = samples.cases,
) -> measured.Measurement:
    """Compare all kernels of each operation on a device, in every precision that has several of
    them there.

    `limit` is the largest relative error that a case allows.
    `on_case` is called with each finished case.
    """
    rows: list[dict[str, Any]] = []
    winners: dict[str, dict[str, str]] = {}
    dtypes = ("float32", "bfloat16", "float16") if device.type == "cuda" else ("float32",)
    for dtype, op in product(dtypes, OPERATIONS.values()):
        names = [n for n, k in op.kernels.items() if dtype in k.dtypes and not k.why_not(device)]
        if len(names) < 2:
            continue
        raced = []
        for case in cases(op, device, getattr(torch, dtype)):
            raced.append(race(case, names, rounds=rounds, seconds=seconds))
            on_case(raced[-1])
            base = next(r for r in raced[-1] if r.kernel == TORCH).seconds
            rows += [r.row(base) for r in raced[-1]]
        winners.setdefault(dtype, {})[op.name] = winner(raced, limit)
    return measured.Measurement(
        device=device_name(device),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=measured.versions(),
        sha256={op.name: measured.hashes(op) for op in OPERATIONS.values()},
        winners=winners,
        rows=rows,
    )
