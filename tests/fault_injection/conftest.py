"""Fixtures: those of the command line's tests, and runs of nine steps."""

import shutil

import pytest

from stackproof.config import NeverStop
from stackproof.museum.collection import museum_config
from stackproof.train import start
from tests.cli.conftest import cli_cache, in_process, stack  # noqa: F401
from tests.fault_injection import rank_runs
from tests.fault_injection.nine_steps import EVERY, FEW, STEPS, begin, killed


@pytest.fixture(scope="module")
def cfg(museum_folder):
    base = museum_config(museum_folder)
    saved = base.checkpoint.model_copy(update={"every": EVERY, "keep": 9})
    steps = base.train.model_copy(update={"max_steps": STEPS})
    looks = base.eval.model_copy(update={"every": EVERY})
    short = base.sample.model_copy(update={"max_new_tokens": 16})
    changes = {"train": steps, "stop": NeverStop(), "checkpoint": saved, "eval": looks}
    return base.model_copy(update=changes | {"sample": short})


@pytest.fixture(scope="module")
def few_gates():
    """All runs here, resumed ones too, hold the same few gates."""
    keeper, patch = start.Gatekeeper, pytest.MonkeyPatch()
    patch.setattr(start, "Gatekeeper", lambda *a, **o: keeper(*a, **o | {"only": FEW}))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def straight(cfg, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    begin(cfg, run)
    return run


@pytest.fixture
def finished(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run")


@pytest.fixture(scope="module")
def interrupted_once(cfg, tmp_path_factory):
    return killed(cfg, tmp_path_factory.mktemp("killed") / "run", 8)


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """A run that a kill ended after step 8; its latest checkpoint is of step 6."""
    return shutil.copytree(interrupted_once, tmp_path / "run")


@pytest.fixture(scope="session", params=rank_runs.LAYOUTS)
def undisturbed(request, tmp_path_factory, text_file, cli_cache):  # noqa: F811
    """A run on two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = rank_runs.arguments(text_file, rank_runs.LAYOUTS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKPROOF_CACHE", str(cli_cache))
        done = rank_runs.launched(*command, folder=folder)
    assert done.code == 0, done.said()
    return rank_runs.Undisturbed(request.param, command, folder, done)


@pytest.fixture
def prepared(monkeypatch, cli_cache):  # noqa: F811
    """All runs read the data that the first one prepared."""
    monkeypatch.setenv("STACKPROOF_CACHE", str(cli_cache))
