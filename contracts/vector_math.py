"""The vector functions of Intel MKL, by which torch computes cos, exp, … on a CPU.

MKL selects the code of each function at its first call, without a lock. If several threads make
that call at once, one of them may compute its part with code of low accuracy, in this call alone
(github.com/pytorch/pytorch/issues/188792). Then two processes give different bits.
"""

from functools import cache

import torch

# In every domain; functions that a build of torch does not compute by MKL cost a microsecond.
ARGUMENT = 0.5
FUNCTIONS = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.sin, torch.tan, torch.tanh),
    *(torch.cosh, torch.sinh, torch.erf, torch.erfc, torch.erfinv, torch.lgamma),
    *(torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2),
    *(torch.sqrt, torch.trunc, torch.abs),
)


@cache
def select_vector_functions() -> None:
    """Make the first call of each function in this process on one element, which one thread
    computes; in float32 and float64, since each type has its own code.
    """
    for dtype in (torch.float32, torch.float64):
        element = torch.full((1,), ARGUMENT, dtype=dtype, device="cpu")
        for function in FUNCTIONS:
            function(element)
