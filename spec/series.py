"""The lines of the series beside a record, as models: what readers of them may rely on."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from stackproof.spec import mutants
from stackproof.spec.canonical import AS_TEXT, MAX_SAFE_INTEGER, parse_lines
from stackproof.spec.records import NumberAsText
from stackproof.spec.tables import validated

Count = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Number = float | NumberAsText  # a float of pydantic takes whole numbers up to the largest float


def _as_float(value: Any) -> Any:
    is_text = isinstance(value, str) and re.fullmatch(AS_TEXT, value)
    return float(value) if is_text else value


Figure = Annotated[float, BeforeValidator(_as_float)]  # a Number, as the float that it was


class Line(BaseModel):
    """A line of any series: an object. It may hold more keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Step(Line):
    step: Count
    loss_nats: Number | None = None
    val_loss_nats: Number | None = None
    val_stderr_nats: Number | None = None
    ema_loss_nats: Number | None = None
    grad_norm: Number | None = None
    tokens_seen: Count | None = None


class Sample(Line):
    step: Count
    text: str
    score: Number
    prompt: str = ""
    parts: dict[str, Number] | None = None


class GateLine(Line):
    gate: str
    verdict: str
    step: Count | None = None
    message: str = ""


class Event(Line):
    event: str
    step: Count | None = None


class Answer(Line):
    step: Count
    domain: str
    prompt: str
    text: str
    passed: bool
    grade: Annotated[float, Field(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)] | None = None


class Dropped(Line):
    documents: Count


class Tokens(Line):
    train: Count
    validation: Count


class Source(Line):
    name: str
    license: str
    weight: Number
    cap: Number
    floor: Number
    documents_in: Count
    documents_out: Count
    dropped: dict[str, Dropped]
    tokens: Tokens


class Draw(Line):
    step: Count
    event: str
    rows: dict[str, Count] = {}
    focus: str | None = None


class RankFacts(Line):
    rank: Count
    replicate: Count
    shard: Count
    tensor: Count
    device: str
    device_name: str | None = None


class OverRanks(Line):
    ranks: Annotated[tuple[Number, ...], Field(strict=False)]
    min: Number
    median: Number
    max: Number


class RankLine(Line):
    step: Count
    event: Literal["mesh", "times"]
    mesh: dict[str, Count] = {}
    ranks: Annotated[tuple[RankFacts, ...], Field(strict=False)] = ()
    n_steps: Count = 0
    step_s: OverRanks | None = None
    own_s: OverRanks | None = None
    communication_frac: OverRanks | None = None
    exposed_frac: OverRanks | None = None
    peak_memory_bytes: OverRanks | None = None


class Red(Line):
    seconds: float


class MatrixRow(Line):
    plant: str
    gate: str
    red: dict[str, Red]
    raised: dict[str, str]
    asked: int
    seconds: float


class MutantEnding(Line):
    kind: str
    moment: str = ""
    error: str = ""
    exit_code: int = 0


class MutantRow(Line):
    outcome: Literal[mutants.OUTCOMES]
    effect: Literal["result", "statement", ""]
    package: str
    scenario: str
    operator: str
    target: str
    line: Count
    diff: str
    ending: MutantEnding


KINDS: Mapping[str, type[Line]] = {
    "metrics.jsonl": Step,
    "samples.jsonl": Sample,
    "gates.jsonl": GateLine,
    "events.jsonl": Event,
    "audits.jsonl": Answer,
    "sources.jsonl": Source,
    "curriculum.jsonl": Draw,
    "ranks.jsonl": RankLine,
    "matrix.jsonl": MatrixRow,
    mutants.SERIES: MutantRow,
}


def parse_series(data: bytes, name: str, *, origin: str) -> list[dict[str, Any]]:
    """The lines of a series as they stand there.

    Raises IntegrityError naming `origin`, line and field for a line that is not an object or has a
    key of another type than readers rely on.
    """
    kind, lines = KINDS.get(name, Line), parse_lines(data, origin=origin)
    try:
        _all_of(kind).validate_python(lines)
    except ValidationError:
        numbers = (n for n, raw in enumerate(data.split(b"\n"), start=1) if raw.strip())
        for number, line in zip(numbers, lines):
            validated(kind, line, origin=f"{origin}:{number}")
    return lines


@cache
def _all_of(kind: type[Line]) -> TypeAdapter:
    return TypeAdapter(list[kind])
