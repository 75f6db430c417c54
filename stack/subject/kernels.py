"""Kernels, compiled graph and half precision of a run."""

from stackproof.contracts.subject import HalfPrecision, Kernels
from stackproof.subject.run import RunParts


class RunKernels(RunParts, Kernels):
    """TODO"""


class RunHalfPrecision(RunParts, HalfPrecision):
    """TODO"""
