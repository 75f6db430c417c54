"""The rule about pins: signed statements of what the ledger was."""

from collections.abc import Iterator

from stackproof.spec import pins
from stackproof.spec.errors import EnvironmentUnfit
from tools.integrity.core import At, Messages, Repo, at, rule

PATH, SIGNERS = f"evidence/{pins.FILE}", f"evidence/{pins.SIGNERS}"


@rule(
    "PIN",
    title="The ledger begins with every ledger that was pinned",
    why="A ledger that forks from a signed pin was rewritten, even if all hashes fit.",
    hint="git checkout evidence/; a pin is only added, by stack evidence pin",
    over=at(PATH),
)
def pin(repo: Repo) -> Messages:
    lines = repo.ledger.lines()
    signed = pins.read_pins(repo.root / "evidence")
    for number, line in enumerate(signed, start=1):
        yield from (At(text, number) for text in _problems(repo, line, lines))
    if repo.signers is not None and not signed:
        yield f"holds no pin that {repo.signers} could allow"
    yield from repo.rewritten(PATH)
    yield from (At(message, path=SIGNERS) for message in repo.rewritten(SIGNERS))


def _problems(repo: Repo, signed: pins.SignedPin, lines: list[bytes]) -> Iterator[str]:
    if problem := signed.pin.problem(lines):
        yield problem
    try:
        problem = pins.signature_problem(signed, repo.signers or repo.root / SIGNERS)
    except EnvironmentUnfit as e:
        repo.not_verified.append(f"PIN: {e.what}")
        return
    if problem:
        yield problem
