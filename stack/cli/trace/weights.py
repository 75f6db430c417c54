"""`stack trace weights`: statistics of parameters, and of their change since an earlier
checkpoint.
"""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from stackproof.cli.load_model import load_model
from stackproof.cli.output import stdout, table
from stackproof.cli.trace.common import Model, Request, number, show_expectations, takes
from stackproof.spec.errors import UsageError

CLAIM = "These parameters have these statistics."
NOT_COVERED = ("the computation of the model",)
EXAMPLES = ("stack trace weights runs/pocket-1 --against runs/pocket-1/checkpoints/step-00000200",)
SHOWN = ("std", "rms", "absmax", "kurtosis", "frac_zero")


@takes("expect", "csv")
def weights(
    request: Request,
    model: Model,
    against: Annotated[
        str | None,
        typer.Option("--against", help="An earlier checkpoint: adds the change since then."),
    ] = None,
) -> None:
    """Statistics of every parameter; no forward runs."""
    from stackproof.trace import expect as predictions
    from stackproof.trace import weights as traced
    from stackproof.trace.profile import of_spreads

    expected = request.expected([*predictions.FIGURES, *predictions.OF_LAYERS])
    loaded = load_model(model)
    earlier = None if against is None else load_model(against, loaded)
    models = [m for m in (loaded, earlier) if m is not None]
    if modes := [m.title for m in models if m.mode is not None]:
        raise UsageError(
            "parameters have no compute mode", value=modes[0], next_step="leave out @MODE"
        )
    record = request.open("trace", CLAIM, NOT_COVERED, models, weights=True)
    found = traced(loaded.model, earlier and earlier.model)
    judged = of_spreads(sizes(found))
    rows = {(r.layer, r.slot): r for r in judged.rows}
    lines = [_line(w, rows.get((w.point.layer, w.point.slot))) for w in found]
    figures = {
        line["point"]: line["stats"] | {k: line[k] for k in predictions.OF_LAYERS} for line in lines
    }
    document = {
        "model": loaded.title,
        "against": earlier and earlier.title,
        **loaded.facts,
        "points": lines,
        "first_anomaly": judged.first_anomaly and asdict(judged.first_anomaly),
        "verdict": judged.verdict,
        "expectations": [asdict(j) for j in predictions.judge(expected, figures, list(figures))],
    }
    record.builder.metric("points", len(lines), "parameters")
    record.builder.metric(
        "anomalous_points",
        sum(r.anomalous for r in judged.rows),
        "parameters",
        n=len(lines),
        better="lower",
    )
    request.close(record, document, _show)


def sizes(found: Any) -> dict[tuple[int, str], float]:
    """rms of every matrix by layer and slot, without slots that are zero in all layers, a usual
    initial value.
    """
    matrices = {
        (w.point.layer, w.point.slot): w.stat.rms
        for w in found
        if w.point.layer is not None and w.stat.support.shape[2] > 1
    }
    nonzero = {slot for (_, slot), rms in matrices.items() if rms > 0}
    return {key: rms for key, rms in matrices.items() if key[1] in nonzero}


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
    columns = [
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
    stdout.print(
        table(
            document["model"] + (f", changed since {document['against']}" if moved else ""),
            columns,
            rows,
        )
    )
    show_expectations(document)
    stdout.print(document["verdict"], markup=False)
