"""Pins the ledger with a signature, and proves that a record is in a pinned ledger."""

from pathlib import Path

from stackproof.evidence.ledgering import writing
from stackproof.spec import pins
from stackproof.spec.canonical import parse_strict
from stackproof.spec.errors import IntegrityError
from stackproof.spec.files import append_durably, read_bytes
from stackproof.spec.ledger import Entry, Ledger
from stackproof.spec.pins import Inclusion, SignedPin
from stackproof.spec.tables import validated


def pin(directory: Path, key: Path, signer: str) -> SignedPin:
    """Sign the ledger as it is and append the pin. Raises IntegrityError if the chain or a former
    pin does not hold, or if `allowed_signers` does not allow the signature; nothing is written
    then.
    """
    with writing(directory):
        ledger = Ledger(directory)
        former = [signed.pin.problem(ledger.lines()) for signed in pins.read_pins(directory)]
        broken = [f"line {line}: {text}" for line, text in ledger.problems()]
        if problems := [*broken, *filter(None, former)]:
            raise IntegrityError(
                f"a ledger that does not hold is not pinned: {problems[0]}",
                next_step="stack evidence verify names all problems",
            )
        signed = pins.sign(pins.pin_of(ledger.lines()), key, signer)
        if problem := pins.signature_problem(signed, directory / pins.SIGNERS):
            raise IntegrityError(
                f"the pin would not verify: {problem}",
                next_step=f'add "{signer} " and the public key as a line to '
                f"{directory / pins.SIGNERS}",
            )
        append_durably(directory / pins.FILE, signed.to_line())
    return signed


def inclusion(directory: Path, record_id: str) -> Inclusion:
    """The proof that a record is in the newest pinned ledger. Raises IntegrityError if none holds
    it.
    """
    ledger = Ledger(directory)
    lines = ledger.lines()
    index = _index(ledger.entries(), record_id)
    newest = next((s for s in reversed(pins.read_pins(directory)) if s.pin.size > index), None)
    if newest is None:
        raise IntegrityError(
            f"no pin covers {record_id}, line {index + 1} of the ledger",
            next_step="stack evidence pin --key KEY --signer NAME",
        )
    if problem := newest.pin.problem(lines):
        raise IntegrityError(problem, next_step="git checkout the ledger")
    path = pins.audit_path(lines[: newest.pin.size], index)
    return Inclusion(line=lines[index].decode(), index=index, path=path, signed=newest)


def _index(entries: list[Entry], record_id: str) -> int:
    for entry in entries:
        if entry.record == record_id:
            return entry.seq
    raise IntegrityError(
        f"{record_id} is not in the ledger", next_step="stack evidence show ID takes a prefix"
    )


def check_inclusion(proof: Path, signers: Path) -> Entry:
    """The ledger line that a proof shows. Raises IntegrityError if the proof or its signature does
    not hold.
    """
    try:
        document = parse_strict(read_bytes(proof), origin=str(proof))
    except OSError as e:
        raise IntegrityError(f"{proof} cannot be read: {e}") from e
    shown = validated(Inclusion, document, origin=str(proof))
    if problem := pins.signature_problem(shown.signed, signers):
        raise IntegrityError(problem, next_step="get the allowed signers from the ledger's owner")
    line = parse_strict(shown.line.encode(), origin=f"the line in {proof}")
    return validated(Entry, line, origin=f"the line in {proof}")
