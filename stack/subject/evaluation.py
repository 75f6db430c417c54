"""How a run scores held-out text, and its stop rule."""

from stackproof.contracts.subject import Evaluation, Stopping
from stackproof.subject.run import RunParts


class RunEvaluation(RunParts, Evaluation):
    """TODO"""


class RunStopping(RunParts, Stopping):
    """TODO"""
