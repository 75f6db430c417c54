"""`stack trace MODEL --weights`: the parameters of a model,
and what they have changed by since an earlier checkpoint.
"""

from dataclasses import asdict
from typing import Any

from stackproof.cli.output import emit, stdout, table
from stackproof.cli.trace import builder_of, number, write
from stackproof.spec.errors import UsageError

CLAIM = "These parameters have these statistics."
NOT_COVERED = ("what the model computes with them",)
SHOWN = ("std", "rms", "absmax", "kurtosis", "frac_zero")


def of_weights(text: str, against: str | None, asked: Any) -> None:
    """Trace the parameters of MODEL, with `against` as the earlier one."""
    from stackproof.cli.subjects import open_subject
    from stackproof.trace import expect
    from stackproof.trace.profile import of_spreads
    from stackproof.trace.weights import weights

    expected = [expect.parse(e, [*expect.FIGURES, *expect.OF_LAYERS]) for e in asked.expect]
    subject = open_subject(text)
    earlier = None if against is None else open_subject(against, subject)
    if ways := [s.title for s in (subject, earlier) if s is not None and s.way is not None]:
        raise UsageError(
            "nothing is computed here, so there is no way to compute it",
            value=ways[0],
            next_step="leave out @WAY",
        )
    builder = builder_of(
        "trace",
        CLAIM,
        NOT_COVERED,
        [subject] if earlier is None else [subject, earlier],
        asked,
        weights=True,
    )
    found = weights(subject.model, None if earlier is None else earlier.model)
    judged = of_spreads(sizes(found))
    rows = {(r.layer, r.slot): r for r in judged.rows}
    lines = [_line(w, rows.get((w.point.layer, w.point.slot))) for w in found]
    figures = {
        line["point"]: line["stats"] | {k: line[k] for k in expect.OF_LAYERS} for line in lines
    }
    document = {
        "model": subject.title,
        "against": None if earlier is None else earlier.title,
        **subject.facts,
        "points": lines,
        "first_anomaly": None if judged.first_anomaly is None else asdict(judged.first_anomaly),
        "verdict": judged.verdict,
        "expectations": [asdict(j) for j in expect.judge(expected, figures, list(figures))],
    }
    builder.metric("points", len(lines), "parameters")
    builder.metric(
        "anomalous_points",
        sum(r.anomalous for r in judged.rows),
        "parameters",
        n=len(lines),
        better="lower",
    )
    write(builder, document, asked)
    if not emit(document, asked.json):
        _show(document)


def sizes(found: Any) -> dict[tuple[int, str], float]:
    """rms of every matrix by layer and slot.
    Vectors begin at all ones or zeros, and so may a matrix in all layers: that is not odd.
    """
    matrices = {
        (w.point.layer, w.point.slot): w.stat.rms
        for w in found
        if w.point.layer is not None and w.stat.support.shape[2] > 1
    }
    alive = {slot for (_, slot), rms in matrices.items() if rms > 0}
    return {key: rms for key, rms in matrices.items() if key[1] in alive}


def _line(w: Any, row: Any) -> dict[str, Any]:
    judged = {
        k: getattr(row, k, None)
        for k in ("ratio_to_previous", "robust_z", "baseline", "anomalous", "cascade")
    }
    line = {
        "point": w.point.name,
        "layer": w.point.layer,
        "slot": w.point.slot,
        "operation": "parameter",
    }
    line |= {"stats": w.stat.as_dict(), "support": asdict(w.stat.support), **judged}
    return (
        line
        if w.update is None
        else line | {"update": w.update.as_dict(), "update_ratio": w.update_ratio}
    )


def _show(document: dict[str, Any]) -> None:
    moved = document["against"] is not None
    head = [
        "parameter",
        *SHOWN,
        *(["rms of change", "÷ rms before"] if moved else []),
        "÷ layer before",
        "robust z",
    ]
    rows = [
        [
            line["point"],
            *(f"{line['stats'][k]:.4g}" for k in SHOWN),
            *([number(line["update"]["rms"]), number(line["update_ratio"])] if moved else []),
            number(line["ratio_to_previous"]),
            number(line["robust_z"]),
        ]
        for line in document["points"]
    ]
    title = document["model"] + (f", changed since {document['against']}" if moved else "")
    stdout.print(table(title, head, rows))
    stdout.print(document["verdict"], markup=False)
    for judged in document["expectations"]:
        stdout.print(f"{judged['verdict']}: {judged['text']}", markup=False)
    stdout.print(
        f"record {document['run_dir']}/metadata.json  ({document['record']})", markup=False
    )
