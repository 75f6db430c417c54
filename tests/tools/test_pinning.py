"""A pinned ledger: what was signed stays, and a record is proven to be in it."""

import json
import subprocess

import pytest

from stackproof.evidence import ledgering, pinning
from stackproof.spec import pins
from stackproof.spec.errors import EnvironmentUnfit, IntegrityError
from stackproof.spec.ledger import Ledger
from stackproof.spec.pins import FILE, SIGNERS, read_pins
from tests.cli.conftest import in_process  # noqa: F401
from tools.integrity.core import Repo, findings_in
from tools.tampers import small_repo
from tools.tampers.breaks import folder, found, put, rechain

OWNER = "owner@example.org"


@pytest.fixture
def key(repo, tmp_path):
    """A throw-away key that the small repository allows to pin its ledger."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    public = path.with_suffix(".pub").read_text()
    small_repo.write(repo, f"evidence/{SIGNERS}", f"{OWNER} {public}")
    return path


def codes(root, signers=None):
    small_repo.forget()
    return {f.code for f in findings_in(Repo(root, signers))}


def test_a_pin_holds_and_every_later_one_too(repo, key):
    evidence = repo / "evidence"
    for number in (1, 2):
        signed = pinning.pin(evidence, key, OWNER)
        assert signed.pin.size == len(Ledger(evidence).lines()) == number + 3
        small_repo.commit_all(repo)
        assert codes(repo) == codes(repo, evidence / SIGNERS) == set()
        commit = small_repo.git(repo, "rev-list", "--max-parents=0", "HEAD").strip()
        small_repo.record(repo, "resume", 30 + number, commit)
        small_repo.commit_all(repo)
    assert len(read_pins(evidence)) == 2 and "PIN" not in found(repo)


def test_a_ledger_that_forks_from_a_pin_is_red_though_all_is_hashed_again(repo, key):
    """Also if its history was rewritten, so that no commit shows another ledger."""
    pinning.pin(repo / "evidence", key, OWNER)
    rechain(repo, "resume", put("claim", value="another"))
    small_repo.git(repo, "checkout", "-q", "--orphan", "rewritten")
    small_repo.commit_all(repo)
    assert "PIN" in found(repo) and "LEDGER-APPEND-ONLY" not in found(repo)
    assert any("not the head that was pinned" in p for p in ledgering.verify(repo / "evidence"))


def test_a_pin_by_nobody_who_may_is_red(repo, key, tmp_path):
    """The cheat allows a key of its own; the reader has the owner's."""
    pinning.pin(repo / "evidence", key, OWNER)
    small_repo.commit_all(repo)
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    trusted = tmp_path / "trusted"
    trusted.write_text(f"{OWNER} {other.with_suffix('.pub').read_text()}")
    assert "PIN" not in codes(repo) and "PIN" in codes(repo, trusted)
    small_repo.write(repo, f"evidence/{SIGNERS}", trusted.read_text())
    assert "PIN" in codes(repo)


def test_a_pin_that_is_gone_is_red(repo, key):
    pinning.pin(repo / "evidence", key, OWNER)
    small_repo.commit_all(repo)
    (repo / "evidence" / FILE).unlink()
    assert "PIN" in codes(repo)
    small_repo.git(repo, "checkout", "-q", "HEAD~1", "--", ".")
    assert "PIN" in codes(repo, repo / "evidence" / SIGNERS)


def test_only_a_ledger_that_holds_is_pinned_and_only_by_an_allowed_key(repo, key, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    for wrong in ((other, OWNER), (key, "other@example.org")):
        with pytest.raises(IntegrityError, match="the pin would not verify"):
            pinning.pin(repo / "evidence", *wrong)
    pinning.pin(repo / "evidence", key, OWNER)
    rechain(repo, "resume", put("claim", value="another"))
    with pytest.raises(IntegrityError, match="a ledger that does not hold is not pinned"):
        pinning.pin(repo / "evidence", key, OWNER)
    assert len(read_pins(repo / "evidence")) == 1


def test_a_record_is_proven_to_be_in_the_pinned_ledger(repo, key, tmp_path, in_process):  # noqa: F811
    evidence, name = repo / "evidence", folder(repo, "train").name
    with pytest.raises(IntegrityError, match="no pin covers"):
        pinning.inclusion(evidence, name)
    options = ("--evidence", str(evidence))
    code, pinned = in_process("evidence", "pin", "--key", str(key), "--signer", OWNER, *options)
    assert code == 0 and pinned["pin"]["size"] == 4
    proof = tmp_path / "proof.json"
    code, document = in_process("evidence", "inclusion", name, "--out", str(proof), *options)
    assert code == 0 and document == json.loads(proof.read_bytes())
    signers = ("--allowed-signers", str(evidence / SIGNERS))
    code, entry = in_process("evidence", "check-inclusion", str(proof), *signers)
    assert code == 0 and entry["record"] == name
    proof.write_text(json.dumps(document | {"index": 0}))
    code, _ = in_process("evidence", "check-inclusion", str(proof), *signers)
    assert code == 6
    with pytest.raises(IntegrityError, match="is not in the ledger"):
        pinning.inclusion(evidence, "train-20260110T120100Z-ffffffff")


def test_without_openssh_a_fork_is_red_and_a_signature_is_not_taken_for_verified(
    repo, key, monkeypatch, tmp_path
):
    pinning.pin(repo / "evidence", key, OWNER)
    small_repo.commit_all(repo)

    def missing(*arguments, given):
        raise EnvironmentUnfit("ssh-keygen is not installed")

    monkeypatch.setattr(pins, "_ssh_keygen", missing)
    (only,) = [f for f in findings_in(Repo(repo)) if f.code == "PIN"]
    assert "was not verified" in only.message
    rechain(repo, "resume", put("claim", value="another"))
    small_repo.forget()
    messages = [f.message for f in findings_in(Repo(repo)) if f.code == "PIN"]
    assert any("not the head that was pinned" in message for message in messages)
