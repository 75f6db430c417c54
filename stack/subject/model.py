"""The model and the experts of a run."""

from stackproof.contracts.subject import Experts, Model
from stackproof.subject.run import RunParts


class RunModel(RunParts, Model):
    """TODO"""


class RunExperts(RunParts, Experts):
    """TODO"""
