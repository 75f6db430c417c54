"""`stack trace --nonfinite` and `--repro`: the first operation that made a NaN or an infinity."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stackproof.cli.output import emit, stdout, table
from stackproof.cli.paths import bundle_at
from stackproof.spec.canonical import canonical_json

FILE = "nonfinite.jsonl"
CLAIM = (
    "With these inputs on this code and machine, this operation was the first to make a value "
    "that is not finite, or none did."
)
NOT_COVERED = (
    (
        "kernels of another device, and what a compiler fuses: the model ran uncompiled, on the "
        "device named here"
    ),
    "operations inside one fused kernel",
)


def newest_bundle(run: Path) -> Path | None:
    """The repro bundle of a run in which something was not finite; else the one of the latest step;
    None without any.
    """
    found = sorted(
        (int(p.name.rpartition("-")[2]), p.name.startswith("runtime.finite-"), p)
        for p in run.glob("repro/*-step-*")
    )
    return max(found, key=lambda f: (f[1], f[0]))[2] if found else None


def trace_bundle(
    bundle: Path, *, device: str | None, base: Path | None, run_dir: Path | None, json: bool
) -> None:
    """Replay a bundle once with every operation watched, say what was found and write a record."""
    from stackproof.evidence import repro
    from stackproof.spec.building import artefact
    from stackproof.train.locate import locate

    held = repro.read_bundle(bundle_at(bundle, "--repro"))
    builder = record_builder(held.config, (held.record,))
    _, found = locate(bundle, device=device or "cpu", base=base)
    builder.inputs = [artefact(bundle / repro.DOCUMENT, root=Path.cwd(), name="repro bundle")]
    document = {
        "step": found.step,
        "steps_replayed": list(found.steps),
        "bundle": str(bundle),
        "gate": held.gate,
        "gate_step": held.step,
    }
    report = {} if found.report is None else report_document(found.report)
    document |= {"first_nonfinite": None, "others": [], "already": [], "ended_by": ""} | report
    document |= {
        "operations": found.operations,
        "seconds": round(found.seconds, 3),
        "left_by_run": left_by_run(bundle, held),
    }
    clean = f"every value of steps {_span(found.steps)} is finite on this code"
    finish(builder, document, run_dir, json, clean=clean)


def left_by_run(bundle: Path, held: Any) -> dict[str, Any]:
    """What the bundle itself says of the points, as the model stood when the gate turned red."""
    from stackproof.evidence import repro
    from stackproof.spec.canonical import parse_strict

    if not (bundle / repro.POINTS).is_file():
        return {
            "points": 0,
            "why_none": held.no_points or "the bundle was written before points were",
            "first_nonfinite": None,
        }
    lines = [
        parse_strict(line, origin=repro.POINTS)
        for line in (bundle / repro.POINTS).read_bytes().splitlines()
    ]
    broken = (
        line["point"]
        for line in lines
        if line["stats"]["n"] and line["stats"]["frac_nonfinite"] > 0
    )
    return {"points": len(lines), "why_none": "", "first_nonfinite": next(broken, None)}


def trace_model(case: Any, *, backward: bool) -> None:
    """One forward of a case of `stackproof.cli.lens`, and with `backward` the derivative of
    its mean next-token loss.
    """
    from torch.nn.functional import cross_entropy

    from stackproof.trace.nonfinite import first_nonfinite
    from stackproof.trace.trace import run

    def loss() -> Any:
        return cross_entropy(
            run(case.model, case.input_ids)[:, :-1].flatten(0, 1).float(),
            case.input_ids[:, 1:].flatten(),
        )

    call = loss if backward else lambda: run(case.model, case.input_ids)
    report = first_nonfinite(call, models=case.model, backward=backward)
    clean = f"every value of {report.operations} operations is finite"
    document = (
        case.facts
        | {"input_ids": case.input_ids[0].tolist(), "step": None}
        | report_document(report)
    )
    finish(case.builder, document, case.run_dir, case.json, clean=clean)


def report_document(report: Any) -> dict[str, Any]:
    """A report as JSON has it."""
    first = report.first
    return {
        "first_nonfinite": None
        if first is None
        else event_document(first) | {"point": report.point},
        "others": [event_document(e) for e in report.others],
        "already": list(report.already),
        "ended_by": report.ended_by,
        "operations": report.operations,
        "seconds": round(report.seconds, 3),
    }


def event_document(event: Any) -> dict[str, Any]:
    """An event as JSON has it: where first, then what went in and came out."""
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


def finish(
    builder: Any, document: dict[str, Any], run_dir: Path | None, json: bool, *, clean: str
) -> None:
    """Write the document and its record, and show it."""
    from stackproof.spec.building import write_atomically

    directory = run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / FILE, canonical_json(document) + b"\n")
    builder.metric("operations", document["operations"], "operations")
    builder.metric("watched_s", document["seconds"], "s", better="lower")
    first = document["first_nonfinite"]
    reason = clean if first is None else sentence(first, document["step"])
    record = builder.finish(
        directory, status="completed", end_reason=reason, exit_code=0, series=(FILE,)
    )
    document |= {"record": record.id, "run_dir": str(directory)}
    if not emit(document, json):
        show(document, reason)


def sentence(first: dict[str, Any], step: int | None) -> str:
    """What happened, in one line."""
    how = {
        "made": f"made the first {first['what']}",
        "came in": (
            f"was the first to read a {first['what']}, which came in with {first['carrier']}"
        ),
        "put in": f"put in a {first['what']} that the code names itself",
    }[first["kind"]]
    at = "" if step is None else f"step {step}: "
    derivative = (
        f", as {first['derivative']} of {first['forward_op'] or 'an operation before the trace'}"
        if first["derivative"]
        else ""
    )
    place = first["module"] or "no module"
    return f"{at}{first['op']} in {place}, {first['phase']}{derivative}, {how}"


def show(document: dict[str, Any], reason: str) -> None:
    """The finding as lines and tables."""
    first = document["first_nonfinite"]
    stdout.print(reason, style="bold green" if first is None else "bold red", markup=False)
    if first is not None:
        source = first["source"]
        rows = [
            ["layer", "–" if first["layer"] is None else first["layer"]],
            ["point", first["point"] or "–"],
        ]
        rows += (
            [
                ["line", f"{source['file']}:{source['number']} in {source['function']}"],
                ["", source["text"]],
            ]
            if source
            else []
        )
        rows += [
            ["called from", f"{c['file']}:{c['number']} in {c['function']}"]
            for c in first["called_from"]
        ]
        rows += [[name, value] for name, value in first["scalars"].items()]
        stdout.print(table("Where", ["what", "value"], rows))
        columns = [
            "tensor",
            "is",
            "shape",
            "dtype",
            "finite",
            "min",
            "max",
            "mean",
            "std",
            "NaN",
            "+Inf",
            "−Inf",
            "first at",
        ]
        rows = [_values("in", v) for v in first["inputs"]] + [
            _values("out", v) for v in first["outputs"]
        ]
        stdout.print(table("Last good values, and what became of them", columns, rows))
    if document["already"]:
        stdout.print(f"not finite before: {', '.join(document['already'][:8])}", markup=False)
    if (left := document.get("left_by_run")) and left["first_nonfinite"]:
        said = (
            f"when the gate turned red, {left['first_nonfinite']} was the first point that was "
            "not finite; see points.jsonl of the bundle"
        )
        stdout.print(said, markup=False)
    if strong := [e for e in document["others"] if e["kind"] != "put in"]:
        stdout.print(
            f"{len(strong)} other operation(s) made values that reached nothing or came later; "
            f"see {FILE}",
            markup=False,
        )
    stdout.print(
        f"record {document['run_dir']}/metadata.json  ({document['record']})", markup=False
    )


def _values(way: str, v: dict[str, Any]) -> list[Any]:
    number = lambda x: "–" if x is None else f"{x:.4g}"  # noqa: E731
    good = v["n"] - v["n_nan"] - v["n_posinf"] - v["n_neginf"]
    first = "" if v["first_bad"] is None else ",".join(map(str, v["first_bad"]))
    figures = [number(v[k]) for k in ("min", "max", "mean", "std")]
    counts = [v["n_nan"], v["n_posinf"], v["n_neginf"], first]
    return [
        f"{way} {v['name']}",
        v["held"],
        "×".join(map(str, v["shape"])),
        v["dtype"],
        f"{good}/{v['n']}",
        *figures,
        *counts,
    ]


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "none"


def record_builder(config: dict[str, Any], parents: tuple[str, ...] = ()) -> Any:
    """The record of a search for what is not finite."""
    from stackproof.spec.building import RecordBuilder
    from stackproof.spec.gates import load_spec
    from stackproof.spec.provenance import environment

    said = {
        "claim": CLAIM,
        "not_covered": NOT_COVERED,
        "environment": environment(),
        "parents": parents,
    }
    return RecordBuilder(kind="trace", spec=load_spec(), config=config, **said)
