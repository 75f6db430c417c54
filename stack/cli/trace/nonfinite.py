"""`stack trace nonfinite`: the first operation that created a NaN or an infinity."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from stackproof.cli.load_model import load_model
from stackproof.cli.output import print_line, print_table
from stackproof.cli.paths import bundle_at, refuse_unused
from stackproof.cli.recording import Claim, OpenRecord, open_record
from stackproof.cli.trace.common import Request, takes
from stackproof.spec.errors import IntegrityError, UsageError

FILE = "nonfinite.jsonl"
BUNDLE = re.compile(r"(?P<gate>[a-z][a-z0-9.-]*)-step-(?P<step>[0-9]+)")
COLUMNS = (*"tensor is shape dtype finite min max mean std NaN +Inf −Inf".split(), "first at")
CLAIM = Claim(
    "trace",
    "With these inputs, code and machine, this operation was the first to create a non-finite "
    "value, or no operation did.",
    (
        "kernels of other devices, and compiled graphs: the model ran uncompiled, on the device "
        "named here",
        "operations inside one fused kernel",
    ),
)
EXAMPLES = (
    "stack trace nonfinite runs/pocket-1",
    "stack trace nonfinite --repro runs/pocket-1/repro/runtime.finite-step-7",
)


@takes("prompt", "input_ids", "backward")
def nonfinite(
    request: Request,
    model: Annotated[
        str | None,
        Argument(
            metavar="[MODEL]",
            help=(
                "A run: its newest repro bundle is replayed. Without one, a forward of the model "
                "is watched."
            ),
        ),
    ] = None,
    repro: Annotated[
        Path | None, Option(help="Replay this repro bundle, in place of a MODEL.")
    ] = None,
    device: Annotated[
        str | None, Option(help="With a repro bundle: cpu or cuda. Default: cpu.")
    ] = None,
    base: Annotated[
        Path | None,
        Option(help="With a repro bundle that only names its first checkpoint: that step folder."),
    ] = None,
) -> None:
    """Find the first operation that created a NaN or an infinity, in a repro bundle or in a
    forward.
    """
    forward = {
        "--prompt": request.prompt is not None,
        "--input-ids": request.input_ids is not None,
        "--backward": request.backward,
    }
    if repro is not None:
        refuse_unused("--repro", {"MODEL": model is not None, **forward})
    elif model is None:
        raise UsageError(
            "stack trace nonfinite needs a MODEL, or --repro BUNDLE",
            next_step="stack trace nonfinite runs/pocket-1",
        )
    bundle = repro or (None if any(forward.values()) else newest_bundle(Path(model)))
    if bundle is not None:
        return _replay(request, bundle, device, base)
    refuse_unused("a model without a repro bundle", {"--device": device, "--base": base})
    _watch(request, model)


def newest_bundle(run: Path) -> Path | None:
    """The repro bundle of a run with a non-finite value, else that of the latest step; None without
    bundles. Folders of other names are passed over.
    """
    found = [(m, p) for p in run.glob("repro/*") if (m := BUNDLE.fullmatch(p.name))]
    rank = lambda f: (f[0]["gate"] == "runtime.finite", int(f[0]["step"]), f[1])  # noqa: E731
    return max(found, key=rank)[1] if found else None


def _replay(request: Request, bundle: Path, device: str | None, base: Path | None) -> None:
    """Replay a bundle once and check every operation."""
    from stackproof.evidence import repro
    from stackproof.replay.locate import locate

    held = repro.read_bundle(bundle_at(bundle, "--repro"))
    written = {"run_dir": request.run_dir, "json": request.json}
    record = open_record(CLAIM, held.config, parents=(held.record,), **written)
    record.unasked = ("checkpoint.opened",)  # a bundle holds no run directory
    _, found = locate(bundle, device=device or "cpu", base=base)
    record.input(bundle / repro.DOCUMENT, name="repro bundle")
    document = {"step": found.step, "steps_replayed": list(found.steps), "bundle": str(bundle)}
    document |= {"gate": held.gate, "gate_step": held.step}
    document |= {"first_nonfinite": None, "others": [], "already": [], "ended_by": ""}
    document |= _report(found.report) if found.report else {}
    document |= {"operations": found.operations, "seconds": round(found.seconds, 3)}
    document["left_by_run"] = _left_by_run(bundle, held)
    steps = f"{found.steps[0]} to {found.steps[-1]}" if found.steps else "none"
    _close(record, document, clean=f"every value of steps {steps} is finite on this code")


def _left_by_run(bundle: Path, held: Any) -> dict[str, Any]:
    """The points in the bundle, recorded when the gate turned red."""
    from stackproof.evidence import repro
    from stackproof.spec.canonical import parse_lines
    from stackproof.spec.files import read_bytes

    file = bundle / repro.POINTS
    if not file.is_file():
        why = held.no_points or "the bundle was written before points were"
        return {"points": 0, "why_none": why, "first_nonfinite": None}
    lines = parse_lines(read_bytes(file), origin=str(file))
    try:
        broken = [x["point"] for x in lines if x["stats"]["n"] and x["stats"]["frac_nonfinite"] > 0]
    except (KeyError, TypeError) as e:
        raise IntegrityError(
            f"{file} holds a line of another kind than a point: {type(e).__name__}: {e}",
            next_step="copy the whole folder again",
        ) from e
    return {"points": len(lines), "why_none": "", "first_nonfinite": next(iter(broken), None)}


def _watch(request: Request, model: str) -> None:
    """Check one forward, and with --backward the derivative of its mean next-token loss."""
    import torch
    from torch.nn.functional import cross_entropy

    from stackproof.trace import first_nonfinite, variant
    from stackproof.trace.trace import run

    loaded, backward = load_model(model), request.backward
    one, ids = variant(loaded.model, loaded.mode), request.ids(loaded)
    input_ids = torch.tensor([ids])
    options = {"backward": True} if backward else {}
    record = request.open(CLAIM, [loaded], nonfinite=True, **options)

    def computed() -> Any:
        logits_BTV = run(one.model, input_ids)
        if not backward:
            return logits_BTV
        return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())

    with one.around():
        report = first_nonfinite(computed, models=one.model, backward=backward)
    document = {"model": loaded.title, **loaded.facts, "input_ids": ids, "step": None}
    document |= _report(report)
    _close(record, document, clean=f"every value of {report.operations} operations is finite")


def _report(report: Any) -> dict[str, Any]:
    """A report as JSON."""
    first = report.first
    return {
        "first_nonfinite": None if first is None else _event(first) | {"point": report.point},
        "others": [_event(e) for e in report.others],
        "already": list(report.already),
        "ended_by": report.ended_by,
        "operations": report.operations,
        "seconds": round(report.seconds, 3),
    }


def _event(event: Any) -> dict[str, Any]:
    """An event as JSON."""
    where, lines = event.where, [asdict(line) for line in event.where.lines]
    return {
        "kind": event.kind,
        "what": event.what,
        "op": event.op,
        "module": where.module,
        "layer": where.layer,
        "phase": where.phase,
        "derivative": where.node,
        "forward_op": where.of,
        "source": lines[0] if lines else None,
        "called_from": lines[1:],
        "carrier": event.carrier,
        "number": event.number,
        "scalars": dict(event.scalars),
        "inputs": [asdict(v) for v in event.inputs],
        "outputs": [asdict(v) for v in event.outputs],
    }


def _close(record: OpenRecord, document: dict[str, Any], *, clean: str) -> None:
    """Write the document beside the record, and close it."""
    first = document["first_nonfinite"]
    record.write_series(FILE, [document])
    record.builder.metric("operations", document["operations"], "operations")
    record.builder.metric("watched_s", document["seconds"], "s", better="lower")
    reason = clean if first is None else sentence(first, document["step"])
    record.close(reason, document, lambda document: _show(document, reason))


def sentence(first: dict[str, Any], step: int | None) -> str:
    """The finding in one line."""
    how = {
        "made": f"made the first {first['what']}",
        "came in": f"was the first to read a {first['what']}, which came in with "
        f"{first['carrier']}",
        "put in": f"put in a {first['what']} that the code names itself",
    }[first["kind"]]
    at = "" if step is None else f"step {step}: "
    place = f"{first['module'] or 'no module'}, {first['phase']}"
    if first["derivative"]:
        before = first["forward_op"] or "an operation before the trace"
        place += f", as {first['derivative']} of {before}"
    return f"{at}{first['op']} in {place}, {how}"


def _show(document: dict[str, Any], reason: str) -> None:
    """The finding as lines and tables."""
    first = document["first_nonfinite"]
    print_line(reason, style="bold green" if first is None else "bold red")
    if first is not None:
        at = lambda c: f"{c['file']}:{c['number']} in {c['function']}"  # noqa: E731
        rows = [["layer", "–" if first["layer"] is None else first["layer"]]]
        rows += [["point", first["point"] or "–"]]
        if source := first["source"]:
            rows += [["line", at(source)], ["", source["text"]]]
        rows += [["called from", at(c)] for c in first["called_from"]]
        print_table("Where", ["what", "value"], [*rows, *first["scalars"].items()])
        rows = [_values(way, v) for way in ("in", "out") for v in first[f"{way}puts"]]
        print_table("Last good values, and what became of them", COLUMNS, rows)
    if document["already"]:
        print_line(f"not finite before: {', '.join(document['already'][:8])}")
    if (left := document.get("left_by_run")) and left["first_nonfinite"]:
        print_line(
            f"when the gate turned red, {left['first_nonfinite']} was the first point that was "
            "not finite; see points.jsonl of the bundle"
        )
    if strong := [e for e in document["others"] if e["kind"] != "put in"]:
        print_line(
            f"{len(strong)} other operation(s) created values without effect, or later; see {FILE}"
        )


def _values(way: str, v: dict[str, Any]) -> list[Any]:
    number = lambda x: "–" if x is None else f"{x:.4g}"  # noqa: E731
    good = v["n"] - v["n_nan"] - v["n_posinf"] - v["n_neginf"]
    first = "" if v["first_bad"] is None else ",".join(map(str, v["first_bad"]))
    figures = [number(v[k]) for k in ("min", "max", "mean", "std")]
    shape = "×".join(map(str, v["shape"]))
    counts = [v["n_nan"], v["n_posinf"], v["n_neginf"], first]
    kind = [f"{way} {v['name']}", v["held"], shape, v["dtype"], f"{good}/{v['n']}"]
    return [*kind, *figures, *counts]
