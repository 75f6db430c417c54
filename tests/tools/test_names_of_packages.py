"""The package has one name: in a project with folders of the same names, in a wheel,
and from a bare checkout.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stackproof
from tools.check_layers import NAMES, module_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = "|".join(NAMES)
# An import by the name of a folder, as a statement, in the text of a program,
# or in an example of a page.
BARE = re.compile(
    rf"(?:(?<![\w.])|(?<=\\n))(?:from (?:{FOLDERS})(?:\.\w+)* import\b|-m (?:{FOLDERS})(?![\w/]))"
)
STATEMENT = re.compile(
    rf"(?:^|[;\"'`]|\\n) *import (?:\w[\w.]*, *)*(?:{FOLDERS})(?=\s*$|[.,;\"'`]|\\n| as )",
    re.MULTILINE,
)


def bare_imports(text: str) -> list[str]:
    """Imports of `spec`, `contracts` or `stack` in a file of Python or a page."""
    return [m[0] for pattern in (BARE, STATEMENT) for m in pattern.finditer(text)]


@pytest.mark.parametrize("folder", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "from {} import x\n",
        "def f():\n    from {}.a.b import x\n",
        "import {}\n",
        "import os, {}.cli as c\n",
        "code = 'import os\\nfrom {}.cli import main'\n",
        "code = 'import {}; print()'\n",
        "```sh\npython -m {} doctor\n```\n",
    ],
)
def test_an_import_by_the_name_of_a_folder_is_found(text, folder):
    assert bare_imports(text.format(folder))
    assert not bare_imports(text.format(NAMES[folder])) and not bare_imports(
        text.format(f"my.{folder}")
    )


def test_only_stackproof_is_imported_anywhere():
    kinds = ["*.py", "*.md", "*.sh", "Makefile", ".ci"]
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", *kinds], capture_output=True, text=True, check=True
    )
    files = [
        f
        for f in listed.stdout.splitlines()
        if not f.startswith("evidence/") and (ROOT / f).is_file()
    ]
    assert len(files) > 500
    assert {f: bare for f in files if (bare := bare_imports((ROOT / f).read_text("utf-8")))} == {}


def test_every_package_of_the_folders_is_shipped():
    found = {
        module_of(p.relative_to(ROOT))
        for folder in NAMES
        for p in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PACKAGING["tool"]["setuptools"]["packages"])


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(stackproof.__file__).read_text("utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.name: n.module for n in block.body for a in n.names}
    assert seen == {name: f"stackproof.{home}" for name, home in stackproof._HOMES.items()}
    assert set(stackproof.__all__) == {"__version__", *seen} <= set(dir(stackproof))
    for name, module in seen.items():
        assert getattr(stackproof, name) is getattr(importlib.import_module(module), name)
    assert stackproof.__version__ == PACKAGING["project"]["version"]
    with pytest.raises(AttributeError, match="no attribute 'open_modle'"):
        _ = stackproof.open_modle


OURS = ", ".join(NAMES)
PROJECT = f"""
import sys
from pathlib import Path

import {OURS}  # those of this project

import stackproof
from stackproof import load_spec, recipe
from stackproof.cli import main
from stackproof.contracts.callbacks.plain import gated
from stackproof.contracts.gate import resolve
from stackproof.evaluate.suite import SUITES
from stackproof.kernels.parity import SOURCES, passed
from stackproof.spec import SPEC_DIR

assert spec.MINE and contracts.MINE and stack.MINE
assert all(Path(m.__file__).parent.parent == Path.cwd() for m in (spec, contracts, stack))
declared = load_spec()
assert all(len(declared.fingerprint(g)) == 64 and resolve(gate) for g, gate in declared.gates.items())
assert set(passed()) == set(SOURCES) and list(SUITES.glob("*.toml")) and (SPEC_DIR / "releases.jsonl").is_file()
assert Path(stackproof.__file__).with_name("py.typed").is_file()
assert not [m for m in sys.modules if m.startswith(("tools", "tests"))]
print(stackproof.__file__)
"""  # noqa: E501
MODEL = f"""
import pytest, torch, {OURS}
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)

    def forward(self, ids):
        return self.head(self.embed(ids))

@pytest.fixture
def stack_model():
    return Tiny()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder into which the built wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in NAMES:
        shutil.copytree(
            ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "built", "./source"]
    subprocess.run(built, cwd=folder, check=True, capture_output=True)
    (file,) = (folder / "built").glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", "site", str(file)],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "site"


@pytest.fixture(params=["checkout", "wheel", "not installed"])
def project(request, tmp_path):
    """A function that runs Python in a project with packages called like our folders,
    and where our package must be.
    """
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    match request.param:
        case "wheel":
            path, home = (
                request.getfixturevalue("wheel"),
                request.getfixturevalue("wheel") / "stackproof",
            )
        case "not installed":
            path, home = ROOT / "tools/checkout", ROOT / "stack"
        case _:
            path, home = None, ROOT / "stack"
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    )

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run, tmp_path, home


@pytest.mark.slow
def test_a_project_with_packages_of_the_same_names_can_use_ours(project):
    run, folder, home = project
    (folder / "program.py").write_text(PROJECT)
    assert Path(run("program.py").splitlines()[-1]) == home / "__init__.py"
    assert "data.order" in run("-m", "stackproof", "gates", "list", "--json")
    assert "stdlib-docs" in run("-m", "stackproof", "train", "pocket", "--dry-run", "--json")
    assert not (home / "evidence" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_the_pytest_plugin_asks_in_such_a_project(project):
    run, folder, _ = project
    (folder / "conftest.py").write_text(MODEL)
    (folder / "test_mine.py").write_text(
        f"import {OURS}\n\ndef test_mine():\n    assert spec.MINE\n"
    )
    said = run(
        "-m",
        "pytest",
        "-p",
        "stackproof.contracts.callbacks.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "--stack-gates",
        "-v",
    )
    assert "stack-gate[model.causal] PASSED" in said and "test_mine.py::test_mine PASSED" in said


def test_the_plugin_is_entered_by_its_module():
    (name,) = PACKAGING["project"]["entry-points"]["pytest11"].values()
    assert importlib.import_module(name).pytest_addoption
    assert set(PACKAGING["project"]["scripts"].values()) == {"stackproof.cli:main"}


def test_importing_the_package_loads_none_of_its_modules():
    code = (
        "import sys, stackproof; print([m for m in sys.modules if m.startswith('stackproof.') or "
        "m == 'torch'])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_the_integrity_check_names_what_brings_a_missing_package():
    code = (
        "import runpy, sys; sys.modules['pydantic'] = None; sys.argv = ['check_integrity.py', "
        "'--list']\n"
    )
    code += f"runpy.run_path({str(ROOT / 'tools/check_integrity.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 7
        and "pydantic" in done.stderr
        and "pip install ." in done.stderr
        and "Traceback" not in done.stderr
    )
