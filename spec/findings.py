"""Findings: causes of failures, with their evidence, from `evidence/findings.toml`.
A finding with `route_around` keeps its gates from being discharged.
"""

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stackproof.spec.gates import Frozen
from stackproof.spec.records import GateId, Name
from stackproof.spec.tables import read_tables

FILE = "findings.toml"
CITED = r"^[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{8}(#E\d+)?$"


class RuledOut(Frozen):
    """An eliminated hypothesis. Its evidence is a link of a record's narrowing chain (`#E<n>`) or a
    metric of a record.

    With a link, `hypothesis` is that of the link. With a record, `metric` and `value` are required.
    """

    hypothesis: str = Field(min_length=1)
    evidence: str = Field(pattern=CITED)
    metric: str | None = None
    value: float | None = None

    @model_validator(mode="after")
    def _link_or_figure(self) -> "RuledOut":
        given = [self.metric is not None, self.value is not None]
        if "#" in self.evidence and any(given):
            raise ValueError(
                "a link of a chain states what it eliminated; metric and value belong to a record"
            )
        if "#" not in self.evidence and not all(given):
            raise ValueError(
                "a record eliminates nothing by being there; name its metric and value, or a link "
                "of its chain (#E<n>)"
            )
        return self


class Finding(Frozen):
    """One cause: symptom, mechanism, fix and evidence.

    `negative` is a record with the failure, `positive` one without it; `metric` is better in
    `positive`. `better` is the direction, required if the records do not state it. `falsifier` is a
    test (PATH::NAME) or a plant. With `route_around` the cause persists: there is no fix, and
    `gates` are not discharged.
    """

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    date: dt.date
    symptom: str = Field(min_length=1)
    cause: str = Field(min_length=1)
    mechanism: str = Field(min_length=1)
    gates: tuple[GateId, ...] = Field(min_length=1)
    metric: Name
    better: Literal["lower", "higher"] | None = None
    negative: str = Field(pattern=CITED)
    positive: str | None = Field(None, pattern=CITED)
    fix: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    falsifier: str
    ruled_out: tuple[RuledOut, ...] = ()
    route_around: bool = False

    @model_validator(mode="after")
    def _fixed_or_bypassed(self) -> "Finding":
        lacking = [name for name in ("fix", "positive") if getattr(self, name) is None]
        if lacking and not self.route_around:
            raise ValueError(
                f"{lacking[0]} is missing; for a cause that is bypassed and not fixed, set "
                "route_around = "
                "true"
            )
        if self.fix is not None and self.route_around:
            raise ValueError("fix and route_around exclude each other")
        return self


def read_findings(path: Path) -> list[Finding]:
    """All findings, in file order. A missing file holds none.
    Raises IntegrityError naming entry and field.
    """
    return read_tables(path, "finding", Finding)


def bypassed(findings: Sequence[Finding]) -> dict[str, str]:
    """Gates with an unfixed cause of failure: gate id to finding id."""
    return {gate: f.id for f in findings if f.route_around for gate in f.gates}
