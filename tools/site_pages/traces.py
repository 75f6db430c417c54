"""What was seen inside a model: heat maps over layers and slots of a trace or a comparison,
and over the steps of a run.
"""

from collections.abc import Iterable, Sequence

from stackproof.spec.records import Record
from tools.site_pages.chart import thin
from tools.site_pages.markup import code, esc, table
from tools.site_pages.world import World

POINTS, PLANTS, CHAIN, GRADIENTS = "points.jsonl", "plants.jsonl", "chain.jsonl", "gradients.jsonl"
WARM, HOT = 1.25, 2.5  # in size, as the terminal draws them
TIMES = (2.0, 10.0)  # beyond its bound an added error is warm, and ten times as much hot
HISTORY = (
    ("resid_out", "std", "Standard deviation of the stream behind each layer"),
    ("scores", "absmax", "Largest attention score of each layer"),
    ("entropy", "mean", "Mean entropy of attention, nats"),
)
MAX_STEPS = 10
FIGURES = ("mean", "std", "absmax", "kurtosis", "top_token_energy_frac")

Row = dict


def sections(world: World, record: Record) -> list[str]:
    """The blocks of a record's page about its points; empty if it has none."""
    match record.kind:
        case "train":
            return _history(world.series(record, POINTS, "step", "point", "layer", "stats"))
        case "trace":
            return _profile(
                world.series(record, POINTS, "point", "layer", "slot", "stats", "robust_z")
            )
        case "benchmark":
            return _plants(
                world.series(record, PLANTS, "plant", "planted", "compared", "bisected", "runs")
            )
        case "compare":
            rows = world.series(
                record, POINTS, "point", "layer", "slot", "rel_err", "added_err", "bound"
            )
            gradients = world.series(
                record, GRADIENTS, "point", "rel_err", "added_err", "bound", "read_by"
            )
            return [
                *_comparison(rows),
                *_gradients(gradients),
                *_chain(world.series(record, CHAIN, "id", "hypothesis", "verdict", "evidence")),
            ]
    return []


def _profile(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    odd = [r for r in rows if r.get("anomalous")]
    said = (
        f"First point that stands out: {code(odd[0]['point'])}, {esc(odd[0].get('operation', ''))}."
        if odd
        else "No point stands out."
    )
    cells = [
        (r["layer"], r["slot"], _plain(r["stats"]["std"]), _by_z(r["robust_z"]))
        for r in rows
        if r["layer"] is not None
    ]
    body = [
        [code(r["point"]), *(_plain(r["stats"][k]) for k in FIGURES), _plain(r["robust_z"])]
        for r in rows
    ]
    return [
        "## Points",
        f"{said} Each cell holds the standard deviation; its shade is how far that lies from the "
        f"median of its slot over the layers, in robust deviations, from {WARM} and from {HOT} on.",
        _map(cells),
        table(
            ["point", "mean", "std", "largest", "kurtosis", "energy of the top token", "robust z"],
            body,
        ),
    ]


def _comparison(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    first = next((r for r in rows if _beyond(r) > 1), None)
    said = (
        f"First point that adds more than its bound: {code(first['point'])}."
        if first
        else "No point adds more than its bound."
    )
    cells = [
        (r["layer"], r["slot"], _plain(r["rel_err"]), _shade(_beyond(r), TIMES))
        for r in rows
        if r["layer"] is not None
    ]
    body = [
        [
            code(r["point"]),
            *(_plain(r.get(k)) for k in ("rel_err", "cosine", "nmse", "added_err", "bound")),
        ]
        for r in rows
    ]
    return [
        "## Points",
        (
            f"{said} Each cell holds the relative error that arrives there; its shade is what the "
            "point adds itself to right inputs."
        ),
        _map(cells),
        table(["point", "error that arrives", "cosine", "NMSE", "error added", "bound"], body),
    ]


def _gradients(rows: list[Row]) -> list[str]:
    """Gradients at points and parameters, in the order of the backward."""
    if not rows:
        return []
    first = next((r for r in rows if _beyond(r) > 1), None)
    whose = (
        f", in the derivative of what reads it: {esc(first['read_by'])}"
        if first and first["read_by"]
        else ""
    )
    said = (
        f"First gradient that adds more than its bound: {code(first['point'])}{whose}."
        if first
        else "No derivative adds more than its bound."
    )
    body = [
        [code(r["point"]), *(_plain(r.get(k)) for k in ("rel_err", "cosine", "added_err", "bound"))]
        for r in rows
    ]
    return [
        "## Gradients",
        said,
        table(["gradient at", "error that arrives", "cosine", "error added", "bound"], body),
    ]


def _chain(links: list[Row]) -> list[str]:
    """Every hypothesis of a bisection, what became of it, and the numbers it rests on."""
    if not links:
        return []
    body = [
        [
            x["id"],
            esc(x["hypothesis"]),
            x["verdict"],
            ", ".join(f"{esc(k)} {_plain(v)}" for k, v in x["evidence"].items()),
        ]
        for x in links
    ]
    return ["## Narrowing", table(["link", "hypothesis", "verdict", "evidence"], body)]


def _beyond(row: Row) -> float:
    """How many times its bound a point adds."""
    added, bound = row["added_err"], row["bound"]
    return float(added) / float(bound) if added is not None and bound else 0.0


def _plants(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    body = [
        [
            esc(r["plant"]),
            code(r["planted"]),
            _named(r),
            "<br>".join(map(code, r["bisected"])),
            str(r["runs"]),
        ]
        for r in rows
    ]
    return [
        "## Planted and named",
        table(
            [
                "plant",
                "planted at",
                "first by comparison",
                "by bisection",
                "forwards of the bisection",
            ],
            body,
        ),
    ]


def _named(row: Row) -> str:
    return code(row["compared"]) + ("" if row["compared"] == row["planted"] else " **another**")


def _history(lines: list[Row]) -> list[str]:
    if not lines:
        return []
    shown = thin(list(dict.fromkeys(line["step"] for line in lines)), MAX_STEPS)
    blocks = ["## Points over the run"]
    for slot, figure, title in HISTORY:
        cells = [
            (x["layer"], f"step {x['step']}", _plain(x["stats"][figure]), "")
            for x in lines
            if x["step"] in shown and x["point"] == f"layers.{x['layer']}.{slot}"
        ]
        blocks += [f"{title}:", _map(cells)] if cells else []
    spread = {(x["point"], x["step"]): x["stats"]["std"] for x in lines}
    rows = [
        [code(p), *(_plain(spread.get((p, step))) for step in shown)]
        for p in dict.fromkeys(x["point"] for x in lines)
    ]
    return [
        *blocks,
        "Standard deviation of every point:",
        table(["point", *(f"step {step}" for step in shown)], rows),
    ]


def _map(cells: Sequence[tuple[int, str, str, str]]) -> str:
    """Layers down, columns across in the order they come; each cell with its class."""
    columns = list(dict.fromkeys(column for _, column, _, _ in cells))
    held = {(layer, column): (text, shade) for layer, column, text, shade in cells}
    rows = [
        [str(layer), *(_cell(*held.get((layer, c), ("", ""))) for c in columns)]
        for layer in sorted({layer for layer, *_ in cells})
    ]
    return table(["layer", *map(esc, columns)], rows)


def _cell(text: str, shade: str) -> str:
    return f'<span class="heat {shade}">{text}</span>' if shade else text


def _by_z(z: float | None) -> str:
    return "" if z is None else _shade(abs(float(z)), (WARM, HOT))


def _shade(size: float, limits: Iterable[float]) -> str:
    warm, hot = limits
    return "heat--hot" if size >= hot else "heat--warm" if size >= warm else ""


def _plain(value: float | str | None) -> str:
    """Four digits; numbers that are none come as text."""
    return (
        "–" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else esc(value)
    )
