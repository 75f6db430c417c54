"""Rules about what records have to do with each other: parents, the data of a run,
and a run that was counted twice.
"""

from stackproof.spec.records import BESIDE_TRAINING, Record
from tools.integrity.core import Repo, rule
from tools.integrity.evidence_rules import number
from tools.integrity.foreign import Found


@rule(
    "PARENTS",
    title="Parents of records are in the ledger",
    why="A chain of runs is only as good as its first.",
    hint="add the parent first",
)
def parents(repo: Repo) -> Found:
    known = {e.record for e in repo.entries}
    for record in repo.records.values():
        for parent in record.parents:
            if parent not in known:
                yield repo.record_file(record.id), 0, f"its parent {parent} is not in the ledger"


@rule(
    "DATA-RECORD",
    title="A run on a built data set has that data set's record",
    why=(
        "Whoever asks what a model was fed must find the sources, their licences and what was "
        "dropped."
    ),
    hint="stack evidence add the folder that stack data build made",
)
def data_record(repo: Repo) -> Found:
    recorded = {
        o.sha256
        for r in repo.records.values()
        if r.kind == "data"
        for o in r.outputs
        if o.path == "manifest.json"
    }
    for record in repo.records.values():
        built = (
            record.kind == "train"
            and record.config.get("data", {}).get("corpus", {}).get("kind") == "built"
        )
        if built and not any(
            i.path == "manifest.json" and i.sha256 in recorded for i in record.inputs
        ):
            yield (
                repo.record_file(record.id),
                0,
                "was trained on a data set of which the ledger holds no record",
            )


def trained_by(record: Record) -> dict:
    """The part of a run's configuration that decides what is computed: two runs that share it are
    one, and rightly end alike.
    """
    parts = {
        section: {k: v for k, v in keys.items() if f"{section}.{k}" not in BESIDE_TRAINING}
        if isinstance(keys, dict)
        else keys
        for section, keys in record.config.items()
    }
    return {section: part for section, part in parts.items() if part != {}}


@rule(
    "DUP-METRICS",
    title="Two runs do not share their losses",
    why="Identical curves under two configurations are one run counted twice.",
    hint="supersede the copy",
)
def dup_metrics(repo: Repo) -> Found:
    seen: dict[float, Record] = {}
    for record in repo.records.values():
        value = number(record, "val_loss_nats") if record.kind == "train" else None
        twin = seen.get(value) if value is not None else None
        if twin and trained_by(twin) != trained_by(record):
            yield (
                repo.record_file(record.id),
                0,
                f"has the same held-out loss as {twin.id} under another configuration",
            )
        if value is not None:
            seen.setdefault(value, record)
