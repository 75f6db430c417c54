"""The rule about pins: signed statements of what the ledger was."""

from stackproof.spec import pins
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
    evidence = repo.root / "evidence"
    for number, text in pins.pin_problems(evidence, repo.ledger.lines(), repo.signers):
        yield At(text, number)
    if repo.signers is not None and not pins.read_pins(evidence):
        yield f"holds no pin that {repo.signers} could allow"
    yield from repo.rewritten(PATH)
    yield from (At(message, path=SIGNERS) for message in repo.rewritten(SIGNERS))
