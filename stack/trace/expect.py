"""Predictions stated before a trace and judged after it: `layers.3.ffn.swiglu.std < 0.1`."""

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stackproof.spec.errors import UsageError

FIGURES = (
    "n mean std rms absmax min max kurtosis frac_zero frac_nonfinite top_token_energy_frac "
    "peak_energy_frac"
).split()
OF_LAYERS = ["ratio_to_previous", "robust_z"]
OF_SIDES = ["rel_err", "cosine", "nmse", "added_err"]
SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FORM = re.compile(
    r"\s*(?P<point>[A-Za-z_][\w.]*)\.(?P<figure>\w+)\s*(?P<sign><=|>=|<|>)"
    r"\s*(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*"
)


@dataclass(frozen=True)
class Expectation:
    """An inequality between a statistic of a point and a number."""

    text: str
    point: str
    figure: str
    sign: str
    number: float


@dataclass(frozen=True)
class Judged:
    """A judged prediction; `not_run` if the point did not run or has no such statistic."""

    text: str
    verdict: Literal["confirmed", "refuted", "not_run"]
    found: float | None


def parse(text: str, figures: Iterable[str]) -> Expectation:
    """Parse one prediction. Raises UsageError for another form or an unknown statistic."""
    found, known = FORM.fullmatch(text), list(figures)
    if found is None or found["figure"] not in known:
        raise UsageError(
            "not a prediction",
            value=text,
            allowed=f"POINT.FIGURE {' | '.join(SIGNS)} NUMBER, with a figure of {', '.join(known)}",
            next_step="--expect 'layers.3.ffn.swiglu.std < 0.1'",
        )
    return Expectation(
        text.strip(), found["point"], found["figure"], found["sign"], float(found["number"])
    )


def judge(
    expected: Iterable[Expectation],
    figures: Mapping[str, Mapping[str, float | None]],
    points: Iterable[str],
) -> list[Judged]:
    """Judge predictions by the statistics of points; NaN refutes.
    Raises UsageError for an unknown point.
    """
    known, judged = set(points), []
    for one in expected:
        if one.point not in known:
            raise UsageError(
                f"there is no point {one.point} among those traced",
                value=one.text,
                allowed=", ".join(sorted(known))[:400],
            )
        value = figures.get(one.point, {}).get(one.figure)
        if value is None:
            judged.append(Judged(one.text, "not_run", None))
        else:
            holds = not math.isnan(value) and SIGNS[one.sign](value, one.number)
            judged.append(Judged(one.text, "confirmed" if holds else "refuted", value))
    return judged
