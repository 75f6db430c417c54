"""Every contestant of every part of the kernels' benchmark opens and runs,
at sizes the interpreter can bear.
"""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")

import kernels
from side_by_side import why_not


@pytest.mark.parametrize("part", kernels.PARTS)
def test_a_part_is_rehearsed(part):
    rows, _ = kernels.measure(part, kernels.REHEARSAL, rounds=1, seconds=1e-3)
    installed = [c.name for c in kernels.PARTS[part][2] if not why_not(c.package)]
    unfit = {
        r.name: r.missing
        for r in rows
        if r.name in installed and not r.rates and "No viable backend" not in r.missing
    }
    assert kernels.OURS in [r.name for r in rows if r.rates] and not unfit
