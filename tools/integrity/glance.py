"""What rules about several records need of each: a glance is kept, the record is not."""

from collections.abc import Iterable
from dataclasses import dataclass

from stackproof.spec.records import BESIDE_TRAINING, Artefact, Record
from stackproof.spec.renamed_keys import translated


@dataclass(frozen=True)
class Glance:
    """What rules about several records need of each."""

    kind: str
    wall_s: float
    parents: tuple[str, ...]
    succeeded: bool
    dirty: bool
    claim: str
    started_at: str
    red: frozenset[str]  # gates, and plants that were missed
    judged: frozenset[str]  # gates, and plants that were tried
    series: dict[str, str]
    val_loss_nats: float | None
    is_on_built_data: bool
    manifests_in: frozenset[str]
    manifests_out: frozenset[str]


def glance_at(record: Record) -> Glance:
    data = record.config.get("data", {})
    corpus = data.get("corpus", {}) if isinstance(data, dict) else {}
    metric = record.metrics.get("val_loss_nats") if record.kind == "train" else None
    loss = None if metric is None else float(metric.value)
    return Glance(
        kind=record.kind,
        wall_s=record.wall_s,
        parents=record.parents,
        succeeded=record.succeeded,
        dirty=record.code.dirty,
        claim=record.claim,
        started_at=record.started_at,
        red=frozenset(
            [g.id for g in record.gates if g.verdict == "fail"]
            + [k.plant for k in record.kills if k.outcome == "missed" or k.control == "fail"]
        ),
        judged=frozenset(
            [g.id for g in record.gates if g.verdict != "not_run"]
            + [k.plant for k in record.kills if k.outcome in ("killed", "missed")]
        ),
        series={s.path: s.sha256 for s in record.series},
        val_loss_nats=loss,
        is_on_built_data=record.kind == "train" and corpus.get("kind") == "built",
        manifests_in=_manifests(record.inputs),
        manifests_out=_manifests(record.outputs),
    )


def _manifests(files: Iterable[Artefact]) -> frozenset[str]:
    return frozenset(a.sha256 for a in files if a.path == "manifest.json")


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
