"""How a run saves and restores."""

from stackproof.contracts.subject import Checkpoints, SavedCheckpoint
from stackproof.subject.run import RunParts


class RunCheckpoints(RunParts, Checkpoints):
    """TODO"""


class WrittenCheckpoint(SavedCheckpoint):
    """TODO"""
