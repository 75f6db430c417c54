"""Pins: the Merkle tree against an own definition, and signatures by throw-away keys."""

import hashlib
import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stackproof.spec import pins
from stackproof.spec.errors import EnvironmentUnfit, IntegrityError
from stackproof.spec.pins import (
    Inclusion,
    audit_path,
    merkle_root,
    pin_of,
    root_from,
    sign,
    signature_problem,
)

LINES = [b"line %d" % i for i in range(40)]


def tree_hash(lines):
    """RFC 6962, section 2.1, by levels: a node without a sibling moves up as it is."""
    level = [hashlib.sha256(b"\x00" + line).digest() for line in lines]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\x01" + b"".join(p)).digest() if p[1:] else p[0] for p in pairs]
    return level[0].hex()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 40])
def test_the_root_is_that_of_the_tree_and_every_line_has_a_path_to_it(n):
    lines = LINES[:n]
    assert merkle_root(lines) == tree_hash(lines)
    for index, line in enumerate(lines):
        path = audit_path(lines, index)
        assert root_from(line, index, n, path) == tree_hash(lines)
        assert len(path) <= (n - 1).bit_length()


@given(n=st.integers(1, 40), seed=st.data())
def test_no_other_line_place_size_or_path_gives_the_root(n, seed):
    index = seed.draw(st.integers(0, n - 1))
    lines, path = LINES[:n], audit_path(LINES[:n], index)
    root = merkle_root(lines)
    assert root_from(b"another", index, n, path) != root
    assert root_from(lines[index], n, n, path) != root
    assert root_from(lines[index], index, n, (*path, "0" * 64)) != root
    assert not path or root_from(lines[index], index, n, path[:-1]) != root
    other = seed.draw(st.integers(0, n - 1))
    assert (root_from(lines[index], other, n, path) == root) == (other == index)


def test_a_pin_is_that_of_its_lines_and_of_all_that_follow():
    pin = pin_of(LINES[:7])
    assert pin.problem(LINES[:7]) == pin.problem(LINES) == ""
    assert "6 lines, 7 were pinned" in pin.problem(LINES[:6])
    assert "not the head" in pin.problem([*LINES[:6], b"x", *LINES[7:]])
    assert "are not those" in pin.problem([b"x", *LINES[1:]])
    with pytest.raises(IntegrityError, match="empty ledger"):
        pin_of([])


@pytest.fixture
def keys(tmp_path):
    """Two key pairs, and the file that allows the first."""
    for name in ("owner", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name]
        subprocess.run([*command, "-f", tmp_path / name], check=True)
    allowed = tmp_path / "allowed_signers"
    allowed.write_text("owner@example.org " + (tmp_path / "owner.pub").read_text())
    return tmp_path / "owner", tmp_path / "other", allowed


def test_a_signature_is_that_of_an_allowed_signer_over_the_whole_pin(keys):
    owner, other, allowed = keys
    signed = sign(pin_of(LINES), owner, "owner@example.org")
    assert signature_problem(signed, allowed) == ""
    for field, value in (("size", 39), ("head", "0" * 64), ("at", "2026-01-01T00:00:00Z")):
        changed = signed.model_copy(update={"pin": signed.pin.model_copy(update={field: value})})
        assert "not one of owner@example.org" in signature_problem(changed, allowed)
    for wrong in (
        sign(pin_of(LINES), other, "owner@example.org"),
        sign(pin_of(LINES), owner, "other@example.org"),
        signed.model_copy(update={"signature": ""}),
    ):
        assert "its signature is not one of" in signature_problem(wrong, allowed)
    assert "cannot be read" in signature_problem(signed, allowed.with_name("absent"))


def test_a_signature_for_another_purpose_is_none(keys, monkeypatch):
    owner, _, allowed = keys
    monkeypatch.setattr(pins, "NAMESPACE", "git")
    signed = sign(pin_of(LINES), owner, "owner@example.org")
    assert signature_problem(signed, allowed) == ""
    monkeypatch.undo()
    assert "not one of" in signature_problem(signed, allowed)


def test_without_a_key_or_without_openssh_the_error_names_it(tmp_path, monkeypatch):
    with pytest.raises(IntegrityError, match="did not sign"):
        sign(pin_of(LINES), tmp_path / "nothing", "owner@example.org")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfit, match="ssh-keygen is not installed"):
        sign(pin_of(LINES), tmp_path / "nothing", "owner@example.org")


def test_an_inclusion_proof_holds_for_its_line_alone(keys):
    owner, _, _ = keys
    signed = sign(pin_of(LINES), owner, "owner@example.org")
    proof = Inclusion(line="line 9", index=9, path=audit_path(LINES, 9), signed=signed)
    document = json.loads(proof.model_dump_json())
    assert Inclusion.model_validate(document) == proof
    for change in ({"line": "line 8"}, {"index": 8}, {"path": document["path"][1:]}):
        with pytest.raises(ValidationError, match="not in the ledger that was pinned"):
            Inclusion.model_validate(document | change)
