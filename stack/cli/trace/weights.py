"""`stack trace weights`: statistics of parameters, and of their change since an earlier
checkpoint.
"""

from dataclasses import asdict
from typing import Annotated, Any

from typer import Option

from stackproof.cli.load_model import load_model
from stackproof.cli.output import print_line, print_table
from stackproof.cli.recording import Claim
from stackproof.cli.trace.common import (
    Model,
    Request,
    judged,
    number,
    show_expectations,
    statistics_of,
    takes,
)
from stackproof.spec.errors import UsageError

CLAIM = Claim("trace", "These parameters have these statistics.", ("the computation of the model",))
EXAMPLES = ("stack trace weights runs/pocket-1 --against runs/pocket-1/checkpoints/step-00000200",)
SHOWN = ("std", "rms", "absmax", "kurtosis", "frac_zero")


@takes("expect", "csv")
def weights(
    request: Request,
    model: Model,
    against: Annotated[
        str | None, Option(help="An earlier checkpoint: adds the change since then.")
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
    record = request.open(CLAIM, models, weights=True)
    found = traced(loaded.model, earlier and earlier.model)
    profiled = of_spreads(sizes(found))
    rows = {(r.layer, r.slot): r for r in profiled.rows}
    lines = [_line(w, rows.get((w.point.layer, w.point.slot))) for w in found]
    document = {
        "model": loaded.title,
        "against": earlier and earlier.title,
        **loaded.facts,
        "points": lines,
        "first_anomaly": profiled.first_anomaly and asdict(profiled.first_anomaly),
        "verdict": profiled.verdict,
        "expectations": judged(expected, lines),
    }
    metric, n, anomalous = (
        record.builder.metric,
        len(lines),
        sum(r.anomalous for r in profiled.rows),
    )
    metric("points", n, "parameters")
    metric("anomalous_points", anomalous, "parameters", n=n, better="lower")
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
    line = statistics_of(w, row) | {"operation": "parameter"}
    if w.update is not None:
        line |= {"update": w.update.as_dict(), "update_ratio": w.update_ratio}
    return line


def _show(document: dict[str, Any]) -> None:
    moved = document["against"] is not None
    change = ["rms of change", "÷ rms before"] if moved else []
    columns = ["parameter", *SHOWN, *change, "÷ layer before", "robust z"]
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
    print_table(title, columns, rows)
    show_expectations(document)
    print_line(document["verdict"])
