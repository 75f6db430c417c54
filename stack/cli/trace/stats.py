"""`stack trace stats`: statistics and anomalies of every point of a forward."""

import math
from dataclasses import asdict
from typing import Any

from stackproof.cli.load_model import load_model
from stackproof.cli.output import print_line, print_table
from stackproof.cli.recording import Claim
from stackproof.cli.trace.common import (
    DEFAULT_PROMPT,
    Model,
    Request,
    judged,
    number,
    show_expectations,
    show_heat_map,
    statistics_of,
    takes,
)
from stackproof.spec.errors import UsageError

CLAIM = Claim(
    "trace",
    "Given these tokens, this model computes values with these statistics at these points.",
    ("other tokens", "points listed as unseen"),
)
EXAMPLES = (
    "stack trace stats runs/pocket-1",
    "stack trace stats hf/llama --prompt 'What is 2+2?' --expect 'layers.3.ffn.swiglu.std < 0.1'",
)
SHOWN = ("std", "rms", "absmax", "kurtosis", "top_token_energy_frac", "frac_zero")


@takes("prompt", "input_ids", "points", "tokens", "backward", "expect", "csv")
def stats(request: Request, model: Model) -> None:
    """Statistics and anomalies of every point of one forward."""
    import torch

    from stackproof.contracts.subject import Subject
    from stackproof.subject.commands import Traced
    from stackproof.trace import expect as predictions
    from stackproof.trace import trace, untraced, variant
    from stackproof.trace.profile import profile

    if request.backward and request.tokens == "last":
        raise UsageError(
            "the last token has no next-token loss, so no gradient",
            value="--tokens last --backward",
            allowed="one of them",
        )
    expected = request.expected([*predictions.FIGURES, *predictions.OF_LAYERS])
    loaded = load_model(model)
    ids, one = request.ids(loaded), variant(loaded.model, loaded.mode)
    record = request.open(CLAIM, [loaded], ids=ids, backward=request.backward, command="stats")
    options = {"backward": request.backward, "tokens": request.tokens}
    with one.around():
        names = request.points or one.names
        found = trace(one.model, torch.tensor([ids]), names, **options, where=one.where)
        if loaded.opened is not None and request.tokens == "all":
            points = {t.point.name: (t.stat.rms, t.stat.absmax) for t in found.points}
            plain = lambda ids_BT: untraced(one.model, ids_BT, request.backward)  # noqa: E731
            shown = Traced(
                model=one.model,
                input_ids=ids,
                declared_ids=declared_ids(request, loaded.opened.tokenizer),
                traced_logits=found.logits,
                points=points,
                run=plain,
            )
            record.judge(Subject(traced=shown))
        else:
            record.unasked += ("model.traced",)
    profiled = profile(found)
    rows = {r.point: r for r in profiled.rows}
    lines = [_line(t, rows.get(t.point.name)) for t in found.points]
    document = {
        "model": loaded.title,
        **loaded.facts,
        "input_ids": ids,
        "points": lines,
        "first_anomaly": profiled.first_anomaly and asdict(profiled.first_anomaly),
        "gains": [asdict(g) for g in profiled.gains],
        "verdict": profiled.verdict,
        "unseen": list(found.unseen),
        "loss_nats": found.loss_nats,
        "expectations": judged(expected, lines, found.unseen),
    }
    metric, n = record.builder.metric, len(lines)
    anomalous = sum(r.anomalous and not r.massive for r in profiled.rows)
    metric("points", n, "points")
    metric("anomalous_points", anomalous, "points", n=n, better="lower")
    metric("massive_points", sum(bool(r.massive) for r in profiled.rows), "points", n=n)
    request.close(record, document, lambda document: _show(document, profiled.rows))


def declared_ids(request: Request, tokenizer: Any) -> list[int]:
    """The ids that the options give."""
    if request.input_ids is not None:
        return [int(number) for number in request.input_ids.split(",")]
    text = DEFAULT_PROMPT if request.prompt is None else request.prompt
    return [tokenizer.eos_id, *tokenizer.encode(text).ids]


def _line(t: Any, row: Any) -> dict[str, Any]:
    """One point of the document."""
    line = statistics_of(t, row, "massive")
    return line if t.grad is None else line | {"grad": t.grad.as_dict()}


def _show(document: dict[str, Any], profiled: Any) -> None:
    """Table, heat map, predictions and verdict."""
    from stackproof.trace.profile import RATIO, ROBUST_Z

    lines, loss = document["points"], document["loss_nats"]
    mark = lambda line: " massive" if line["massive"] else " ◀" if line["anomalous"] else ""  # noqa: E731
    rows = [
        [
            line["point"] + mark(line),
            *(f"{line['stats'][f]:.4g}" for f in SHOWN),
            ":".join(map(str, line["stats"]["argmax"] or ())),
            number(line["ratio_to_previous"]),
            number(line["robust_z"]),
        ]
        for line in lines
    ]
    columns = ["point", *SHOWN, "peak token:channel", "÷ layer before", "robust z"]
    if loss is not None:
        columns += ["gradient rms", "gradient absmax"]
        for row, line in zip(rows, lines):
            row += [f"{line['grad'][k]:.4g}" if line.get("grad") else "" for k in ("rms", "absmax")]
    title = f"{document['model']}, {len(document['input_ids'])} tokens"
    title += "" if loss is None else f", loss {loss:.4f} nats"
    print_table(title, columns, rows)
    if any(r.robust_z is not None for r in profiled):
        cells = {
            (r.layer, r.slot): r.robust_z if math.isfinite(r.std) else math.nan for r in profiled
        }
        show_heat_map(cells, "robust z of std", ROBUST_Z)
    else:
        cells = {(r.layer, r.slot): _log_ratio(r.ratio_to_previous) for r in profiled}
        show_heat_map(cells, "std over that of the layer before, powers of two", math.log2(RATIO))
    show_expectations(document)
    print_line(document["verdict"])


def _log_ratio(ratio: float | None) -> float | None:
    return math.log2(ratio) if ratio is not None and ratio > 0 and math.isfinite(ratio) else None
