"""Canonical JSON, strict parsing and the hash chain."""

import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackproof.spec import canonical
from stackproof.spec.canonical import canonical_json, parse_lines, parse_strict, to_jsonable
from stackproof.spec.errors import IntegrityError
from stackproof.spec.formulas import (
    bits_per_byte,
    flops_per_token,
    parameter_count,
    perplexity,
    tokens_seen,
)
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import GateResult
from tools.tampers import small_repo

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_canonical_bytes_parse_strictly_and_are_stable(value):
    data = canonical_json(value)
    assert canonical_json(parse_strict(data, origin="x")) == data
    json.loads(data.decode("utf-8"))


@given(JSON, st.booleans())
def test_both_parsers_give_the_same_value(value, spaced):
    """The fast parser takes data without escapes, the other one all; types included."""
    data = json.dumps(to_jsonable(value), ensure_ascii=False, indent=1 if spaced else None)
    line = data.replace("\n", " ").encode()
    with mock.patch.object(canonical, "_without_escapes", lambda texts: None):
        slowly = parse_strict(data.encode(), origin="x")
        lines = parse_lines(line + b"\n\n" + line, origin="x")
    assert repr(parse_strict(data.encode(), origin="x")) == repr(slowly)
    assert repr(parse_lines(line + b"\n\n" + line, origin="x")) == repr(lines)
    assert repr(lines) == repr([slowly, slowly])


@pytest.mark.parametrize("bad", [b'{"a":1,"a":2}', b"[1e999]", b'{"a":1', b"[NaN]", b'["\xff"]'])
def test_a_line_that_is_not_strict_is_named(bad):
    with pytest.raises(IntegrityError, match=r"x:3 is not strict JSON"):
        parse_lines(b'{"a":1}\n\n' + bad + b'\n"b":2}\n', origin="x")


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2,"b":1e999}',
        b'{"a" :1,"b":{"c":0,"c":0}}',
        b'[{"a":"Infinity","a":1e400}]',
        b'{"":0,"":0,"x":-1e999,"y":-1e999}',
    ],
)
def test_a_dropped_key_is_not_made_up_for_by_an_overflow(data):
    with pytest.raises(IntegrityError, match=r"duplicate key|overflows"):
        parse_strict(data, origin="x")


def test_what_json_cannot_hold_becomes_a_string():
    assert (
        canonical_json([float("nan"), float("inf"), -float("inf"), 2**53, 1.5])
        == b'["NaN","Infinity","-Infinity","9007199254740992",1.5]'
    )


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2}',
        b"[NaN]",
        b"[1e999]",
        b"\xef\xbb\xbf{}",
        b"\xff",
        b"[" * 100_000,
        b"1" * 5000,
        b"{",
        b"[Infinity]",
    ],
    ids=[
        "duplicate",
        "nan",
        "overflow",
        "bom",
        "not-utf8",
        "deep",
        "long-integer",
        "torn",
        "infinity",
    ],
)
def test_hostile_json_is_refused_and_never_crashes(data):
    with pytest.raises(IntegrityError, match="ledger-7"):
        parse_strict(data, origin="ledger-7")


def test_chain_names_the_broken_line(tmp_path):
    root = tmp_path / "repo"
    small_repo.build(root)
    ledger = Ledger(root / "evidence")
    assert ledger.problems() == [] and len(ledger.entries()) == 4
    lines = ledger.lines()
    ledger.path.write_bytes(b"\n".join([lines[0], lines[2], lines[3]]) + b"\n")
    assert [n for n, _ in ledger.problems()] == [2, 2, 3]
    with pytest.raises(IntegrityError, match="sequence"):
        ledger.append(next(iter(ledger.records().values())))
    ledger.path.write_bytes(b"\n".join(lines))
    with pytest.raises(IntegrityError, match="middle of a line"):
        ledger.lines()


def test_a_record_id_never_leaves_the_folder(tmp_path):
    for name in ("../x", "a/b", ".hidden", "a\\b"):
        with pytest.raises(IntegrityError, match="plain name"):
            Ledger(tmp_path).record_path(name)


def test_arithmetic_of_the_founding_runs():
    nanolm = {
        "d_model": 256,
        "n_layers": 6,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 32,
        "d_ff": 256,
        "tied_head": True,
    }
    assert abs(parameter_count(nanolm, 32_000) / 10.4e6 - 1) < 0.01
    assert tokens_seen(20_000, 64, 512, 1, 1) == 655_360_000
    assert perplexity(0.0) == 1.0
    assert bits_per_byte(8 * 0.6931471805599453, 8) == pytest.approx(1.0)
    per_token = flops_per_token(nanolm, 32_000, 512)
    matrices = parameter_count(nanolm, 32_000) - 13 * 256
    assert per_token == 6 * matrices + 6 * 6 * 256 * 512
    assert flops_per_token(nanolm, 32_000, 512, backward=False) * 3 == per_token


def test_each_measured_value_of_a_record_keeps_its_type():
    """Equal numbers of two types have two texts elsewhere, such as 1 and True."""
    given = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": None, "f": 10**400, "g": 0.5}
    gate = {"id": "loss.golden", "fingerprint": "0" * 64, "verdict": "pass", "checks": 1}
    held = GateResult.model_validate(gate | {"measured": given}).measured
    assert {k: (type(v), v) for k, v in held.items()} == {k: (type(v), v) for k, v in given.items()}


def test_a_text_with_too_many_values_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(canonical, "MAX_JSON_VALUES", 10)
    assert parse_strict(b"[1,1,1,1,1,1,1,1,1,1]", origin="x") == [1] * 10
    with pytest.raises(IntegrityError, match="x holds too many values"):
        parse_strict(b"[1,1,1,1,1,1,1,1,1,1,1]", origin="x")
