"""The kernels of the CPU next to torch's own, in turn, in one run:
which one is fastest on this processor.

    python benchmarks/cpu_kernels.py [--rounds 9] [--seconds 0.1] [--threads 2]
        [--run-dir DIR] [--json PATH]

Linear layers, causal attention (whole rows, and a window of a quarter), and a linear head with its
cross-entropy; each forward and backward in float32, at the sizes of shapes a and b of `training.py`
and one of a larger model. Rates are floating-point operations of the products, those that a mask
hides left out. The heap is kept, as in a run of the stack. What wins belongs into `MEASURED` of
`stack/kernels/dispatch.py`, with the name of the device that this prints and the id of the record.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from side_by_side import (
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    write_json,
)
from torch import Tensor

from stackproof.kernels import dispatch
from stackproof.train.allocator import keep_heap

Call = Callable[[], object]
# Kernel of our choice and torch's, of each operation.
OURS = {"linear": "onednn", "attention": "chunks", "linear_cross_entropy": "onednn"}
LINEAR = ((4096, 128, 384), (4096, 256, 768), (2048, 1024, 1024))  # rows, inputs, outputs
# rows, heads, key/value heads, tokens, width
ATTENTION = ((16, 4, 4, 256, 32), (8, 8, 2, 512, 32), (2, 16, 4, 1024, 64))
HEAD = ((4096, 128, 512), (4096, 256, 32000))  # rows, features, vocabulary


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def gradients(result: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> object:
    return torch.autograd.grad(result, leaves, grad)


def linear(kernel: Callable, R: int, D: int, M: int) -> tuple[Call, float]:
    """A call, and its operations in units of 10⁹."""
    x, weight, grad = numbers(R, D).requires_grad_(), numbers(M, D).requires_grad_(), numbers(R, M)
    return lambda: gradients(kernel(x, weight), (x, weight), grad), 6 * R * D * M / 1e9


def attend(
    kernel: Callable, B: int, N: int, K: int, T: int, H: int, window: int | None
) -> tuple[Call, float]:
    q, k, v = (numbers(B, T, n, H).transpose(1, 2).requires_grad_() for n in (N, K, K))
    grad, seen = numbers(B, T, N, H).transpose(1, 2), window or T
    pairs = seen * (seen + 1) // 2 + (T - seen) * seen
    return lambda: gradients(
        kernel(q, k, v, window=window), (q, k, v), grad
    ), 14 * B * N * pairs * H / 1e9


def lose(kernel: Callable, R: int, D: int, V: int) -> tuple[Call, float]:
    x, weight, labels = (
        numbers(R, D).requires_grad_(),
        (0.05 * numbers(V, D)).requires_grad_(),
        torch.randint(0, V, (R,)),
    )
    return lambda: gradients(
        kernel(x, weight, labels)[0], (x, weight), torch.tensor(1.0)
    ), 6 * R * D * V / 1e9


def sections() -> dict[str, tuple[str, Callable[[Callable], tuple[Call, float]]]]:
    """What is measured: title -> (operation, how a call of one kernel is made)."""
    found = {
        f"linear {R} × {D} → {M}": ("linear", partial(linear, R=R, D=D, M=M)) for R, D, M in LINEAR
    }
    for B, N, K, T, H in ATTENTION:
        for window in (None, T // 4):
            sight = f", window {window}" if window else ""
            sizes = partial(attend, B=B, N=N, K=K, T=T, H=H, window=window)
            found[f"attention {B} rows of {T}, {N}/{K} heads of {H}{sight}"] = ("attention", sizes)
    return found | {
        f"head {R} × {D} → {V}": ("linear_cross_entropy", partial(lose, R=R, D=D, V=V))
        for R, D, V in HEAD
    }


def measure(title: str, op: str, make: Callable, rounds: int, seconds: float) -> list[Row]:
    """Rows of one section; where our choice cannot run, its row says why."""
    from kernels import seconds_of

    ours = OURS[op]
    missing = dispatch.why_not(op, ours, "cpu")
    rows, work = {}, {}
    for name in (ours, "torch"):
        rows[name] = Row(f"{title}: {name}", "GFLOP/s", missing=missing if name == ours else "")
        if rows[name].missing:
            continue
        call, amount = make(dispatch.CANDIDATES[op][name].function)
        times = max(1, round(seconds / seconds_of(call, 2, "cpu")))
        work[name] = lambda call=call, amount=amount, times=times: (
            amount / seconds_of(call, times, "cpu")
        )
    for name, rates in alternate(work, rounds).items():
        rows[name] = replace(rows[name], rates=rates)
    return list(rows.values()) if missing else against(rows[ours].name, list(rows.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="of one kernel in one round, about"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_heap()
    device = dispatch.device_name(torch.device("cpu"))
    builder = open_record(options, f"kernels of the CPU ({device})")
    rows = [
        row
        for title, (op, make) in sections().items()
        for row in measure(title, op, make, options.rounds, options.seconds)
    ]
    show(
        f"kernels forward and backward, float32, {device}, {options.threads} threads, "
        f"{options.rounds} rounds in turn",
        rows,
    )
    write_json(options.json, {"facts": facts(("torch",)), "device": device, "rows": as_json(rows)})
    close_record(builder, options.run_dir, rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
