"""Points inside a model: heat maps over layers and slots of a trace or a comparison, and over the
steps of a run.
"""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from stackproof.spec.records import Record
from tools.site_pages.chart import thin
from tools.site_pages.markup import code, esc, short, table
from tools.site_pages.render import render
from tools.site_pages.world import World

POINTS, PLANTS, CHAIN, GRADIENTS = "points.jsonl", "plants.jsonl", "chain.jsonl", "gradients.jsonl"
WARM, HOT = 1.25, 2.5  # robust deviations, as the terminal draws them
TIMES = (2.0, 10.0)  # multiples of its bound from which an added error is warm, and hot
HISTORY = (
    ("resid_out", "std", "Standard deviation of the stream behind each layer"),
    ("scores", "absmax", "Largest attention score of each layer"),
    ("entropy", "mean", "Mean entropy of attention, nats"),
)
MAX_STEPS = 10

Row = dict
Cell = tuple[int, str, Markup]  # layer, column, text


def sections(world: World, record: Record) -> Markup:
    """The sections of a record's page about points; empty if it has none."""
    read = lambda name, *keys: world.series(record, name, *keys)  # noqa: E731
    match record.kind:
        case "train":
            return _history(read(POINTS, "step", "point", "layer", "stats"))
        case "trace":
            return _profile(read(POINTS, "point", "layer", "slot", "stats", "robust_z"))
        case "benchmark":
            rows = read(PLANTS, "plant", "planted", "compared", "bisected", "runs")
            return render("trace_plants.md.j2", rows=rows)
        case "compare":
            added = ("rel_err", "added_err", "bound")
            return _comparison(
                read(POINTS, "point", "layer", "slot", *added),
                read(GRADIENTS, "point", "read_by", *added),
                read(CHAIN, "id", "hypothesis", "verdict", "evidence"),
            )
    return Markup()


def _profile(rows: list[Row]) -> Markup:
    shaded = ((r, _shade(abs(float(r["robust_z"] or 0)), (WARM, HOT))) for r in rows)
    cells = [(r["layer"], r["slot"], _cell(r["stats"]["std"], shade)) for r, shade in shaded]
    first = next((r for r in rows if r.get("anomalous")), None)
    shown = {"first": first, "map": _map(cells), "warm": WARM, "hot": HOT}
    return render("trace_profile.md.j2", rows=rows, **shown)


def _comparison(rows: list[Row], gradients: list[Row], chain: list[Row]) -> Markup:
    cells = [(r["layer"], r["slot"], _cell(r["rel_err"], _shade(_beyond(r), TIMES))) for r in rows]
    return render(
        "trace_comparison.md.j2",
        rows=rows,
        first=next((r for r in rows if _beyond(r) > 1), None),
        map=_map(cells),
        gradients=gradients,
        first_gradient=next((r for r in gradients if _beyond(r) > 1), None),
        chain=chain,
    )


def _beyond(row: Row) -> float:
    """The error that a point adds, as a multiple of its bound."""
    added, bound = row["added_err"], row["bound"]
    return float(added) / float(bound) if added is not None and bound else 0.0


def _history(lines: list[Row]) -> Markup:
    if not lines:
        return Markup()
    shown = thin(list(dict.fromkeys(line["step"] for line in lines)), MAX_STEPS)
    held = {(x["point"], x["step"]): x for x in lines if x["step"] in shown}
    maps = []
    for slot, figure, title in HISTORY:
        cells = [
            (x["layer"], f"step {step}", _cell(x["stats"][figure]))
            for (point, step), x in held.items()
            if point == f"layers.{x['layer']}.{slot}"
        ]
        maps += [(title, _map(cells))] if cells else []
    spread = {key: x["stats"]["std"] for key, x in held.items()}
    points = dict.fromkeys(x["point"] for x in lines)
    rows = [[code(p), *(short(spread.get((p, step))) for step in shown)] for p in points]
    head = ["point", *(f"step {step}" for step in shown)]
    return render("trace_history.md.j2", maps=maps, points=table(head, rows))


def _map(cells: Sequence[Cell]) -> Markup:
    """Layers down, columns across in the order they come."""
    held = {(layer, column): text for layer, column, text in cells if layer is not None}
    columns = list(dict.fromkeys(column for _, column in held))
    layers = sorted({layer for layer, _ in held})
    rows = [[layer, *(held.get((layer, c), "") for c in columns)] for layer in layers]
    return table(["layer", *map(esc, columns)], rows)


def _cell(value: float | str | None, shade: str = "") -> Markup:
    text = short(value)
    return Markup(f'<span class="heat heat--{shade}">{text}</span>') if shade else text


def _shade(size: float, limits: Iterable[float]) -> str:
    warm, hot = limits
    return "hot" if size >= hot else "warm" if size >= warm else ""
