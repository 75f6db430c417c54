"""Gates of the tokenizer: green on the stack, red on what they are for."""

import pytest

from contracts.gate import call_check


@pytest.mark.parametrize("gate_id", ["tokenizer.round-trip", "tokenizer.pinning"])
def test_each_gate_is_green_on_the_stack(spec, ingredients, gate_id):
    verdict = call_check(spec.gates[gate_id], ingredients)
    assert verdict.outcome == "pass", verdict.message


class Forgetful:
    """A tokenizer whose decode loses one double space."""

    def __init__(self, inner):
        self._inner = inner

    def decode(self, ids):
        return self._inner.decode(ids).replace("  ", " ", 1)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_round_trip_is_red_on_one_lost_space(spec, ingredients):
    off = ingredients | {"tokenizer": Forgetful(ingredients["tokenizer"])}
    assert call_check(spec.gates["tokenizer.round-trip"], off).outcome == "fail"


class WithPin:
    def __init__(self, stream):
        self._stream, self.tokenizer_sha256 = stream, ["0" * 64]

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_pinning_is_red_on_one_shard(spec, ingredients):
    splits = ingredients["splits"] | {"validation": WithPin(ingredients["splits"]["validation"])}
    verdict = call_check(spec.gates["tokenizer.pinning"], ingredients | {"splits": splits})
    assert verdict.outcome == "fail" and verdict.measured["wrong"] == 1
