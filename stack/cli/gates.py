"""`stack gates list | show | prove | backtest | coverage`."""

from pathlib import Path
from typing import Annotated

import typer

from spec.errors import ConfigError, GateFailed
from stack.cli.output import Json, emit, stderr, stdout, table

app = typer.Typer(help="Gates: what must be true, and whether it has been proven.", no_args_is_help=True)
Directory = Annotated[Path | None, typer.Option("--evidence", help="Evidence folder. Default: ./evidence, else the checkout's.")]


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="gates")


def _states(evidence: Path | None):
    from spec.coverage import coverage
    from spec.gates import load_spec
    from spec.ledger import Ledger
    from stack.evidence.ledgering import default_directory

    spec = load_spec()
    return spec, coverage(spec, Ledger(evidence or default_directory()).records())


@app.command("list")
def list_(evidence: Directory = None, json: Json = False) -> None:
    """All gates with their computed state."""
    from spec.coverage import tally

    spec, states = _states(evidence)
    rows = [
        {"id": g.id, "moment": g.moment, "severity": g.severity, "state": states[g.id].state, "plants": list(g.plants), "title": g.title}
        for g in spec.gates.values()
    ]
    if not emit({"gates": rows, "counts": tally(states)}, json):
        stdout.print(
            table(
                f"Spec {spec.version}",
                ["gate", "moment", "severity", "state", "title"],
                [[r[c] for c in ("id", "moment", "severity", "state", "title")] for r in rows],
            )
        )


@app.command()
def show(gate_id: Annotated[str, typer.Argument(metavar="ID", help="Gate id.")], evidence: Directory = None, json: Json = False) -> None:
    """One gate: statement, limits with reasons, plants, state and the records it stands on."""
    import difflib

    spec, states = _states(evidence)
    if gate_id not in spec.gates:
        near = difflib.get_close_matches(gate_id, spec.gates, n=3, cutoff=0.3)
        raise ConfigError(f"there is no gate {gate_id}", allowed=", ".join(near) or "stack gates list", next_step="stack gates list")
    gate, state = spec.gates[gate_id], states[gate_id]
    document = gate.model_dump(mode="json") | {"fingerprint": spec.fingerprint(gate_id), "state": state.state, "reason": state.reason}
    document |= {"kill_records": list(state.kill_records), "run_records": list(state.run_records)}
    if emit(document, json):
        return
    stdout.print(f"[bold]{gate.id}[/]  {gate.title}")
    stdout.print(gate.statement, markup=False)
    stdout.print(f"{gate.moment}, {gate.severity}; state {state.state}: {state.reason}", markup=False)
    stdout.print(f"check {gate.check}   fingerprint {document['fingerprint'][:16]}…", markup=False)
    if gate.limits:
        stdout.print(
            table(
                "Limits",
                ["name", "rule", "value", "unit", "why"],
                [[n, v.direction, f"{v.value:g}", v.unit, v.why] for n, v in gate.limits.items()],
            )
        )
    if gate.rates:
        rates = gate.rates
        stdout.print(f"false alarms {rates.false_alarm:g} per {rates.per}; power {rates.power:g} where {rates.effect}", markup=False)
        stdout.print(f"measured by {rates.measured_by}", markup=False)
    stdout.print(f"plants {', '.join(gate.plants)}", markup=False)
    stdout.print(f"records {', '.join(state.kill_records + state.run_records) or 'none'}", markup=False)


@app.command()
def coverage(evidence: Directory = None, json: Json = False) -> None:
    """How many gates are in which state, computed from the ledger."""
    from spec.coverage import tally

    spec, states = _states(evidence)
    counts = tally(states)
    document = {"spec": spec.version, "counts": counts, "gates": {g: {"state": s.state, "reason": s.reason} for g, s in states.items()}}
    if not emit(document, json):
        stdout.print(table(f"Spec {spec.version}", ["state", "gates"], [[k, v] for k, v in counts.items()]))
        for gate_id, state in states.items():
            if state.state not in ("discharged", "proven"):
                stdout.print(f"{gate_id}: {state.state}: {state.reason}", markup=False)


@app.command()
def prove(
    gate_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Gates to prove; all without ids.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Folder of the record. Default: runs/<record id>.")] = None,
    json: Json = False,
) -> None:
    """Run the control and every plant, and write the kills as a record. Exit code 4 if a plant survives or a control is red."""
    from stack.museum import prove as prover

    def report(kill) -> None:
        colour = "green" if kill.outcome == "killed" and kill.control == "pass" else "red"
        stderr.print(
            f"[{colour}]{kill.outcome:10}[/] {kill.plant:36} {kill.gate:30} control {kill.control:7} "
            f"{kill.latency:13} {kill.seconds:4.1f} s",
            soft_wrap=True,
        )

    builder = prover.open_builder()
    directory = run_dir or Path("runs") / builder.id
    kills = prover.prove(gate_ids or (), report)
    directory.mkdir(parents=True, exist_ok=True)
    record = prover.falsification_record(kills, builder, directory)
    rows = [k.model_dump(include={"gate", "plant", "outcome", "control", "latency", "seconds", "measured", "message"}) for k in kills]
    outcomes = ("killed", "missed", "crashed", "equivalent", "awaiting")
    counts = {o: sum(k.outcome == o for k in kills) for o in outcomes}
    document = {"kills": rows, "counts": counts, "record": record.id, "run_dir": str(directory), "seconds": record.wall_s}
    if not emit(document, json):
        stdout.print(f"{record.status}: {record.end_reason}\nrecord {directory / 'metadata.json'}", markup=False)
    if not record.succeeded:
        first = next((k for k in kills if k.outcome != "killed" or k.control != "pass"), None)
        raise GateFailed(
            first.gate if first else "gates", what=record.end_reason, next_step="stack gates show ID; read the plant in stack/museum"
        )


@app.command()
def backtest(
    log: Annotated[Path, typer.Argument(help="samples.jsonl or metrics.jsonl of any run.")],
    gate: Annotated[str, typer.Option("--gate", help="Runtime gate to replay.")] = "sampling.coherence",
    seconds_per_step: Annotated[
        float | None, typer.Option("--seconds-per-step", min=0.0, help="Tells the time saved where the log does not.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay a log through a runtime gate: when would it have fired first, and what would that have saved?"""
    from contracts.backtest import replay

    outcome = replay(gate, log, seconds_per_step)
    if not emit(outcome, json):
        first, red = outcome["first_fire_step"], f"{outcome['fires']} of {outcome['records']} line(s) red"
        stdout.print(f"{gate}: {'never fires' if first is None else f'fires first at step {first}'}; {red}")
        if first is not None:
            time = "" if outcome["saved_s"] is None else f", {outcome['saved_s'] / 3600:.3g} hours"
            stdout.print(f"stopping there saves {outcome['saved_steps']} steps ({outcome['saved_frac']:.0%}{time})")
