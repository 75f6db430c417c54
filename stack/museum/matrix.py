"""The kill matrix: every plant against every gate, to see who else turns red,
and who does so first and at the least cost.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from stackproof.config import RunConfig
from stackproof.contracts.gate import judge, not_run
from stackproof.data.prepare import prepare
from stackproof.museum.commands import is_of_command
from stackproof.museum.plant import Plant, load_museum
from stackproof.museum.prove import Prover, selection, workshop
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import GateFailed
from stackproof.spec.gates import Gate
from stackproof.spec.records import Waiver
from stackproof.subject.assemble import subject_of
from stackproof.train.loop import train
from stackproof.train.start import fresh
from stackproof.train.step import StepReport
from stackproof.train.trainer import Callback, Trainer

WHOLE = "the stack itself"  # the name of errors outside of any gate


class _Stopwatch(Callback):
    """Seconds from the first step to the end of each."""

    def __init__(self) -> None:
        self.began, self.at = time.perf_counter(), {}

    def on_phase(self, name: str) -> None:
        self.began = time.perf_counter()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self.at[report.step] = time.perf_counter() - self.began


Row = dict[str, Any]


def matrix(
    gate_ids: tuple[str, ...], on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """A row for every plant of the chosen gates, with the keys `plant`, `gate`, `red`, `raised`,
    `asked` and `seconds`; `red` holds `{gate: {"seconds", "step"}}`.

    A preflight gate's seconds are those of its check, a runtime gate's those of the run until it
    turned red. Every plant meets all gates that apply to the configuration its own gate is proven
    under; a gate that is red there without the plant is left out. A runtime gate that never looked
    is red, as it is where no gate is waived: its step is None and its seconds are those of the run.
    Plants in the script of another trainer do not touch the stack and have no row, and neither have
    those of gates that belong to a command.
    """
    plants = {p.id: p for p in load_museum().values() if p.trainer == "stack"}
    rows: list[Row] = []
    with workshop() as root:
        prover, controls = Prover(root), {}
        for gate in (g for g in selection(gate_ids) if not is_of_command(g)):
            for plant in (plants[p] for p in gate.plants if p in plants):
                cfg = _config(prover, gate, plant)
                key = sha256_json([cfg.to_dict(), "export" in gate.kinds])
                if key not in controls:
                    controls[key] = _asked_of_all(prover, gate, cfg, nullcontext)[0]
                rows.append(_row(prover, gate, cfg, plant, set(controls[key])))
                on_row(rows[-1])
    return rows


def _config(prover: Prover, gate: Gate, plant: Plant) -> RunConfig:
    """The configuration a plant is proven under, with every gate of a run waived, so that each of
    them has a verdict.
    """
    cfg = prover.config(gate, plant)
    waive = tuple(
        Waiver(id=g.id, reason="the matrix asks all of them", expires="9999-12-31")
        for g in prover.spec.gates.values()
    )
    return cfg.model_copy(update={"gates": cfg.gates.model_copy(update={"waive": waive})})


def _row(prover: Prover, gate: Gate, cfg: RunConfig, plant: Plant, red_anyway: set[str]) -> Row:
    started = time.perf_counter()
    prover.use_cache_of(gate, plant)
    red, raised, asked = _asked_of_all(prover, gate, cfg, plant.apply)
    return {
        "plant": plant.id,
        "gate": gate.id,
        "red": {g: seen for g, seen in red.items() if g not in red_anyway},
        "raised": raised,
        "asked": asked - len(red_anyway),
        "seconds": round(time.perf_counter() - started, 3),
    }


Red = dict[str, dict[str, float | int | None]]


def _asked_of_all(
    prover: Prover, gate: Gate, cfg: RunConfig, apply: Callable[[], AbstractContextManager[None]]
) -> tuple[Red, dict[str, str], int]:
    """(red gates, raised errors, number of judged gates) of the gates of exports,
    or of those of runs.
    """
    red: Red = {}
    raised: dict[str, str] = {}
    if "export" in gate.kinds:
        known = prover.spec.gates.values()
        of_exports = [g for g in known if "export" in g.kinds and not is_of_command(g)]
        for one in of_exports:
            with _raising(one.id, raised), apply():
                _note(red, one.id, lambda one=one: prover.verdict_of(one).outcome)
        return red, raised, len(of_exports)
    here = [
        g for g in prover.spec.gates.values() if "train" in g.kinds and g.applies_to(cfg.to_dict())
    ]
    before = [g for g in here if g.moment == "preflight"]
    with _raising(WHOLE, raised), torch.random.fork_rng(devices=[]), apply():
        subject = subject_of(cfg, prepare(cfg.data), torch.device("cpu"))
        for one, found in judge(before, subject):
            if found.error is not None:
                raised[one.id] = _first_line(found.error)
            elif found.verdict.outcome == "fail":
                red[one.id] = {"seconds": round(found.seconds, 4), "step": None}
    within = [g.id for g in here if g.moment != "preflight"]
    watch = _Stopwatch()
    with _raising("the run", raised), apply():
        record = train(fresh(cfg, (), prover.run_dir(), [watch], only=within))
        runtime = {g.id for g in here if g.moment == "runtime"}
        for result in (
            r for r in record.gates if r.verdict == "fail" or (r.id in runtime and not r.checks)
        ):
            step = result.first_failure_step
            red[result.id] = {
                "seconds": round(watch.at.get(step, max(watch.at.values(), default=0.0)), 3),
                "step": step,
            }
    return red, raised, len(here)


def _note(red: Red, gate_id: str, ask: Callable[[], str]) -> None:
    started = time.perf_counter()
    try:
        outcome = ask()
    except GateFailed as e:
        outcome = (e.verdict or not_run("")).outcome if e.gate_id == gate_id else "pass"
    if outcome == "fail":
        red[gate_id] = {"seconds": round(time.perf_counter() - started, 4), "step": None}


@contextmanager
def _raising(who: str, raised: dict[str, str]) -> Iterator[None]:
    """Whatever is raised is written down as such: it is neither red nor green."""
    try:
        yield
    except Exception as e:
        raised[who] = _first_line(e)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
