"""Rules about relations between records: parents, the data of a run, and equal runs."""

from stackproof.spec.records import BESIDE_TRAINING, Record
from stackproof.spec.renamed_keys import translated
from tools.integrity.core import At, Messages, Repo, each_record, number, rule


@rule(
    "PARENTS",
    title="Parents of records are in the ledger",
    why="A run that continues another one stands on its record.",
    hint="add the parent first",
    over=each_record,
)
def parents(repo: Repo, record: Record) -> Messages:
    known = {e.record for e in repo.entries}
    for parent in record.parents:
        if parent not in known:
            yield f"its parent {parent} is not in the ledger"


@rule(
    "DATA-RECORD",
    title="A run on a built data set has that data set's record",
    why="The record of the data holds the sources, their licences and what was dropped.",
    hint="stack evidence add the folder that stack data build made",
    over=each_record,
)
def data_record(repo: Repo, record: Record) -> Messages:
    manifests = lambda files: {a.sha256 for a in files if a.path == "manifest.json"}  # noqa: E731
    corpus = record.config.get("data", {}).get("corpus", {})
    if record.kind == "train" and corpus.get("kind") == "built":
        built = (r for r in repo.records.values() if r.kind == "data")
        if not manifests(record.inputs) & {m for r in built for m in manifests(r.outputs)}:
            yield "was trained on a data set of which the ledger holds no record"


def trained_by(record: Record) -> dict:
    """The part of a run's configuration that decides its numbers. Two runs with the same part
    have the same losses.
    """
    parts = {
        section: {k: v for k, v in keys.items() if f"{section}.{k}" not in BESIDE_TRAINING}
        if isinstance(keys, dict)
        else keys
        for section, keys in translated(record.config).items()
    }
    return {section: part for section, part in parts.items() if part != {}}


@rule(
    "DUP-METRICS",
    title="Two runs do not share their losses",
    why="Identical curves under two configurations are one run counted twice.",
    hint="supersede the copy",
)
def dup_metrics(repo: Repo) -> Messages:
    seen: dict[float, Record] = {}
    for record in (r for r in repo.records.values() if r.kind == "train"):
        if (loss := number(record, "val_loss_nats")) is None:
            continue
        twin = seen.setdefault(loss, record)
        if trained_by(twin) != trained_by(record):
            message = f"has the same held-out loss as {twin.id} under another configuration"
            yield At(message, path=repo.record_file(record.id))
