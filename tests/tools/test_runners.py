"""The rule about runners sees each way in which a gate is not fed."""

from pathlib import Path

import pytest

from tests.tools import small_repo
from tests.tools.small_repo import edit, git, write
from tools.check_integrity import check

RUNTIME = """
[[gate]]
id = "loss.watched"
title = "Watched"
statement = "It MUST be watched."
moment = "runtime"
severity = "halt"
check = "contracts.loss:Watched"
plants = ["loss.wrong"]
tests = ["tests/test_loss.py::test_golden"]
since = "1.0.0"
sources = ["a paper"]
"""
FED = 'files = ["stack/train.py"]\n'


def no_runner(root: Path) -> None:
    edit(root, "spec/runners.toml", 'kind = "train"', 'kind = "tune"')


def forgotten_event(root: Path) -> None:
    edit(root, "stack/train.py", "StepTaken(1)", "1")


def undeclared_event(root: Path) -> None:
    edit(root, "spec/runners.toml", 'announces = ["StepTaken"]\n', "")


def second_gatekeeper(root: Path) -> None:
    write(root, "stack/other.py", "keeper = Gatekeeper(spec)\n")
    git(root, "add", "-A")


def missing_file(root: Path) -> None:
    edit(root, "spec/runners.toml", FED, 'files = ["stack/train.py", "stack/gone.py"]\n')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_runner, "no runner is entered"),
        (forgotten_event, "none of its files shows one"),
        (undeclared_event, "does not announce StepTaken"),
        (second_gatekeeper, "is in no runner's files"),
        (missing_file, "stack/gone.py, which does not exist"),
    ],
)
def test_a_runner_that_does_not_feed_a_gate_of_its_kind_is_found(repo, change, said):
    """A runtime gate that is fed is no finding; each way of not feeding it is one."""
    write(repo, "spec/gates/loss.toml", (repo / "spec/gates/loss.toml").read_text() + RUNTIME)
    edit(
        repo,
        "contracts/loss.py",
        "def helper",
        '@decides("loss.watched")\nclass Watched:\n    events = (StepTaken,)\n\ndef helper',
    )
    edit(repo, "spec/runners.toml", FED, 'announces = ["StepTaken"]\n' + FED)
    edit(
        repo,
        "stack/train.py",
        "    keeper.preflight",
        "    keeper.observe(StepTaken(1))\n    keeper.preflight",
    )
    messages = lambda: [f.message for f in check(repo) if f.code == "RUNNER-FED"]  # noqa: E731
    small_repo.forget()
    assert messages() == []
    change(repo)
    small_repo.forget()
    assert any(said in message for message in messages()), messages()
