"""Subjects with a part that is not as the trainer made it."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from stackproof.contracts.subject import Subject, Trainee, TraineeOptions, value

T = TypeVar("T")
TINY = TraineeOptions(tiny=True)


def altered(part: T, **members: object) -> T:
    """A copy of a part of a subject in which some members are others: a value for a property, a
    function for a method. Raises AttributeError for a member that its interface does not have.
    """
    kind, own = type(part), {}
    for name, member in members.items():
        former = inspect.getattr_static(kind, name)
        constant = isinstance(former, (property, cached_property, value))
        own[name] = property(lambda self, it=member: it) if constant else staticmethod(member)
    other = copy.copy(part)
    object.__setattr__(other, "__class__", type(kind.__name__, (kind,), own))
    return other


def changed(subject: Subject, **parts: dict[str, object]) -> Subject:
    """A subject with other members: `changed(subject, model={"logits": wrong})`."""
    return replace(
        subject,
        **{name: altered(getattr(subject, name), **members) for name, members in parts.items()},
    )


def with_trainees(subject: Subject, **members: Callable[[Trainee], object]) -> Subject:
    """A subject whose fresh trainees have other members, each made from the trainee as it was:
    `with_trainees(subject, step=lambda trainee: lambda batches: …)`.
    """
    honest = subject.training.trainee

    def trainee(options: TraineeOptions = TraineeOptions()) -> Trainee:
        fresh = honest(options)
        return altered(fresh, **{name: make(fresh) for name, make in members.items()})

    return changed(subject, training={"trainee": trainee})
