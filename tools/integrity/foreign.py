"""What the rules about evidence ask of the record of a run that is not ours."""

from collections.abc import Iterator

from stackproof.spec.records import GateResult, Record
from tools.integrity.core import Repo

Found = Iterator[tuple[str, int, str]]


def admitted(record: Record, gate: GateResult) -> bool:
    """Whether such a run says openly that it did not ask a gate, and why;
    what it could not look at it does not cover.
    """
    return (
        record.kind == "foreign"
        and gate.verdict == "not_run"
        and f"{gate.id}: {gate.message}" in record.not_covered
    )


def gaps(repo: Repo) -> Found:
    """Step logs that lack a line for a step."""
    for record, lines in _finished(repo):
        steps, first, last = (
            [line["step"] for line in lines],
            record.config["first_step"],
            int(record.metric("steps")),
        )
        if not steps or steps != list(range(first + 1, last + 1)):
            said = (
                f"a line for each step from {first + 1} to {last} is wanted, and there are "
                f"{len(steps)}"
            )
            yield repo.record_file(record.id, "metrics.jsonl"), 0, said


def flattery(repo: Repo) -> Found:
    """Summaries that say something else than their log."""
    for record, lines in _finished(repo):
        stated = record.metrics.get("train_loss_nats")
        if lines and (stated is None or stated.value != lines[-1]["loss_nats"]):
            yield (
                repo.record_file(record.id),
                0,
                f"train_loss_nats is not the log's last loss, {lines[-1]['loss_nats']}",
            )


def _finished(repo: Repo) -> Iterator[tuple[Record, list[dict]]]:
    for record in repo.records.values():
        if record.kind == "foreign" and record.succeeded:
            yield record, list(repo.series(record.id, "metrics.jsonl"))
