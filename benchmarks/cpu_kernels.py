"""The kernels of the CPU next to torch's own, in turn, in one run:
which one is fastest on this processor.

    python benchmarks/cpu_kernels.py [--rounds 9] [--seconds 0.1] [--threads 2]
        [--run-dir DIR] [--json PATH]

Linear layers, causal attention (whole rows, and a window of a quarter), and a linear head with its
cross-entropy; each forward and backward in float32, at the sizes of `stack/kernels/samples.py` and
by the code of `stack doctor --kernels`. Rates are floating-point operations of the products, those
that a mask hides left out. The heap is kept, as in a run of the stack. What wins belongs into
`MEASURED` of `stack/kernels/choice.py`, with the name of the device that this prints and the id of
the record.
"""

import argparse
import sys
from pathlib import Path

import torch
from side_by_side import Row, against, as_json, close_record, facts, open_record, show, write_json

from stackproof.contracts.kernel_call import Case
from stackproof.kernels import choice, samples
from stackproof.kernels.compare import race
from stackproof.kernels.table import OPERATIONS
from stackproof.train.memory import keep_heap

CPU = torch.device("cpu")
# Kernel of our choice and torch's, of each operation.
OURS = {"linear": "onednn", "attention": "chunks", "linear_cross_entropy": "onednn"}


def titled(case: Case) -> tuple[str, float]:
    """What a case is called, and the operations of its products in units of 10⁹,
    those that a mask hides left out.
    """
    match case.operation:
        case "linear":
            (R, D), M = case.arguments["x"].shape, case.arguments["weight_MD"].shape[0]
            return f"linear {R} × {D} → {M}", 6 * R * D * M / 1e9
        case "attention":
            (B, N, T, H), K = case.arguments["q_BNTH"].shape, case.arguments["k_BKSH"].shape[1]
            window = case.arguments.get("window")
            sight, seen = f", window {window}" if window else "", window or T
            pairs = seen * (seen + 1) // 2 + (T - seen) * seen
            return (
                f"attention {B} rows of {T}, {N}/{K} heads of {H}{sight}",
                14 * B * N * pairs * H / 1e9,
            )
        case "linear_cross_entropy":
            (R, D), V = case.arguments["x_RD"].shape, case.arguments["weight_VD"].shape[0]
            return f"head {R} × {D} → {V}", 6 * R * D * V / 1e9
    raise AssertionError(f"{case.operation} is not measured here")


def measure(case: Case, rounds: int, seconds: float) -> list[Row]:
    """Rows of one case; where our choice cannot run, its row says why."""
    ours, (title, amount) = OURS[case.operation], titled(case)
    rows = [
        Row(
            f"{title}: {raced.kernel}",
            "GFLOP/s",
            tuple(amount / s for s in raced.seconds),
            raced.missing,
        )
        for raced in race(case, (ours, "torch"), rounds=rounds, seconds=seconds)
    ]
    return rows if rows[0].missing else against(rows[0].name, rows)


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
    device = choice.device_name(CPU)
    builder = open_record(options, f"kernels of the CPU ({device})")
    cases = [case for op in OURS for case in samples.cases(OPERATIONS[op], CPU, torch.float32)]
    rows = [row for case in cases for row in measure(case, options.rounds, options.seconds)]
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
