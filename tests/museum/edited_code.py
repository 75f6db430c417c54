"""Functions that tests of plant edits change. Their texts are quoted there."""

from contextlib import contextmanager
from functools import cache, cached_property

from icontract import require

calls: list[int] = []


def mean(values, scale=1.0):
    """Mean of values."""
    total = 0.0
    for value in values:
        if value < 0:
            total -= value
        elif value > 100:
            total += 100
        else:
            total += value
    return scale * total / len(values)


alias = mean


@require(lambda x: x > 0)
def guarded(x):
    return x + 1


@cache
def remembered(x):
    return x * 2


@contextmanager
def opened(x):
    yield x


def closing(offset):
    def shifted(x):
        return x + offset

    return shifted


class Counter:
    start = 1

    def __init__(self):
        self.n = self.start

    def up(self):
        self.n += 1
        return self.n

    @property
    def double(self):
        return 2 * self.n

    @cached_property
    def triple(self):
        return 3 * self.n

    @classmethod
    def fresh(cls):
        return cls().n

    @staticmethod
    def one():
        return 1


class Child(Counter):
    def up(self):
        return super().up() + 10


built_in = len
