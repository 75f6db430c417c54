"""The pool of ranks of this room: processes that are started once."""

import os

import pytest

from stackproof.config import load_config
from stackproof.museum.ranks import SETTINGS, pool
from tests.cli.conftest import in_process  # noqa: F401
from tests.processes import server

SAVED_AT = 6  # and at the end
OF_RUNS = SETTINGS | {"model.dropout": 0.1, "checkpoint.every": SAVED_AT}


@pytest.fixture(scope="session")
def ranks(private_cache):
    server()
    with pool(["tests.distributed.jobs"]) as processes:
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


@pytest.fixture(scope="session")
def cfg(small_cfg):
    """The configuration of the runs of this room, of 12 steps on two ranks."""
    fixed = {key: (value, "test") for key, value in OF_RUNS.items()}
    return load_config(small_cfg, fixed=fixed)[0]


@pytest.fixture(scope="session")
def run(ranks, cache):
    """Train in a folder, fresh or resumed, without gates: how it ended on each rank."""

    def train(cfg, folder, *arguments, job: str = "run", n_ranks: int = 2) -> list:
        name = f"tests.distributed.jobs:{job}"
        found = ranks.run(name, cfg, folder, cache, *arguments, n_ranks=n_ranks)
        assert not [a.raised for a in found if a.raised]
        return [answer.value for answer in found]

    return train


@pytest.fixture(scope="session")
def whole_run(run, cfg, tmp_path_factory):
    """A run on two ranks that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(cfg, folder) == ["completed", None]
    return folder
