"""What was found to be wrong, why, and what shows it: `evidence/findings.toml`.
A cause that was gone around blocks its gates.
"""

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stackproof.spec.gates import Frozen
from stackproof.spec.tables import read_tables

FILE = "findings.toml"
CITED = r"^[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{8}(#E\d+)?$"


class RuledOut(Frozen):
    """A suspicion that was eliminated: by a link of a record's narrowing chain (`evidence` with
    `#E<n>`), or by a figure of a record.

    `hypothesis` is then the link's own; with a record, `metric` and `value` are
    the figure that it holds.
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
                "a link of a chain says itself what it eliminated; metric and value are those of "
                "a record"
            )
        if "#" not in self.evidence and not all(given):
            raise ValueError(
                "a record eliminates nothing by being there; name its metric and value, or a link "
                "of its chain (#E<n>)"
            )
        return self


class Finding(Frozen):
    """One cause, from what was seen to what shows it gone.

    `negative` is a record of the failure and `positive` one without it; `metric` is the figure that
    is better in that one. `better` says which way, where the records do not state it. `falsifier`
    is a test as PATH::NAME, or a plant. With `route_around` the cause still stands: then there is
    no fix, and `gates` are not discharged.
    """

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    date: dt.date
    symptom: str = Field(min_length=1)
    cause: str = Field(min_length=1)
    mechanism: str = Field(min_length=1)
    gates: tuple[str, ...] = Field(min_length=1)
    metric: str
    better: Literal["lower", "higher"] | None = None
    negative: str = Field(pattern=CITED)
    positive: str | None = Field(None, pattern=CITED)
    fix: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    falsifier: str
    ruled_out: tuple[RuledOut, ...] = ()
    route_around: bool = False

    @model_validator(mode="after")
    def _fixed_or_gone_around(self) -> "Finding":
        lacking = [name for name in ("fix", "positive") if getattr(self, name) is None]
        if lacking and not self.route_around:
            raise ValueError(
                f"{lacking[0]} is lacking; a cause that was only gone around says route_around = "
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


def gone_around(findings: Sequence[Finding]) -> dict[str, str]:
    """Gates whose cause of failure still stands, with the finding that says so."""
    return {gate: f.id for f in findings if f.route_around for gate in f.gates}
