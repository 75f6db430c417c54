"""Look inside a model while it runs: points, statistics, comparison and bisection of two,
the first NaN, lenses, patching.
"""

from stackproof.trace.bisect import bisect
from stackproof.trace.compare import compare
from stackproof.trace.gradients import compare_gradients
from stackproof.trace.lens import read_lens, train_lens
from stackproof.trace.nonfinite import first_nonfinite, watching
from stackproof.trace.patching import ablate, patch, targets
from stackproof.trace.trace import trace
from stackproof.trace.ways import side
from stackproof.trace.weights import weights

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
