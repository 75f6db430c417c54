"""Error of every architecture against the float64 oracle, by precision, compiler and kernel, as the
table of docs/architectures.md.

TRITON_INTERPRET=1 python benchmarks/variant_parity.py            prints the table
TRITON_INTERPRET=1 python benchmarks/variant_parity.py --write writes it into docs/architectures.md

Ends with code 1 if a figure is beyond the limit that the tests hold it to.
"""

import re
import sys
from pathlib import Path

import torch
import triton

from tests.model import test_parity as parity

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
MARKS = ("<!-- measured: benchmarks/variant_parity.py -->\n", "<!-- /measured -->")
MODES = {
    "float32": {},
    "compiled": {
        "compile": lambda features: torch.compile(
            features, fullgraph=True, options={"fallback_random": True}
        )
    },
    "Triton": {"kernels": parity.TRITON},
}


def row(name: str) -> tuple[str, bool]:
    """A line of the table, and whether every figure is within its limit."""
    refused = {"compiled"} if parity.made(name)[0].cfg.ragged() else set()
    found = {
        mode: parity.errors(name, **options)
        for mode, options in MODES.items()
        if mode not in refused
    }
    half = parity.errors(name, dtype=torch.bfloat16)
    torch._dynamo.reset()
    figures = {
        m: f"{e.logits:.1e} / {max(e.gradient, e.lambda_gradient):.1e}" for m, e in found.items()
    }
    cells = [figures.get(m, "refused") for m in MODES]
    cells.append(
        f"{half.logits:.1e}" + ("" if half.compared == 1 else f" ({half.compared:.0%} of tokens)")
    )
    good = all(e.rounding_alone for e in found.values()) and half.logits <= parity.BFLOAT16_MAX
    print(name, *cells, "" if good else "BEYOND ITS LIMIT", flush=True)
    return f"| {name} | " + " | ".join(cells) + " |", good


def main() -> int:
    torch.set_num_threads(1)
    rows = [row(name) for name in parity.VARIANTS]
    head = ["| | " + " | ".join((*MODES, "bfloat16")) + " |", "|---" * (len(MODES) + 2) + "|"]
    versions = (
        f"Measured with torch {torch.__version__} and Triton {triton.__version__} in its "
        "interpreter, on a CPU, one thread."
    )
    if "--write" in sys.argv[1:]:
        made = f"\n{versions}\n\n" + "\n".join([*head, *(line for line, _ in rows)]) + "\n\n"
        pattern = re.compile(f"({re.escape(MARKS[0])}).*?({re.escape(MARKS[1])})", re.S)
        PAGE.write_text(pattern.sub(lambda m: m[1] + made + m[2], PAGE.read_text("utf-8")), "utf-8")
    return 0 if all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
