"""A valid small repository, and a copy of it that a test may break."""

import shutil

import pytest

from tools.tampers import small_repo


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid") / "repo"
    small_repo.build(root)
    return root


@pytest.fixture
def repo(valid, tmp_path):
    root = tmp_path / "repo"
    shutil.copytree(valid, root, symlinks=True)
    small_repo.forget()
    return root
