"""Look inside a model while it runs: points, statistics, comparison of two models, bisection."""

from stack.trace.bisect import bisect
from stack.trace.compare import compare
from stack.trace.trace import trace
from stack.trace.ways import side

__all__ = ["bisect", "compare", "side", "trace"]
