"""Rules about records that left the tree: the archive list against ledger, tree and history."""

from stackproof.spec.archive import FILE, METADATA, Archived
from stackproof.spec.errors import NoHistory, StackproofError
from tools.integrity.core import Repo, rule
from tools.integrity.foreign import Found

PATH = f"evidence/{FILE}"


@rule(
    "ARCHIVE",
    title="Archived records are in the ledger and in history, and not in the tree",
    why="A record that can be neither read nor hashed is a record that was removed.",
    hint="git checkout evidence/; archive with stack evidence archive, and keep the history",
)
def archive(repo: Repo) -> Found:
    if unread := repo.ledger.unread():
        repo.not_verified.append(f"ARCHIVE: {len(unread)} archived record(s)")
    hashes = {e.record: e.sha256 for e in repo.entries}
    released = {record for model in repo.registry for record in model.records.values()}
    seen: set[str] = set()
    for number, line in enumerate(repo.ledger.archive.lines, start=1):
        name = line.record
        if name in seen:
            yield PATH, number, f"{name} is listed twice"
        seen.add(name)
        if hashes.get(name) != line.files[METADATA]:
            yield PATH, number, f"{name} has no ledger line with this sha256"
        if (repo.root / "evidence" / name).exists():
            yield PATH, number, f"{name} is listed as archived and is in the tree"
        if name in released:
            yield PATH, number, f"{name} is a record of a released model, which stays in the tree"
        if name in repo.accepted and not repo.accepted[name].succeeded:
            yield PATH, number, f"{name} did not succeed; such records stay in the tree"
        yield from ((PATH, number, message) for message in _unreadable(repo, line))


def _unreadable(repo: Repo, line: Archived) -> list[str]:
    """What is wrong with the files of an archived record in history, where there is a history."""
    wrong = []
    for name in line.files:
        try:
            repo.ledger.archive.read(line.record, name)
        except NoHistory:
            return []
        except StackproofError as e:
            wrong.append(e.what)
    return wrong


@rule(
    "ARCHIVE-APPEND-ONLY",
    title="The archive list only ever grew",
    why="A line that is edited or removed makes a record unreachable.",
    hint="restore the committed lines",
)
def append_only(repo: Repo) -> Found:
    if commit := repo.rewritten(PATH):
        yield PATH, 0, f"lines committed in {commit[:10]} were changed or removed"
