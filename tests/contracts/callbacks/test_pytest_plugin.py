"""The plugin in a run of its own: passes, failures and skips with reasons."""

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest, torch
from tests.contracts.callbacks.test_plain import Tiny

@pytest.fixture
def stack_model():
    return Tiny(causal={causal})

@pytest.fixture
def stack_optimizer(stack_model):
    return torch.optim.AdamW(stack_model.parameters(), lr=1e-3)
"""


def outcome(pytester, *arguments, causal=True, conftest=CONFTEST):
    pytester.makeconftest(conftest.format(causal=causal))
    pytester.makepyfile("def test_mine(): pass")
    return pytester.runpytest_inprocess(
        "-p",
        "stackproof.contracts.callbacks.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-rs",
        "-v",
        *arguments,
    )


def test_without_the_option_there_is_nothing(pytester):
    outcome(pytester).assert_outcomes(passed=1)


def test_each_gate_is_an_outcome_and_not_run_is_a_skip(pytester):
    result = outcome(pytester, "--stack-gates")
    result.assert_outcomes(passed=4, skipped=4)
    result.stdout.fnmatch_lines(["*stack-gate[[]model.causal]*PASSED*"])
    result.stdout.fnmatch_lines(
        ["*SKIPPED*model.isolation was not run: the model takes no attention mask*"]
    )
    result.stdout.fnmatch_lines(["*SKIPPED*tokenizer.identity was not run: *Tokenizer.n_ids*"])


def test_a_red_gate_fails_with_what_it_measured(pytester):
    result = outcome(pytester, "--stack-gates", causal=False)
    result.assert_outcomes(passed=3, failed=1, skipped=4)
    result.stdout.fnmatch_lines(["*model.causal: earlier logits see a later token*leak_rel = *"])


def test_without_the_fixture_every_gate_fails_and_says_so(pytester):
    result = outcome(pytester, "--stack-gates", conftest="")
    result.stdout.fnmatch_lines(["*define the fixture stack_model*"])
    assert result.parseoutcomes()["failed"] == 7


@pytest.fixture(autouse=True)
def _importable(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
