"""Triton kernels next to torch's own, in turn, in one run on a GPU.

    python benchmarks/kernels.py --part NAME [--rounds 9] [--seconds 0.2]
        [--run-dir DIR] [--json PATH]
    python benchmarks/kernels.py --part NAME --rehearse

Parts: attention-64, attention-128 (head_dim; forward and backward), forward-64, forward-128,
naive-64 (against attention as written in a textbook), rms-norm, swiglu (bytes moved per second,
against a copy), cross-entropy, and tiles, which tries other tiles of flash attention and records
nothing. `stack doctor --kernels` compares all kernels of this device by the same code and at other
sizes. Without a CUDA device the exit code is 7. `--rehearse` runs the same on the CPU with tiny
sizes in Triton's interpreter, to see that nothing breaks: its figures mean nothing and no record of
them can be written.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
import torch.nn.functional as F
from side_by_side import (
    Contestant,
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    why_not,
    write_json,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stackproof.contracts.kernel_call import Case, Layout
from stackproof.kernels import attention as torch_attention
from stackproof.kernels import dispatch, eager
from stackproof.kernels.compare import seconds_of, work
from stackproof.kernels.table import OPERATIONS, TORCH, TRITON
from stackproof.spec.errors import EnvironmentUnfit

Call = Callable[[], object]
OURS = "ours: Triton"
COPY_SHARE, SDPA_SHARE, NAIVE_RATIO = 0.85, 0.9, 3.1
PACKAGES = ("torch", "triton", "liger-kernel")


@dataclass(frozen=True)
class Sizes:
    """What is measured: attention (B, N, T), rows × features,
    rows × width × vocabulary of a loss.
    """

    device: str
    dtype: torch.dtype
    B: int
    N: int
    T: int
    naive_T: int
    rows: int
    features: int
    loss: tuple[int, int, int]


GPU = Sizes("cuda", torch.bfloat16, 16, 16, 2048, 512, 65536, 4096, (16384, 2048, 128256))
REHEARSAL = Sizes("cpu", torch.float16, 1, 1, 70, 40, 6, 80, (8, 16, 50))


# ---- attention


def naive(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """As in a textbook: all scores, a mask, a softmax, in the dtype of the input."""
    T, H = q_BNTH.shape[2:]
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTH.device).triu(1)
    return (
        (q_BNTH @ k_BNTH.transpose(-1, -2) * H**-0.5).masked_fill(hidden_TT, float("-inf"))
    ).softmax(-1) @ v_BNTH


def ours(op: str) -> Callable:
    return dispatch.function_of(OPERATIONS[op].kernels[TRITON])


def forward_and_backward(case: Case, function: Callable) -> Call:
    return work(case, function, case.draw())


def attend(
    attention: Callable,
    sizes: Sizes,
    T: int,
    H: int,
    *,
    backward: bool,
    backend: SDPBackend | None = None,
) -> tuple[Call, float]:
    """One call of an attention, and its floating-point operations in units of 10¹²: half of all
    pairs, five products backward.
    """
    heads = Layout((sizes.B, sizes.N, T, H), (T * sizes.N * H, H, sizes.N * H, 1), sizes.dtype)
    case = Case(
        "attention",
        {"q_BNTH": heads, "k_BKSH": heads, "v_BKSH": heads},
        torch.device(sizes.device),
    )
    if backward:
        made = forward_and_backward(case, attention)
    else:
        qkv = case.draw().values()
        made = torch.no_grad()(lambda: attention(*qkv))

    def call() -> object:
        with sdpa_kernel([backend]) if backend is not None else nullcontext():
            return made()

    products = 2 + 5 * backward
    return call, products * sizes.B * sizes.N * T * T * H / 1e12


def attention_part(H: int, *, backward: bool) -> list[Contestant]:
    """Ours, every backend of torch's attention."""
    measured = partial(attend, H=H, backward=backward)
    of_torch = [
        (SDPBackend.FLASH_ATTENTION, SDPA_SHARE),
        (SDPBackend.CUDNN_ATTENTION, SDPA_SHARE if backward else None),
        (SDPBackend.EFFICIENT_ATTENTION, SDPA_SHARE if backward else None),
        (SDPBackend.MATH, None),
    ]
    return [
        Contestant(OURS, "triton", lambda s: measured(ours("attention"), s, s.T)),
        *(
            Contestant(
                f"SDPA {b.name.lower()}",
                "",
                lambda s, b=b: measured(torch_attention.attention, s, s.T, backend=b),
                goal,
            )
            for b, goal in of_torch
        ),
    ]


def naive_part(H: int) -> list[Contestant]:
    return [
        Contestant(
            OURS, "triton", lambda s: attend(ours("attention"), s, s.naive_T, H, backward=True)
        ),
        Contestant(
            "naive", "", lambda s: attend(naive, s, s.naive_T, H, backward=True), NAIVE_RATIO
        ),
    ]


# ---- what is bounded by memory: rates are GB/s of the bytes that must be moved


def copy(sizes: Sizes) -> tuple[Call, float]:
    source = torch.randn(sizes.rows, sizes.features, device=sizes.device, dtype=sizes.dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes / 1e9


def normalise(sizes: Sizes, *, triton: bool) -> tuple[Call, float]:
    """Forward and backward: x and its gradient each read and written once, x read again."""
    x, weight = dense(sizes, sizes.features), Layout((sizes.features,), (1,), torch.float32)
    return one_of(
        "rms_norm", {"x_BTD": x, "weight_D": weight, "eps": 1e-5}, sizes, triton
    ), 5 * n_bytes(sizes) / 1e9


def gate(sizes: Sizes, *, triton: bool) -> tuple[Call, float]:
    """Forward and backward: two read, one written; three read, two written."""
    arguments = {"gate_BTF": dense(sizes, sizes.features), "up_BTF": dense(sizes, sizes.features)}
    return one_of("swiglu", arguments, sizes, triton), 8 * n_bytes(sizes) / 1e9


def dense(sizes: Sizes, features: int) -> Layout:
    return Layout((sizes.rows, features), (features, 1), sizes.dtype)


def n_bytes(sizes: Sizes) -> int:
    return sizes.rows * sizes.features * sizes.dtype.itemsize


def one_of(op: str, arguments: dict, sizes: Sizes, triton: bool) -> Call:
    case = Case(op, arguments, torch.device(sizes.device))
    return forward_and_backward(
        case, ours(op) if triton else dispatch.function_of(OPERATIONS[op].kernels[TORCH])
    )


def memory_part(work: Callable[..., tuple[Call, float]]) -> list[Contestant]:
    return [
        Contestant(OURS, "triton", partial(work, triton=True)),
        Contestant("copy", "", copy, COPY_SHARE),
        Contestant("torch", "", partial(work, triton=False)),
    ]


# ---- loss


def lose(loss: Callable, sizes: Sizes) -> tuple[Call, float]:
    """Forward and backward of a linear layer and its cross-entropy;
    rates in thousands of rows per second.
    """
    R, D, V = sizes.loss
    labels = torch.randint(V, (R,), device=sizes.device)
    arguments = {
        "x_RD": Layout((R, D), (D, 1), sizes.dtype),
        "weight_VD": Layout((V, D), (D, 1), sizes.dtype),
        "labels_R": labels,
    }
    return forward_and_backward(
        Case("linear_cross_entropy", arguments, torch.device(sizes.device)), loss
    ), R / 1e3


def whole_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")


def liger_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, x, labels)


LOSS_PART = [
    Contestant(OURS, "triton", lambda s: lose(ours("linear_cross_entropy"), s)),
    Contestant("all logits", "", partial(lose, whole_loss)),
    Contestant("torch linear_cross_entropy", "", partial(lose, eager.library_linear_cross_entropy)),
    Contestant("Liger", "liger_kernel", partial(lose, liger_loss)),
]

# ---- parts and the measurement

PARTS: dict[str, tuple[str, str, list[Contestant]]] = {
    "attention-64": (
        "causal attention forward and backward, head_dim 64",
        "TFLOP/s",
        attention_part(64, backward=True),
    ),
    "attention-128": (
        "causal attention forward and backward, head_dim 128",
        "TFLOP/s",
        attention_part(128, backward=True),
    ),
    "forward-64": (
        "causal attention forward, head_dim 64",
        "TFLOP/s",
        attention_part(64, backward=False),
    ),
    "forward-128": (
        "causal attention forward, head_dim 128",
        "TFLOP/s",
        attention_part(128, backward=False),
    ),
    "naive-64": ("causal attention against the textbook's, head_dim 64", "TFLOP/s", naive_part(64)),
    "rms-norm": ("RMSNorm forward and backward", "GB/s", memory_part(normalise)),
    "swiglu": ("SwiGLU forward and backward", "GB/s", memory_part(gate)),
    "cross-entropy": ("linear cross-entropy forward and backward", "thousand rows/s", LOSS_PART),
}


def peak_bytes(call: Call, device: str) -> int:
    """Most memory that one call needs on top of what is there before it;
    0 where the device does not say.
    """
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    part: str, sizes: Sizes, rounds: int, seconds: float
) -> tuple[list[Row], dict[str, tuple[float, str]]]:
    """Rows of one part, and the memory that each contestant needs."""
    _, unit, contestants = PARTS[part]
    rows: dict[str, Row] = {}
    work: dict[str, Callable[[], float]] = {}
    extra: dict[str, tuple[float, str]] = {}
    for contestant in contestants:
        row = Row(contestant.name, unit, missing=why_not(contestant.package), goal=contestant.goal)
        rows[contestant.name] = row
        if row.missing:
            continue
        try:
            call, amount = contestant.open(sizes)
            call()
            once_s = max(seconds_of(call, 2, sizes.device), 1e-6)
        except RuntimeError as e:  # a backend that this device or build has not
            rows[contestant.name] = replace(
                row, missing=f"does not run here: {str(e).splitlines()[0][:60]}"
            )
            continue
        key = "".join(c if c.isalnum() else "_" for c in contestant.name.lower())
        extra[f"peak_bytes_{key}"] = (peak_bytes(call, sizes.device), "B")
        times = max(1, round(seconds / once_s))
        work[contestant.name] = lambda call=call, amount=amount, times=times: (
            amount / seconds_of(call, times, sizes.device)
        )
    for name, rates in alternate(work, rounds).items():
        rows[name] = replace(rows[name], rates=rates)
    return against(OURS, list(rows.values())), extra


def try_tiles(sizes: Sizes, rounds: int) -> None:
    """Milliseconds of forward and of forward and backward for other tiles of flash attention, best
    first. Edit TILES by hand.
    """
    from stackproof.kernels.triton import flash_attention
    from stackproof.kernels.triton.flash_attention import TILES, Tile

    shapes = (
        [Tile(*t) for t in product((64, 128), (32, 64, 128), (4, 8), (2, 3))]
        if sizes.device == "cuda"
        else [Tile(32, 32, 4, 1)]
    )
    for H, kernel in product((64, 128), range(3)):
        key = (sizes.dtype.itemsize, H)
        own, found = TILES[key], []
        for tile in (own[kernel], *shapes):
            TILES[key] = (*own[:kernel], tile, *own[kernel + 1 :])
            try:
                call, _ = attend(flash_attention.attention, sizes, sizes.T, H, backward=kernel > 0)
                call()
                found.append(
                    (
                        statistics.median(seconds_of(call, 3, sizes.device) for _ in range(rounds))
                        * 1e3,
                        tile,
                    )
                )
            except Exception as e:  # out of shared memory or registers: triton raises what it likes
                print(f"{tile}: {type(e).__name__}")
        TILES[key] = own
        print(f"\nhead_dim {H}, {('forward', 'dq', 'dk and dv')[kernel]}; now {own[kernel]}")
        for ms, tile in sorted(found, key=lambda f: f[0])[:5]:
            print(f"{ms:10.3f} ms  {tile}")


def open_gpu_record(options: argparse.Namespace, title: str):
    """The record, with the GPU's facts in place of the CPU's."""
    from stackproof.spec.provenance import environment

    builder = open_record(options, title)
    if builder is not None:
        versions = {f"peer_{k}": v for k, v in facts(PACKAGES)["versions"].items()}
        builder.environment = builder.environment | environment("cuda") | versions
    return builder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*PARTS, "tiles"], required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of one contestant in one round, about"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; no record")
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rehearse and options.run_dir is not None:
        parser.error("--rehearse writes no record; leave out --run-dir")
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device, so nothing was measured and nothing is recorded",
            file=sys.stderr,
        )
        return EnvironmentUnfit.exit_code
    sizes = REHEARSAL if options.rehearse else GPU
    torch.manual_seed(20240607)
    if options.part == "tiles":
        try_tiles(sizes, options.rounds)
        return 0
    title = PARTS[options.part][0]
    record = open_gpu_record(options, title)
    rows, extra = measure(options.part, sizes, options.rounds, options.seconds)
    show(
        f"{title}, "
        f"{'rehearsal on the CPU' if options.rehearse else torch.cuda.get_device_name()}, "
        f"{options.rounds} rounds in turn",
        rows,
    )
    for name, (value, _) in extra.items():
        print(f"{name}: {value / 2**20:,.0f} MiB")
    write_json(
        options.json,
        {
            "machine": facts(PACKAGES),
            "rehearsal": options.rehearse,
            "rows": as_json(rows),
            "extra": extra,
        },
    )
    close_record(record, options.run_dir, rows, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
