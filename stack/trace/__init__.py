"""Inspect a running model: activation statistics, comparison and bisection of two models,
the first NaN, lenses, patching.
"""

from stackproof.trace.bisect import bisect
from stackproof.trace.compare import compare
from stackproof.trace.gradients import compare_gradients
from stackproof.trace.lens import read_lens, train_lens
from stackproof.trace.model_variant import variant
from stackproof.trace.nonfinite import first_nonfinite, watching
from stackproof.trace.patching import ablate, patch, targets
from stackproof.trace.trace import trace, untraced
from stackproof.trace.weights import weights

__all__ = [
    "ablate",
    "bisect",
    "compare",
    "compare_gradients",
    "first_nonfinite",
    "patch",
    "read_lens",
    "targets",
    "trace",
    "train_lens",
    "untraced",
    "variant",
    "watching",
    "weights",
]
