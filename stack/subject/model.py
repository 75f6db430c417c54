"""The model and the experts of a run."""

from stackproof.contracts.subject import Experts, Model
from stackproof.subject.run import RunParts


class RunModel(RunParts, Model):
    """TODO"""

    @property
    def max_length(self) -> int:
        return self.cfg.model.max_seq_len


class RunExperts(RunParts, Experts):
    """TODO"""
