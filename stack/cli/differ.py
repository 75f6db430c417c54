"""`stack trace --against`: where two computations part, which operation is guilty,
and whether a cure helps.
"""

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stackproof.cli.output import emit, stdout, table
from stackproof.cli.trace import Asked, builder_of, heat, ids_of, number, write
from stackproof.spec.errors import UsageError

CLAIM = (
    "Given these tokens, the two computations differ by these errors at these points, and the "
    "first operation to err is the one named."
)
NOT_COVERED = (
    "other tokens",
    "points that only one side has",
    "errors below the bound that rounding is granted",
)


def differ(
    text: str,
    against: str | None,
    asked: Asked,
    *,
    backward: bool,
    bisecting: bool,
    check: str | None,
    swaps: tuple[str, ...],
) -> None:
    """Compare MODEL with what it is held against; its gradients too,
    bisect and try cures if asked.
    """
    import torch

    from stackproof.cli.subjects import open_subject
    from stackproof.trace import bisect, compare, compare_gradients, expect, side

    expected = [expect.parse(e, expect.OF_SIDES) for e in asked.expect]
    if check is not None and not bisecting:
        raise UsageError(
            "--check judges the runs of a bisection", value=check, next_step="give --bisect as well"
        )
    subject = open_subject(text)
    other = open_subject("self" if against is None else against, subject)
    ids = ids_of(asked, subject)
    ids_of(replace(asked, prompt=None, input_ids=",".join(map(str, ids))), other)
    good, bad = side(other.model, other.way), side(subject.model, subject.way)
    if against is not None and other.model is subject.model and other.way == subject.way:
        raise UsageError(
            "this is the same model computed the same way",
            value=against,
            next_step="self@bfloat16, or another MODEL",
        )
    builder = builder_of(
        "compare",
        CLAIM,
        NOT_COVERED,
        [subject, other],
        asked,
        ids=ids,
        backward=backward,
        bisect=bisecting,
        check=check,
        swap=list(swaps),
    )
    cured = replace(bad, around=_with_swaps(bad, swaps)) if swaps else bad
    input_ids = torch.tensor([ids])
    found = compare(good, bad if against is not None else cured, input_ids, asked.points or None)
    document = _document(found, subject.title, other.title, ids)
    if swaps and against is not None:
        document["swaps"] = _after(
            found, compare(good, cured, input_ids, asked.points or None), swaps
        )
    if backward:
        swapped = f", with {', '.join(swaps)}" if swaps else ""
        document["gradients"] = _gradients(
            compare_gradients(good, cured, input_ids, asked.points or None)
        ) | {"swapped": swapped}
        gradients = document["gradients"]
        lines = [*gradients["points"], *gradients["parameters"]]
        builder.metric(
            "gradient_worst_excess",
            max((x["excess"] for x in lines), default=0.0),
            "times its bound",
            n=len(lines),
            better="lower",
        )
        builder.metric(
            "gradient_suspects",
            len(gradients["suspects"]),
            "gradients",
            n=len(lines),
            better="lower",
        )
    if bisecting:
        said: list[str] = []
        bisected = bisect(good, cured, input_ids, _command(check, said), asked.points or None)
        if check is not None and bisected.chain[0].verdict == "eliminated":
            raise UsageError(
                "the check calls the right side bad, so it can tell nothing apart",
                value=said[0] or check,
                allowed=f"exit code 0 for the logits of {other.title}",
                next_step="run the check by itself on a safetensors file with logits",
            )
        document |= _bisected(bisected)
    figures = {line["point"]: line for line in document["points"]}
    document["expectations"] = [asdict(j) for j in expect.judge(expected, figures, figures)]
    worst = max((c.excess for c in found.points), default=0.0)
    builder.metric(
        "worst_excess", worst, "times the bound of rounding", n=len(found.points), better="lower"
    )
    builder.metric("suspects", len(found.suspects), "points", n=len(found.points), better="lower")
    if found.logits is not None:
        builder.metric("logits_rel_err", found.logits.rel_err, "1", better="lower")
    write(builder, document, asked)
    if not emit(document, asked.json):
        _show(document)


def _document(found: Any, model: str, against: str, ids: list[int]) -> dict[str, Any]:
    lines = [_line(c) for c in found.points]
    by_name = {line["point"]: line for line in lines}
    first = found.first_divergence
    return {
        "model": model,
        "against": against,
        "input_ids": ids,
        "points": lines,
        "first_divergence": None if first is None else by_name[first.point.name],
        "way": found.way or None,
        "suspects": [c.point.name for c in found.suspects],
        "bound": found.bound,
        "only_here": list(found.only_b),
        "only_there": list(found.only_a),
        "logits": None if found.logits is None else asdict(found.logits),
        "runs": found.runs,
        "chain": [],
    }


def _line(c: Any) -> dict[str, Any]:
    arrived = asdict(c.arrived) if c.arrived else dict.fromkeys(("rel_err", "cosine", "nmse"))
    named = {
        "point": c.point.name,
        "layer": c.point.layer,
        "slot": c.point.slot,
        "operation": c.point.operation,
    }
    return (
        named
        | arrived
        | {"added_err": c.added_err, "bound": c.bound, "excess": c.excess, "note": c.note}
    )


def _gradients(found: Any) -> dict[str, Any]:
    """Gradients as the document has them.
    `read_by` says whose derivative makes the gradient at a point.
    """

    def line(c: Any) -> dict[str, Any]:
        return _line(c) | {"operation": "", "read_by": c.read_by}

    return {
        "points": [line(c) for c in found.points],
        "parameters": [line(c) for c in found.parameters],
        "first": None if found.first is None else line(found.first),
        "suspects": [c.point.name for c in found.suspects],
        "bound": found.bound,
    }


def _with_swaps(bad: Any, swaps: tuple[str, ...]) -> Callable[[], AbstractContextManager[Any]]:
    """What must hold while the swapped side runs.
    Raises UsageError for a swap that cannot be read.
    """
    from stackproof.trace.ways import swapped

    pairs = [s.split("=") for s in swaps]
    if wrong := next((s for s, p in zip(swaps, pairs) if len(p) != 2), None):
        raise UsageError(
            "this is no swap", value=wrong, allowed="MODULE=WAY, as in layers.3.ffn=reference"
        )

    def around() -> AbstractContextManager[Any]:
        stack = ExitStack()
        try:
            stack.enter_context(bad.around())
            for module, how in pairs:
                stack.enter_context(swapped(bad.model, bad.where, module, how))
        except BaseException:
            stack.close()
            raise
        return stack

    return around


def _after(before: Any, after: Any, swaps: tuple[str, ...]) -> dict[str, Any]:
    """What the swaps changed at the end."""
    first = after.first_divergence
    return {
        "swapped": list(swaps),
        "logits_rel_err_before": before.logits and before.logits.rel_err,
        "logits_rel_err_after": after.logits and after.logits.rel_err,
        "first_divergence_after": first and first.point.name,
        "cured": before.first_divergence is not None and first is None,
    }


def _bisected(found: Any) -> dict[str, Any]:
    return {
        "guilty": [
            {"point": p.name, "layer": p.layer, "operation": p.operation} for p in found.guilty
        ],
        "minimal_set": list(found.minimal_set),
        "chain": [{"id": f"E{i}"} | asdict(link) for i, link in enumerate(found.chain, start=1)],
        "runs": found.runs,
        "tolerance": found.tolerance,
        "conclusion": found.conclusion,
    }


def _command(check: str | None, said: list[str]) -> Callable[[Any], bool] | None:
    """A check by a command: it is given a safetensors file with `logits`, and says 0 for good, 1
    for bad; anything else stops us.

    What it writes to standard error, each time, is left in `said`.
    """
    if check is None:
        return None
    import safetensors.torch

    def judge(logits: Any) -> bool:
        with tempfile.TemporaryDirectory(prefix="stackproof-check-") as folder:
            file = Path(folder) / "logits.safetensors"
            safetensors.torch.save_file({"logits": logits.contiguous()}, file)
            try:
                done = subprocess.run(
                    [*shlex.split(check), str(file)], capture_output=True, text=True
                )
            except OSError as e:
                raise UsageError(f"the check cannot be run: {e}", value=check) from e
        said.append(done.stderr.strip()[-300:])
        if done.returncode not in (0, 1):
            raise UsageError(
                "the check did not say good or bad",
                value=f"exit code {done.returncode}: {said[-1]}",
                allowed="0 for good, 1 for bad",
            )
        return done.returncode == 0

    return judge


def _show(document: dict[str, Any]) -> None:
    """Tables for people."""
    import math

    lines, first = document["points"], document["first_divergence"]
    keys = ("rel_err", "cosine", "nmse", "added_err", "bound")
    rows = [
        [
            line["point"] + (" ◀" if line["excess"] > 1 else ""),
            *(number(line[k]) for k in keys),
            line["note"],
        ]
        for line in lines
    ]
    columns = ["point", "error that arrives", "cosine", "NMSE", "error added", "bound", ""]
    stdout.print(
        table(
            f"{document['model']} against {document['against']}, {len(document['input_ids'])} "
            "tokens",
            columns,
            rows,
        )
    )
    cells = {
        (line["layer"], line["slot"]): _decades(line, math)
        for line in lines
        if line["layer"] is not None
    }
    heat(cells, "added error in powers of ten above a tenth of its bound", 1.0)
    stdout.print(f"bound of added errors: {document['bound']}", style="dim", markup=False)
    for link in document["chain"]:
        numbers = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in link["evidence"].items()
        )
        stdout.print(
            f"{link['id']:4} {link['verdict']:10} {link['hypothesis']}  ({numbers})", markup=False
        )
    for one in document.get("guilty", []):
        stdout.print(f"guilty: {one['point']}, the {one['operation']}", style="bold", markup=False)
    if document.get("conclusion"):
        also = (
            f"; the comparison suspects {len(document['suspects'])} points"
            if len(document["guilty"]) > 1
            else ""
        )
        held = (
            f" (tolerance of the logits {number(document['tolerance'])})"
            if document["tolerance"] is not None
            else ""
        )
        stdout.print(f"bisection: {document['conclusion']}{also}{held}", markup=False)
    if document.get("minimal_set"):
        stdout.print(
            f"smallest set of modules that cures: {', '.join(document['minimal_set'])}",
            markup=False,
        )
    if "gradients" in document:
        _show_gradients(document["gradients"])
    if "swaps" in document:
        stdout.print(_swaps_said(document["swaps"]), markup=False)
    for one in document["expectations"]:
        stdout.print(
            f"{one['verdict']:10} {one['text']}  found {number(one['found'])}", markup=False
        )
    said = (
        "no operation adds more than rounding"
        if first is None
        else f"first to err: {first['point']}, the {first['operation']}"
    )
    said += f", which {first['note']}" if first is not None and first["note"] else ""
    said += f": {document['way']}" if document["way"] else ""
    stdout.print(said, style="bold", markup=False)
    stdout.print(
        f"record {document['run_dir']}/metadata.json  ({document['record']})", markup=False
    )


def _show_gradients(found: dict[str, Any]) -> None:
    """Gradients in the order of the backward; of parameters those that err."""
    shown = [*found["points"], *(line for line in found["parameters"] if line["excess"] > 1)]
    keys = ("rel_err", "cosine", "added_err", "bound")
    rows = [
        [line["point"] + (" ◀" if line["excess"] > 1 else ""), *(number(line[k]) for k in keys)]
        for line in shown
    ]
    title = (
        f"Gradients of the next-token loss, backwards; {len(found['parameters'])} "
        f"parameters{found['swapped']}"
    )
    stdout.print(
        table(title, ["gradient at", "error that arrives", "cosine", "error added", "bound"], rows)
    )
    stdout.print(f"bound of added errors: {found['bound']}", style="dim", markup=False)
    first = found["first"]
    if first is None:
        return stdout.print("no derivative adds more than rounding", style="bold", markup=False)
    whose = (
        f", in the derivative of what reads it: {first['read_by']}"
        if first["read_by"]
        else ", in its own derivative"
    )
    whose = f", {first['note']}" if first["note"] else whose
    stdout.print(
        f"first derivative to err: the gradient at {first['point']}{whose}",
        style="bold",
        markup=False,
    )


def _decades(line: dict[str, Any], math: Any) -> float | None:
    if line["added_err"] is None:
        return None
    return (
        0.0
        if line["excess"] <= 0.1
        else math.inf
        if math.isinf(line["excess"])
        else math.log10(line["excess"] * 10)
    )


def _swaps_said(swaps: dict[str, Any]) -> str:
    after = (
        f"error of the logits {number(swaps['logits_rel_err_before'])} → "
        f"{number(swaps['logits_rel_err_after'])}"
    )
    return (
        f"with {', '.join(swaps['swapped'])}: {after}; {'cured' if swaps['cured'] else 'not cured'}"
    )
