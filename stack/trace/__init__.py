"""Look inside a model while it runs: points, statistics, comparison and bisection of two,
the first NaN, lenses, patching.
"""

from stack.trace.bisect import bisect
from stack.trace.compare import compare
from stack.trace.gradients import compare_gradients
from stack.trace.lens import read_lens, train_lens
from stack.trace.nonfinite import first_nonfinite, watching
from stack.trace.patching import ablate, patch, targets
from stack.trace.trace import trace
from stack.trace.ways import side
from stack.trace.weights import weights

__all__ = [
    "ablate",
    "bisect",
    "compare",
    "compare_gradients",
    "first_nonfinite",
    "patch",
    "read_lens",
    "side",
    "targets",
    "trace",
    "train_lens",
    "watching",
    "weights",
]
