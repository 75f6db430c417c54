"""Rules about relations between records: parents, successors, the data of a run, equal runs."""

import datetime as dt

from stackproof.spec.canonical import sha256_json
from stackproof.spec.records import Record
from tools.integrity.core import LEDGER, At, Messages, Repo, at, each_record, rule
from tools.integrity.glance import trained_by


@rule(
    "PARENTS",
    title="Parents of records are in the ledger, and began before them",
    why="A run that continues another one stands on its record.",
    hint="add the parent first",
    over=each_record,
)
def parents(repo: Repo, record: Record) -> Messages:
    for parent in record.parents:
        seen = repo.seen_glance(parent)
        if parent not in repo.sha256_of:
            yield f"its parent {parent} is not in the ledger"
        elif seen is not None and _moment(seen.started_at) > _moment(record.started_at):
            yield f"its parent {parent} began at {seen.started_at}, it began at {record.started_at}"


@rule(
    "SUPERSEDES",
    title="A record is superseded by a later one of its kind, which judges what was red",
    why="A red run that another kind of record replaces is a failure that is hidden.",
    hint="make the same run again and supersede the old record with that",
    over=at(LEDGER),
)
def supersedes(repo: Repo) -> Messages:
    for entry in repo.entries:
        old = repo.seen_glance(entry.supersedes) if entry.supersedes else None
        new = repo.seen_glance(entry.record)
        if old is None or new is None:
            continue
        pair = f"{entry.record} supersedes {entry.supersedes}"
        if old.kind != new.kind:
            yield f"{pair}, which is of another kind"
        elif _moment(new.started_at) <= _moment(old.started_at):
            yield f"{pair}, which began later"
        elif unjudged := sorted(old.red - new.judged):
            yield f"{pair}, which was red on {unjudged[0]}, and does not judge it"


def _moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


@rule(
    "DATA-RECORD",
    title="A run on a built data set has that data set's record",
    why="The record of the data holds the sources, their licences and what was dropped.",
    hint="stack evidence add the folder that stack data build made",
)
def data_record(repo: Repo) -> Messages:
    built = {m for g in repo.glances.values() if g.kind == "data" for m in g.manifests_out}
    for name, glance in repo.glances.items():
        if glance.is_on_built_data and not glance.manifests_in & built:
            text = "was trained on a data set of which the ledger holds no record"
            yield At(text, path=repo.record_file(name))


@rule(
    "DUP-METRICS",
    title="Two runs do not share their losses",
    why="Identical curves under two configurations are one run counted twice.",
    hint="supersede the copy",
)
def dup_metrics(repo: Repo) -> Messages:
    seen: dict[float, str] = {}
    of_twins: dict[str, str] = {}
    for name, glance in repo.glances.items():
        if glance.kind != "train" or glance.val_loss_nats is None:
            continue
        twin = seen.setdefault(glance.val_loss_nats, name)
        if twin == name:
            continue
        if twin not in of_twins:
            of_twins[twin] = _trained_by(repo, twin)
        if of_twins[twin] != _trained_by(repo, name):
            message = f"has the same held-out loss as {twin} under another configuration"
            yield At(message, path=repo.record_file(name))


def _trained_by(repo: Repo, name: str) -> str:
    """Hash of the part of a run's configuration that decides its numbers."""
    return sha256_json(trained_by(repo.records[name]))
