"""`pytest --stack-gates`: each preflight gate becomes a test on the model of your own fixtures.

Define the fixture `stack_model`, and optionally `stack_optimizer` (given `stack_model`) and
`stack_tokenizer`, in a conftest.py. A gate that could not be run is a skip with its reason, never a
pass.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("stackproof").addoption(
        "--stack-gates",
        action="store_true",
        help="run every preflight gate of stackproof on the model of the fixture stack_model",
    )


def pytest_collection_modifyitems(session, config: pytest.Config, items: list) -> None:
    """One test for each gate, once a session, beside the folder the run was started in."""
    if not config.getoption("--stack-gates"):
        return
    from stackproof.contracts.callbacks.session import preflight_gates

    home = next(filter(None, (item.getparent(pytest.Module) for item in items)), None)
    if home is None:
        raise pytest.UsageError(
            "--stack-gates needs at least one test beside the fixture stack_model, so that its "
            "conftest.py is read"
        )
    gates = preflight_gates()
    items += [GateItem.from_parent(home, name=f"stack-gate[{g.id}]", gate=g) for g in gates]


class GateItem(pytest.Function):
    """One gate on the model of the fixtures."""

    def __init__(self, *, gate, parent, name: str, **kwargs):
        self.gate = gate
        super().__init__(name=name, parent=parent, callobj=_judge(gate), **kwargs)

    def reportinfo(self):
        return self.path, None, f"stack gate {self.gate.id}"


def _judge(gate):
    def test(request):
        from stackproof.contracts.callbacks.session import judge_model

        given = {
            name: _fixture(request, f"stack_{name}") for name in ("model", "optimizer", "tokenizer")
        }
        if given["model"] is None:
            pytest.fail(
                "define the fixture stack_model in a conftest.py; it returns the model to judge"
            )
        verdict = judge_model(given.pop("model"), **given, gates=[gate])[gate.id]
        if verdict.outcome == "not_run":
            pytest.skip(f"{gate.id} was not run: {verdict.message}")
        if verdict.outcome == "fail":
            measured = ", ".join(f"{k} = {v}" for k, v in verdict.measured.items())
            pytest.fail(f"{gate.id}: {verdict.message} ({measured})", pytrace=False)

    return test


def _fixture(request, name: str):
    try:
        return request.getfixturevalue(name)
    except pytest.FixtureLookupError as e:
        if e.argname != name:
            raise
        return None
