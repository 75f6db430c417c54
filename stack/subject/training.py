"""How a run trains: fresh trainees, its loss, clipping and optimizer."""

from stackproof.contracts.subject import Trainee, Training
from stackproof.subject.run import RunParts


class RunTraining(RunParts, Training):
    """TODO"""


class RunTrainee(Trainee):
    """TODO"""
