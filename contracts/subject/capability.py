"""How an interface marks what an adapter may leave out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Generic, TypeVar

T = TypeVar("T")


class NotOffered(Exception):
    """A check needs a capability that the trainer does not offer."""

    def __init__(self, capability: str):
        super().__init__(f"the trainer does not offer {capability}")
        self.capability = capability


def capability(method: Callable) -> Callable:
    """Mark a method of an interface. Called on an adapter that does not override it, it raises
    NotOffered.
    """
    name = method.__qualname__

    @wraps(method)
    def refuse(self, *args, **kwargs):
        raise NotOffered(name)

    refuse.not_offered = True
    return refuse


class value(Generic[T]):
    """Mark a value of an interface. An adapter sets an attribute of this name, or defines a
    property; without either, reading it raises NotOffered.
    """

    def __init__(self, member: Callable[..., T]):
        self.name, self.__doc__ = member.__qualname__, member.__doc__

    def __get__(self, part: object, owner: type) -> T:
        if part is None:
            return self
        raise NotOffered(self.name)


def offers(method: Callable) -> bool:
    """Whether an adapter overrides a method of an interface: `offers(subject.model.logits)`."""
    return not getattr(method, "not_offered", False)


def offered(read: Callable[[], T]) -> T | None:
    """What reading a value gives; None where the adapter does not offer it."""
    try:
        return read()
    except NotOffered:
        return None
