"""Imports flow one way, and a frozen spec stays frozen."""

import shutil
from pathlib import Path

import pytest

from tools import check_layers, freeze_spec
from tools.tampers import small_repo
from tools.tampers.small_repo import edit, write

ROOT = Path(__file__).resolve().parents[2]


def test_the_repository_keeps_its_arrow():
    assert check_layers.check(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("spec/a.py", "import stackproof.contracts.gate\n", "stands above"),
        ("spec/a.py", "def f():\n    import torch\n", "must not import torch"),
        ("contracts/a.py", "from stackproof.config import RunConfig\n", "stands above"),
        ("contracts/callbacks/a.py", "def f():\n    import stackproof.config\n", "stands above"),
        ("contracts/a.py", "from tools import site\n", "must not import tools"),
        ("stack/train/a.py", "from stackproof import open_model, cli\n", "stands above"),
        ("stack/train/a.py", "import stackproof\n", "stands above"),
        (
            "tools/a.py",
            "from stackproof.train import loop\n",
            "must not import stackproof.train",
        ),
        ("stack/data/a.py", "from stackproof.model import norm\n", "stands above"),
        ("stack/train/a.py", "from stackproof import cli\n", "stands above"),
        ("stack/config/load.py", "import torch\n", "at module level"),
        ("stack/cli/a.py", "import numpy as np\n", "at module level"),
        ("stack/model/a.py", "import transformers\n", "must not import transformers"),
        (
            "stack/export/a.py",
            "def f():\n    import transformers\n",
            "must not import transformers",
        ),
        ("stack/export/parity.py", "import transformers\n", "must not import transformers"),
        (
            "tools/a.py",
            "from stackproof.contracts.gate import Verdict\n",
            "must not import stackproof.contracts",
        ),
        ("stack/model/a.py", "from . import norm\n", "relative import"),
    ],
)
def test_an_import_against_the_arrow_is_named_with_its_line(tmp_path, path, source, says):
    write(tmp_path, path, source)
    problems = check_layers.check(tmp_path)
    assert any(says in p for p in problems) and all(p.startswith(path + ":") for p in problems)


def test_imports_along_the_arrow_are_fine(tmp_path):
    write(
        tmp_path,
        "stack/train/a.py",
        "from stackproof.model import norm\nfrom stackproof.contracts.gate import x\nfrom "
        "stackproof.spec.gates import y\n",
    )
    write(tmp_path, "stack/__init__.py", "def f():\n    import stackproof.cli.models\n")
    write(tmp_path, "tools/a.py", "from stackproof.spec.gates import load_spec\n")
    write(tmp_path, "stack/cli/a.py", "def f():\n    import torch\n")
    write(tmp_path, "stack/export/parity.py", "def f():\n    import transformers\n")
    assert check_layers.check(tmp_path) == []


@pytest.mark.parametrize("folder", ["spec", "contracts", "stack"])
def test_an_import_by_the_name_of_a_folder_is_refused(tmp_path, folder):
    write(tmp_path, "stack/train/a.py", f"from {folder}.data import x\n")
    assert check_layers.check(tmp_path) == [
        f"stack/train/a.py:1 imports {folder}.data; write {check_layers.NAMES[folder]}.data"
    ]


@pytest.mark.parametrize(
    "back",
    [
        "from stackproof.cli import a\n",
        "import stackproof.cli.a\n",
        "def f():\n    from stackproof.cli.a import x\n",
    ],
)
def test_an_import_circle_is_named_also_inside_a_function(tmp_path, back):
    write(tmp_path, "stack/cli/a.py", "from stackproof.cli.b import y\n")
    write(tmp_path, "stack/cli/b.py", "from stackproof.cli import c\n")
    write(tmp_path, "stack/cli/c.py", "y = 1\n")
    assert check_layers.check(tmp_path) == []
    write(tmp_path, "stack/cli/c.py", back)
    (problem,) = check_layers.check(tmp_path)
    assert "import circle" in problem and all(f"stackproof.cli.{name}" in problem for name in "abc")


def test_tools_import_instead_of_parsing_where_they_can():
    """Only these parse Python: imports, definitions that need torch, and files of old commits."""
    parsers = {
        path.relative_to(ROOT / "tools").as_posix()
        for path in (ROOT / "tools").rglob("*.py")
        if any(each.full == "ast" for each in check_layers.imports(path))
    }
    assert parsers == {"check_layers.py", "source.py", "integrity/former_fingerprint.py"}


def test_nothing_to_read_is_not_green(tmp_path):
    assert check_layers.main(["--root", str(tmp_path)]) == 6


def test_a_committed_release_is_not_rewritten(tmp_path, capsys):
    root = tmp_path / "repo"
    small_repo.build(root)
    path = root / "spec/releases.jsonl"
    committed = path.read_bytes()
    edit(root, "spec/gates/loss.toml", "MUST be right", "MUST be quite right")
    small_repo.forget()
    assert freeze_spec.freeze(root) == 6 and path.read_bytes() == committed
    edit(root, "spec/spec.toml", "1.0.0", "1.0.1")
    small_repo.forget()
    assert freeze_spec.freeze(root) == 0 and path.read_bytes().startswith(committed)
    frozen = path.read_bytes()
    assert (
        len(frozen.splitlines()) == 2
        and freeze_spec.freeze(root) == 0
        and path.read_bytes() == frozen
    )
    edit(root, "spec/gates/loss.toml", "quite right", "wholly right")
    small_repo.forget()
    assert freeze_spec.freeze(root) == 0 and path.read_bytes() != frozen, (
        "a line that was not committed is replaced"
    )
    assert len(path.read_bytes().splitlines()) == 2
    shutil.rmtree(root)
