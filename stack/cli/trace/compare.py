"""`stack trace compare`: where two computations differ, and which operation adds the first
error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Annotated, Any

from typer import Option

from stackproof.cli.load_model import SELF, load_model
from stackproof.cli.output import listed, print_line, print_table
from stackproof.cli.recording import Claim
from stackproof.cli.trace.common import (
    Model,
    Request,
    checked,
    number,
    place_of,
    show_expectations,
    show_heat_map,
    takes,
)
from stackproof.spec.errors import UsageError

CLAIM = Claim(
    "compare",
    "Given these tokens, the two computations differ by these errors at these points, and the "
    "first operation to err is the one named.",
    ("other tokens", "points of one side only", "errors below the bound of rounding"),
)
EXAMPLES = (
    "stack trace compare runs/pocket-1 --against hf/pocket",
    "stack trace compare runs/pocket-1 --against self@bfloat16 --swap layers.3.ffn=float32",
)
ERRORS = {
    "rel_err": "error that arrives",
    "cosine": "cosine",
    "nmse": "NMSE",
    "added_err": "error added",
    "bound": "bound",
}
Against = Annotated[
    str | None,
    Option(
        "--against",
        help="The reference MODEL; self@MODE is the same model in another compute mode.",
    ),
]
Swap = Annotated[
    list[str] | None,
    Option(
        "--swap",
        help=(
            "Compute a module otherwise: layers.3.ffn=reference, =float32 or another precision, "
            "=eager if compiled."
        ),
    ),
]


@takes("prompt", "input_ids", "points", "backward", "expect", "csv")
def compare(request: Request, model: Model, against: Against = None, swap: Swap = None) -> None:
    """Compare MODEL with --against point by point, or a model with itself under --swap."""
    compare_models(request, model, against, swap or [], bisect=False, check=None)


def compare_models(
    request: Request,
    model: str,
    against: str | None,
    swaps: Sequence[str],
    *,
    bisection: Callable[..., dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Compare values, gradients with --backward, and bisect with `bisection`; write the record."""
    import torch

    from stackproof.trace import compare as compared
    from stackproof.trace import compare_gradients, expect, variant

    if against is None and not swaps:
        raise UsageError(
            "stack trace compare needs a second computation",
            next_step="give --against MODEL, or --swap MODULE=MODE",
        )
    expected = request.expected(expect.OF_SIDES)
    loaded = load_model(model)
    other = load_model(SELF if against is None else against, loaded)
    ids = checked(request.ids(loaded), other)
    good, bad = variant(other.model, other.mode), variant(loaded.model, loaded.mode)
    if against is not None and other.model is loaded.model and other.mode == loaded.mode:
        raise UsageError(
            "both sides are the same computation",
            value=against,
            next_step="self@bfloat16, or another MODEL",
        )
    options |= {"ids": ids, "backward": request.backward, "swap": list(swaps)}
    record = request.open(CLAIM, [loaded, other], **options)
    changed = replace(bad, around=_swapping(bad, swaps)) if swaps else bad
    input_ids, metric = torch.tensor([ids]), record.builder.metric
    found = compared(good, bad if against is not None else changed, input_ids, request.points)
    document = _document(found, loaded.title, other.title, ids)
    if swaps and against is not None:
        after = compared(good, changed, input_ids, request.points)
        document["swaps"] = _effect_of_swaps(found, after, swaps)
    if request.backward:
        gradients = _gradients(compare_gradients(good, changed, input_ids, request.points))
        swapped = f", with {', '.join(swaps)}" if swaps else ""
        document["gradients"] = gradients | {"swapped": swapped}
        excess = [line["excess"] for line in (*gradients["points"], *gradients["parameters"])]
        worst, n, suspects = max(excess, default=0.0), len(excess), len(gradients["suspects"])
        metric("gradient_worst_excess", worst, "times its bound", n=n, better="lower")
        metric("gradient_suspects", suspects, "gradients", n=n, better="lower")
    if bisection is not None:
        document |= bisection(good, changed, input_ids, request.points, other.title)
    figures = {line["point"]: line for line in document["points"]}
    document["expectations"] = [asdict(j) for j in expect.judge(expected, figures, figures)]
    worst, n = max((c.excess for c in found.points), default=0.0), len(found.points)
    metric("worst_excess", worst, "times the bound of rounding", n=n, better="lower")
    metric("suspects", len(found.suspects), "points", n=n, better="lower")
    if found.logits is not None:
        metric("logits_rel_err", found.logits.rel_err, "1", better="lower")
    request.close(record, document, _show)


@contextmanager
def _swapped(bad: Any, pairs: Sequence[Sequence[str]]) -> Iterator[None]:
    from stackproof.trace.model_variant import swapped

    with bad.around(), ExitStack() as stack:
        for module, mode in pairs:
            stack.enter_context(swapped(bad.model, bad.where, module, mode))
        yield


def _swapping(bad: Any, swaps: Sequence[str]) -> Callable[[], Any]:
    """The context that a variant runs in with its swaps.
    Raises UsageError for a swap of another form.
    """
    pairs = [s.split("=") for s in swaps]
    if wrong := next((s for s, p in zip(swaps, pairs) if len(p) != 2), None):
        raise UsageError(
            "not a swap", value=wrong, allowed="MODULE=MODE, as in layers.3.ffn=reference"
        )
    return lambda: _swapped(bad, pairs)


def _document(found: Any, model: str, against: str, ids: list[int]) -> dict[str, Any]:
    lines = [_line(c) for c in found.points]
    first = found.first_divergence
    return {
        "model": model,
        "against": against,
        "input_ids": ids,
        "points": lines,
        "first_divergence": first
        and next(line for line in lines if line["point"] == first.point.name),
        "way": found.way or None,
        "suspects": [c.point.name for c in found.suspects],
        "bound": found.bound,
        "only_here": list(found.only_b),
        "only_there": list(found.only_a),
        "logits": found.logits and asdict(found.logits),
        "runs": found.runs,
        "chain": [],
    }


def _line(c: Any) -> dict[str, Any]:
    arrived = asdict(c.arrived) if c.arrived else dict.fromkeys(("rel_err", "cosine", "nmse"))
    added = {k: getattr(c, k) for k in ("added_err", "bound", "excess", "note")}
    return place_of(c.point) | arrived | added


def _gradients(found: Any) -> dict[str, Any]:
    """Gradients in the document. `read_by` names the operation whose derivative
    makes the gradient at a point.
    """

    def line(c: Any) -> dict[str, Any]:
        return _line(c) | {"operation": "", "read_by": c.read_by}

    return {
        "points": [line(c) for c in found.points],
        "parameters": [line(c) for c in found.parameters],
        "first": found.first and line(found.first),
        "suspects": [c.point.name for c in found.suspects],
        "bound": found.bound,
    }


def _effect_of_swaps(before: Any, after: Any, swaps: Sequence[str]) -> dict[str, Any]:
    first = after.first_divergence
    return {
        "swapped": list(swaps),
        "logits_rel_err_before": before.logits and before.logits.rel_err,
        "logits_rel_err_after": after.logits and after.logits.rel_err,
        "first_divergence_after": first and first.point.name,
        "cured": before.first_divergence is not None and first is None,
    }


# ---- tables


def _show(document: dict[str, Any]) -> None:
    lines, first = document["points"], document["first_divergence"]
    n_tokens = len(document["input_ids"])
    title = f"{document['model']} against {document['against']}, {n_tokens} tokens"
    _show_errors(title, lines, ERRORS, document["bound"])
    cells = {
        (line["layer"], line["slot"]): _decades(line) for line in lines if line["layer"] is not None
    }
    show_heat_map(cells, "added error in powers of ten above a tenth of its bound", 1.0)
    if document["chain"]:
        _show_bisection(document)
    if "gradients" in document:
        _show_gradients(document["gradients"])
    if swaps := document.get("swaps"):
        before, after = (number(swaps[f"logits_rel_err_{at}"]) for at in ("before", "after"))
        cured = "cured" if swaps["cured"] else "not cured"
        names = ", ".join(swaps["swapped"])
        print_line(f"with {names}: error of the logits {before} → {after}; {cured}")
    show_expectations(document)
    verdict = "no operation adds more than rounding"
    if first is not None:
        verdict = f"first to err: {first['point']}, the {first['operation']}"
        verdict += f", which {first['note']}" if first["note"] else ""
    verdict += f": {document['way']}" if document["way"] else ""
    print_line(verdict, style="bold")


def _show_errors(
    title: str,
    lines: list[dict[str, Any]],
    columns: dict[str, str],
    bound: str,
    name: str = "point",
) -> None:
    rows = [
        [
            line["point"] + (" ◀" if line["excess"] > 1 else ""),
            *(number(line[k]) for k in columns),
            line["note"],
        ]
        for line in lines
    ]
    print_table(title, [name, *columns.values(), ""], rows)
    print_line(f"bound of added errors: {bound}", style="dim")


def _show_bisection(document: dict[str, Any]) -> None:
    for link in document["chain"]:
        head = f"{link['id']:4} {link['verdict']:10} {link['hypothesis']}"
        print_line(f"{head}  ({listed(link['evidence'])})")
    for one in document["guilty"]:
        print_line(f"cause: {one['point']}, the {one['operation']}", style="bold")
    text = f"bisection: {document['conclusion']}"
    if len(document["guilty"]) > 1:
        text += f"; the comparison suspects {len(document['suspects'])} points"
    if document["tolerance"] is not None:
        text += f" (tolerance of the logits {number(document['tolerance'])})"
    print_line(text)
    if document["minimal_set"]:
        print_line(f"smallest set of modules that cures: {', '.join(document['minimal_set'])}")


def _show_gradients(found: dict[str, Any]) -> None:
    """Gradients in the order of the backward; of parameters those above their bound."""
    lines = [*found["points"], *(line for line in found["parameters"] if line["excess"] > 1)]
    columns = {k: v for k, v in ERRORS.items() if k != "nmse"}
    parameters = f"{len(found['parameters'])} parameters{found['swapped']}"
    title = f"Gradients of the next-token loss, backwards; {parameters}"
    _show_errors(title, lines, columns, found["bound"], "gradient at")
    first = found["first"]
    if first is None:
        return print_line("no derivative adds more than rounding", style="bold")
    whose = (
        f"in the derivative of what reads it: {first['read_by']}"
        if first["read_by"]
        else "in its own derivative"
    )
    print_line(
        f"first derivative to err: the gradient at {first['point']}, {first['note'] or whose}",
        style="bold",
    )


def _decades(line: dict[str, Any]) -> float | None:
    if line["added_err"] is None:
        return None
    return math.log10(max(10 * line["excess"], 1.0))
