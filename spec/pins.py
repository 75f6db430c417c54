"""Pins of the ledger: signed statements of its head, and proofs that a record is below one.

A pin holds the number of lines, the sha256 of the last of them, and the root of the Merkle tree
over all (RFC 6962, section 2.1). `ssh-keygen` signs and verifies it (OpenSSH 8.1 or later).
"""

import datetime as dt
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from stackproof.spec.archive import Kept, canonical_models
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.errors import EnvironmentUnfit, IntegrityError
from stackproof.spec.files import read_bytes
from stackproof.spec.gates import Frozen
from stackproof.spec.records import HEX64, MOMENT

FILE, SIGNERS = "pins.jsonl", "allowed_signers"
NAMESPACE = "stackproof-ledger"  # of the signatures, so that one of a commit or a mail is none
TIMEOUT_S = 60


class Pin(Frozen):
    """The ledger at a moment: its number of lines, the sha256 of the last, and the Merkle root."""

    size: int = Field(ge=1)
    head: str = Field(pattern=HEX64)
    root: str = Field(pattern=HEX64)
    at: str = Field(pattern=MOMENT)

    def to_bytes(self) -> bytes:
        """What is signed."""
        return canonical_json(self.model_dump()) + b"\n"

    def problem(self, lines: Sequence[bytes]) -> str:
        """Why these lines of a ledger are not those of the pin, or do not follow them; empty if
        they do.
        """
        if len(lines) < self.size:
            return f"the ledger has {len(lines)} lines, {self.size} were pinned"
        if sha256_bytes(lines[self.size - 1]) != self.head:
            return f"line {self.size} of the ledger is not the head that was pinned"
        if merkle_root(lines[: self.size]) != self.root:
            return f"the first {self.size} lines of the ledger are not those that were pinned"
        return ""


class SignedPin(Kept):
    """A line of `pins.jsonl`: a pin, the signer, and the signature in OpenSSH's form."""

    pin: Pin
    signer: str = Field(pattern=r"^[\w.@+-]{1,200}$")
    signature: str = Field(max_length=20_000)


class Inclusion(Frozen):
    """A proof that a line is in a pinned ledger: the hashes beside its way to the root."""

    line: str
    index: int = Field(ge=0)
    path: tuple[str, ...]
    signed: SignedPin

    @model_validator(mode="after")
    def _is_below_the_root(self) -> Self:
        leaf = self.line.encode()
        root = root_from(leaf, self.index, self.signed.pin.size, self.path)
        if root != self.signed.pin.root:
            raise ValueError("the line is not in the ledger that was pinned")
        return self


def pin_of(lines: Sequence[bytes]) -> Pin:
    """The pin of a ledger as it is now. Raises IntegrityError if it has no line."""
    if not lines:
        raise IntegrityError("an empty ledger cannot be pinned", next_step="add a record first")
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Pin(size=len(lines), head=sha256_bytes(lines[-1]), root=merkle_root(lines), at=now)


def read_pins(directory: Path) -> list[SignedPin]:
    """All pins, oldest first; none if the file is missing. Raises IntegrityError naming the line of
    one that is not valid or not canonical.
    """
    return canonical_models(directory / FILE, SignedPin)


def pin_problems(
    directory: Path, lines: Sequence[bytes], signers: Path | None = None
) -> list[tuple[int, str]]:
    """Pins that a ledger does not follow, and signatures that no allowed signer made or that cannot
    be verified, as (line of `pins.jsonl`, message). `signers` is by default the folder's own file.

    Raises IntegrityError as `read_pins`.
    """
    allowed, found = signers or directory / SIGNERS, []
    for number, signed in enumerate(read_pins(directory), start=1):
        found.append((number, signed.pin.problem(lines)))
        try:
            found.append((number, signature_problem(signed, allowed)))
        except EnvironmentUnfit as e:
            found.append((number, f"its signature was not verified: {e.what}"))
    return [(number, problem) for number, problem in found if problem]


# --- the tree -------------------------------------------------------------------------------------


def merkle_root(lines: Sequence[bytes]) -> str:
    """Root of the Merkle tree over lines, hexadecimal."""
    return _subtree([_leaf(line) for line in lines]).hex()


def audit_path(lines: Sequence[bytes], index: int) -> tuple[str, ...]:
    """The hashes beside the way from a line to the root, the nearest first."""
    return tuple(h.hex() for h in _path([_leaf(line) for line in lines], index))


def root_from(line: bytes, index: int, size: int, path: Sequence[str]) -> str:
    """The root that a line at an index of `size` lines gives with its path; empty if the path has
    another length (RFC 9162, section 2.1.3.2).
    """
    here, last, value = index, size - 1, _leaf(line)
    for text in path:
        if last == 0 or len(text) != 64:
            return ""
        beside = bytes.fromhex(text)
        if here % 2 or here == last:
            value = _node(beside, value)
            while here % 2 == 0 and here:
                here, last = here // 2, last // 2
        else:
            value = _node(value, beside)
        here, last = here // 2, last // 2
    return value.hex() if last == 0 and 0 <= index < size else ""


def _leaf(line: bytes) -> bytes:
    return hashlib.sha256(b"\0" + line).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(n: int) -> int:
    """The largest power of two below n."""
    return 1 << (n - 1).bit_length() - 1


def _subtree(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    k = _split(len(leaves))
    return _node(_subtree(leaves[:k]), _subtree(leaves[k:]))


def _path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*_path(leaves[:k], index), _subtree(leaves[k:])]
    return [*_path(leaves[k:], index - k), _subtree(leaves[:k])]


# --- signatures -----------------------------------------------------------------------------------


def sign(pin: Pin, key: Path, signer: str) -> SignedPin:
    """A pin, signed with an OpenSSH key: a private key, or a public one whose private key an agent
    holds. Raises IntegrityError if the key cannot sign, EnvironmentUnfit without ssh-keygen.
    """
    done = _ssh_keygen("-Y", "sign", "-f", str(key), "-n", NAMESPACE, given=pin.to_bytes())
    if done.returncode:
        raise IntegrityError(
            f"{key} did not sign the pin: {done.stderr.decode(errors='replace').strip()[:200]}",
            next_step="ssh-keygen -t ed25519 makes a key; ssh-agent holds one with a passphrase",
        )
    return SignedPin(pin=pin, signer=signer, signature=done.stdout.decode())


def signature_problem(signed: SignedPin, signers: Path) -> str:
    """Why a signature is not one of its signer, by a file of allowed signers; empty if it is.
    Raises EnvironmentUnfit without ssh-keygen.
    """
    try:
        read_bytes(signers)
    except OSError as e:
        return f"the allowed signers cannot be read: {e}"
    with tempfile.TemporaryDirectory(prefix="stackproof-pin-") as folder:
        signature = Path(folder) / "signature"
        signature.write_text(signed.signature)
        names = ("-n", NAMESPACE, "-I", signed.signer, "-s", str(signature))
        options = ("-Y", "verify", "-f", str(signers), *names)
        done = _ssh_keygen(*options, given=signed.pin.to_bytes())
    if done.returncode == 0:
        return ""
    why = (done.stderr or done.stdout).decode(errors="replace").strip()[:200]
    return f"its signature is not one of {signed.signer}: {why or 'it does not verify'}"


def _ssh_keygen(*arguments: str, given: bytes) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments], input=given, capture_output=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError as e:
        raise EnvironmentUnfit(
            "ssh-keygen is not installed, so no signature can be made or verified",
            next_step="install OpenSSH 8.1 or later",
        ) from e
    except subprocess.TimeoutExpired as e:
        raise EnvironmentUnfit(f"ssh-keygen did not end within {TIMEOUT_S} s") from e
