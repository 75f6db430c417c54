"""Fixtures shared by all rooms: a small real corpus, a small configuration,
and what its gates judge.
"""

import gc
import json
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# A claim does not depend on how busy the machine is.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

SLOW_ROOMS = ("tests/cli/", "tests/train/test_variants.py", "tests/train/test_trainer.py")


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no worker is left with a long one at the end."""
    items.sort(
        key=lambda item: "slow" not in item.keywords and not item.nodeid.startswith(SLOW_ROOMS)
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make hundreds of thousands of objects and drop few: collections of garbage between
    them are a fifth of their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """What imports and collection made stays: no later collection of garbage goes over it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_probe():
    """The peak rate is probed once a process and not once a run. A probe that other work slowed
    does no harm: the step that is faster than it is followed by a second one, as ever.
    """
    from stackproof.train import start

    patch = pytest.MonkeyPatch()
    patch.setattr(start, "probe_peak_flops", cache(start.probe_peak_flops))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """The museum's text as JSON lines: real English, on every machine."""
    from stackproof.museum.collection import museum_texts

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in museum_texts()), "utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Prepared data of the tests never meets the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STACKPROOF_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def museum_folder(tmp_path_factory):
    """The museum's sources and evaluation set as files."""
    from stackproof.museum.collection import write_texts

    folder = tmp_path_factory.mktemp("museum")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def small_cfg(museum_folder):
    """The museum's configuration: a mixture, packed documents, dropout, accumulation, grouped
    heads, length beyond 256.
    """
    from stackproof.museum.collection import museum_config

    return museum_config(museum_folder)


@pytest.fixture(scope="session")
def dataset(small_cfg, private_cache):
    from stackproof.data.prepare import prepare

    return prepare(small_cfg.data)


@pytest.fixture(scope="session")
def subject(small_cfg, dataset):
    """What the preflight gates judge, of the small run."""
    import torch

    from stackproof.subject.assemble import subject_of

    torch.set_num_threads(1)
    subject = subject_of(small_cfg, dataset, torch.device("cpu"))
    assert subject.model.module is not None, "built here, so that altered copies share it"
    return subject


@pytest.fixture(scope="session")
def spec():
    from stackproof.spec.gates import load_spec

    return load_spec()
