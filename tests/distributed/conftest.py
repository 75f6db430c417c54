"""The pool of ranks of this room: processes that are started once."""

import os

import pytest

from stackproof.museum.ranks import pool


@pytest.fixture(scope="session")
def ranks(private_cache):
    with pool() as processes:
        yield processes


@pytest.fixture
def answers(ranks):
    """The values that a job returns on each rank; an error of one of them is raised here."""

    def run(job: str, *arguments, n_ranks: int = 2) -> list:
        found = ranks.run(f"tests.distributed.jobs:{job}", *arguments, n_ranks=n_ranks)
        assert not [a.raised for a in found if a.raised]
        return [answer.value for answer in found]

    return run


@pytest.fixture(scope="session")
def cache(private_cache):
    """Where prepared data are, for jobs."""
    return os.environ["STACKPROOF_CACHE"]
