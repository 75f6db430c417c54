"""Look inside a model while it runs: points, statistics, comparison of two models, bisection, patching."""

from stack.trace.trace import trace

__all__ = ["trace"]
