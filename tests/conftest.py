"""Fixtures shared by all rooms: a small real corpus, a small configuration, and the ingredients of its preflight."""

import json
import os
import subprocess
import zlib
from pathlib import Path

import pytest

SLOW_ROOMS = ("tests/cli/", "tests/train/test_variants.py", "tests/train/test_session.py")
TURNS = 3


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no worker is left with a long one at the end; a third of them at each commit.

    STACKPROOF_TESTS=all runs all. Which third it is follows from the commit; the others are skips that say so.
    """
    slow = [i for i in items if "slow" in i.keywords or i.nodeid.startswith(SLOW_ROOMS)]
    items.sort(key=lambda item: item not in slow)
    if len(slow) < 40 or os.environ.get("STACKPROOF_TESTS") == "all":
        return  # somebody asks for these
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    turn = int(head[:8] or "0", 16) % TURNS
    later = pytest.mark.skip(reason="the turn of this slow test comes with another commit; STACKPROOF_TESTS=all runs all")
    for item in slow:
        if zlib.crc32(item.nodeid.encode()) % TURNS != turn:
            item.add_marker(later)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """The museum's text as JSON lines: real English, on every machine."""
    from stack.museum.collection import museum_texts

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
    from stack.museum.collection import write_texts

    folder = tmp_path_factory.mktemp("museum")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def small_cfg(museum_folder):
    """The museum's configuration: a mixture, packed documents, dropout, accumulation, grouped heads, length beyond 256."""
    from stack.museum.collection import museum_config

    return museum_config(museum_folder)


@pytest.fixture(scope="session")
def dataset(small_cfg, private_cache):
    from stack.data.prepare import prepare

    return prepare(small_cfg.data)


@pytest.fixture(scope="session")
def ingredients(small_cfg, dataset):
    """Everything preflight gates see, of the small run."""
    import torch

    from stack.train.preflight import gather

    torch.set_num_threads(1)
    return gather(small_cfg, dataset, torch.device("cpu"))[1]


@pytest.fixture(scope="session")
def spec():
    from spec.gates import load_spec

    return load_spec()
