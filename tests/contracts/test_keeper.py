"""The Gatekeeper: a check that breaks is no verdict, and hides none."""

import pytest

from contracts.keeper import Gatekeeper
from spec.errors import GateFailed

TWO = ("loss.golden", "optim.clip-spike")


def broken(*arguments):
    raise RuntimeError("out of order")


def test_a_check_that_breaks_hides_no_red_gate(spec, ingredients):
    keeper = Gatekeeper(spec, only=TWO)
    with pytest.raises(GateFailed) as caught:
        keeper.preflight(ingredients | {"cross_entropy_sum": broken, "clip": lambda grads: 1.0})
    assert caught.value.gate_id == "optim.clip-spike" and isinstance(caught.value.__cause__, RuntimeError)
    said = {r.id: (r.verdict, r.checks, r.message) for r in keeper.results()}
    assert said["loss.golden"] == ("not_run", 0, "its check broke: RuntimeError: out of order")
    assert said["optim.clip-spike"][:2] == ("fail", 1)


def test_a_check_that_breaks_alone_is_an_error_and_the_others_were_asked(spec, ingredients):
    keeper = Gatekeeper(spec, only=TWO)
    with pytest.raises(RuntimeError, match="out of order"):
        keeper.preflight(ingredients | {"cross_entropy_sum": broken})
    assert {r.id: r.verdict for r in keeper.results()} == {"loss.golden": "not_run", "optim.clip-spike": "pass"}
