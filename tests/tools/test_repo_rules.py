"""CI runs all that it names, and a cited test can fail."""

import pytest

from tools.tampers.breaks import found
from tools.tampers.small_repo import edit, write

TEST, CI, WORKFLOW = "tests/test_loss.py", ".ci/run", ".github/workflows/ci.yml"


@pytest.mark.parametrize(
    "text",
    [
        "import pytest\n\n@pytest.mark.skip(reason='x')\ndef test_golden():\n    assert f() == 2\n",
        "import pytest\n\n@pytest.mark.xfail\ndef test_golden():\n    assert f() == 2\n",
        "import pytest\n\ndef test_golden():\n    pytest.skip('slow')\n    assert f() == 2\n",
        "def test_golden():\n    return\n    assert f() == 2\n",
        "def test_golden():\n    f()\n",
        "def test_golden():\n    pass\n",
        "def test_golden():\n    assert True\n",
        "def g():\n    return 1\n\ndef test_golden():\n    g()\n",
    ],
)
def test_a_cited_test_that_cannot_fail_is_named(repo, text):
    write(repo, TEST, text)
    assert "TEST-EXISTS" in found(repo)


@pytest.mark.parametrize(
    "text",
    [
        "def test_golden():\n    assert f() == 2\n",
        "def test_golden():\n    for x in 1, 2:\n        assert f(x) == 2\n",
        "import pytest\n\ndef test_golden():\n    with pytest.raises(ValueError):\n        f()\n",
        "def g():\n    assert f() == 1\n\ndef test_golden():\n    g()\n",
        "import pytest\n\n@pytest.mark.skipif(not gpu, reason='no GPU')\ndef test_golden():\n"
        "    assert f() == 2\n",
        "import pytest\n\ndef test_golden():\n    if not gpu:\n        pytest.skip('no GPU')\n"
        "    assert f() == 2\n",
    ],
)
def test_a_cited_test_that_asserts_is_fine(repo, text):
    write(repo, TEST, text)
    assert "TEST-EXISTS" not in found(repo)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (CI, "make test", "make test || true"),
        (CI, "python tools/check_integrity.py", "! python tools/check_integrity.py"),
        (CI, "python tools/check_integrity.py", "python tools/check_integrity.py &"),
        (CI, "ruff check .", "if false; then\nruff check .\nfi"),
        (CI, "ruff check .", "set +e\nruff check ."),
        (CI, "ruff check .", "trap 'exit 0' EXIT\nruff check ."),
        (CI, "mkdocs build --strict", "mkdocs build --strict\nexit 0"),
        (CI, "set -e", "set -u"),
        (CI, "make test", "step make test"),
        (CI, "make test", "make test | cat"),
        (CI, "make test", "make test & wait"),
        (CI, "python tools/check_integrity.py", "python tools/check_integrity.py --self-test"),
        ("Makefile", "-n 2", "--collect-only"),
        ("Makefile", "-n 2", "--lf"),
        ("Makefile", "-n 2", "tests/spec"),
        (WORKFLOW, "  - run: bash .ci/run", "  - run: bash .ci/run || echo red"),
        (WORKFLOW, "  - run: bash", "  - continue-on-error: true\n    run: bash"),
        (WORKFLOW, "  - run: bash", "  - if: github.actor == 'x'\n    run: bash"),
        ("Makefile", "\tpython", "\t-python"),
        ("Makefile", "-n 2", "-n 2 || true"),
        ("Makefile", "-n 2", "-n 2 --ignore=tests/tools"),
        ("Makefile", "-n 2", "-k golden"),
        ("Makefile", "-n 2", "tests/"),
        ("Makefile", "python -m pytest -n 2", "echo"),
    ],
)
def test_an_exit_code_that_is_thrown_away_is_named(repo, path, old, new):
    edit(repo, path, old, new)
    assert "CI-SELF" in found(repo)
