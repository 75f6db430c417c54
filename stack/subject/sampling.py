"""How a run generates text."""

from stackproof.contracts.subject import Sampling
from stackproof.subject.run import RunParts


class RunSampling(RunParts, Sampling):
    """TODO"""
