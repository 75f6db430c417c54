"""Rules about archived records and series: the archive list against ledger, tree and history."""

from stackproof.spec.archive import FILE, METADATA, Archived
from stackproof.spec.errors import NoHistory, StackproofError
from tools.integrity.core import At, Messages, Repo, at, rule

PATH = f"evidence/{FILE}"


@rule(
    "ARCHIVE",
    title="Archived files are in the ledger and in history, and not in the tree",
    why="A record that can be neither read nor hashed has been removed.",
    hint="git checkout evidence/; archive with stack evidence archive, and keep the history",
    over=at(PATH),
)
def archive(repo: Repo) -> Messages:
    if unread := repo.ledger.unread():
        repo.not_verified.append(f"ARCHIVE: {len(unread)} archived record(s)")
    if series := repo.ledger.unread_series():
        repo.not_verified.append(f"ARCHIVE: {len(series)} archived series")
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(repo.ledger.archive.lines, start=1):
        files = {(line.record, name) for name in line.files}
        messages = [f"{record}/{name} is listed twice" for record, name in sorted(files & seen)]
        messages += _wrong_record(repo, line) if line.whole else _wrong_series(repo, line)
        yield from (At(text, number) for text in (*messages, *_unreadable(repo, line)))
        seen |= files


def _wrong_record(repo: Repo, line: Archived) -> list[str]:
    name, accepted, hashes = line.record, repo.survey.glances.get(line.record), repo.sha256_of
    released = {record for model in repo.registry for record in model.records.values()}
    problems = {
        f"{name} has no ledger line with this sha256": hashes.get(name) != line.files[METADATA],
        f"{name} is listed as archived and is in the tree": (
            repo.root / "evidence" / name
        ).exists(),
        f"{name} is a record of a released model, which stays in the tree": name in released,
        f"{name} did not succeed; such records stay in the tree": (
            accepted is not None and not accepted.succeeded
        ),
    }
    return [message for message, found in problems.items() if found]


def _wrong_series(repo: Repo, line: Archived) -> list[str]:
    accepted = repo.survey.glances.get(line.record)
    declared = accepted.series if accepted else {}
    found = []
    for name, sha256 in line.files.items():
        if accepted and declared.get(name) != sha256:
            found.append(f"{line.record} declares no series {name} with this sha256")
        if (repo.root / "evidence" / line.record / name).exists():
            found.append(f"{line.record}/{name} is listed as archived and is in the tree")
    return found


def _unreadable(repo: Repo, line: Archived) -> list[str]:
    """Problems with the files of an archived record in history; none without a history."""
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
    over=at(PATH),
)
def append_only(repo: Repo) -> Messages:
    return repo.rewritten(PATH)
