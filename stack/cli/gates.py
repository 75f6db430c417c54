"""`stack gates list | show | prove | mutate | backtest | repro | coverage`."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Argument, Context, Option, Typer

from stackproof.cli.ending import documented
from stackproof.cli.options import Evidence, Json, RecordDir, examples
from stackproof.cli.output import emit, note, print_line, print_table
from stackproof.cli.paths import bundle_at, file_at
from stackproof.cli.recording import Claim, open_record, print_record
from stackproof.spec.errors import GateFailed, UsageError

app = Typer(
    name="gates",
    help="Gates: what must be true, and whether it has been proven.",
    no_args_is_help=True,
)
MOMENTS = ("preflight", "runtime", "artifact")
SHARE_COLUMNS = ("", "", "share", "95 % interval")


def _states(evidence: Path | None):
    from stackproof.evidence.ledgering import default_directory
    from stackproof.spec.coverage import coverage
    from stackproof.spec.findings import FILE, read_findings
    from stackproof.spec.gates import load_spec
    from stackproof.spec.ledger import Ledger

    spec, directory = load_spec(), evidence or default_directory()
    return spec, coverage(
        spec, Ledger(directory).records(), findings=read_findings(directory / FILE)
    )


@app.command("list")
def list_(
    evidence: Evidence = None,
    runners: Annotated[
        bool, Option("--runners", help="Instead: every way of running, its gates and its events.")
    ] = False,
    json: Json = False,
) -> None:
    """All gates with their computed state."""
    from stackproof.spec.coverage import tally

    if runners:
        return _runners(json)
    spec, states = _states(evidence)
    columns = ("id", "moment", "severity", "state", "title")
    rows = [
        {"id": g.id, "moment": g.moment, "severity": g.severity, "state": states[g.id].state}
        | {"plants": list(g.plants), "title": g.title}
        for g in spec.gates.values()
    ]
    if not emit({"gates": rows, "counts": tally(states)}, json):
        cells = [[r[c] for c in columns] for r in rows]
        print_table(f"Spec {spec.version}", ("gate", *columns[1:]), cells)


def _runners(as_json: bool) -> None:
    """Every adapter, the gates of its kind by moment, and those that watch an event which it does
    not emit; these are unknown (null) without torch. Exit code 4 if there is one.
    """
    from collections import Counter

    from stackproof.contracts.adapters import ADAPTERS, Adapter
    from stackproof.spec.gates import Gate, load_spec

    def unfed(adapter: Adapter, gates: list[Gate]) -> list[dict[str, str]] | None:
        if importlib.util.find_spec("torch") is None:
            return None
        from stackproof.contracts.gate import resolve

        missing = {g.id: adapter.missing(resolve(g).events) for g in gates if g.moment == "runtime"}
        return [
            {"gate": gate, "why": f"the adapter does not emit {', '.join(events)}"}
            for gate, events in missing.items()
            if events
        ]

    spec, rows = load_spec(), []
    for adapter in ADAPTERS:
        gates = adapter.gates(spec)
        rows.append(
            {
                "runner": adapter.name,
                "verb": adapter.verb,
                "kind": adapter.kind,
                "announces": [event.__name__ for event in (*adapter.events, *adapter.rank_events)],
                "gates": [g.id for g in gates],
                "counts": dict(Counter(g.moment for g in gates)),
                "unfed": unfed(adapter, gates),
            }
        )
    if not emit({"runners": rows}, as_json):
        shown = [
            [r["verb"], r["kind"], *(r["counts"].get(m, 0) for m in MOMENTS), len(r["unfed"] or ())]
            for r in rows
        ]
        headings = ["runner", "kind", *MOMENTS, "not fed"]
        print_table(f"Runners of spec {spec.version}", headings, shown)
    if first := next(((r["runner"], m) for r in rows for m in r["unfed"] or ()), None):
        raise GateFailed(
            first[1]["gate"],
            what=f"{first[0]}: {first[1]['why']}",
            next_step="emit the event in the adapter, and list it in contracts/adapters.py",
        )


@app.command()
def show(
    gate_id: Annotated[str, Argument(metavar="ID", help="Gate id.")],
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """One gate: statement, limits with reasons, plants, state and the records it stands on."""
    spec, states = _states(evidence)
    gate, state = spec.gate(gate_id), states[gate_id]
    document = gate.model_dump(mode="json") | {"fingerprint": spec.fingerprint(gate_id)}
    if emit(document | state._asdict(), json):
        return
    print_line(Text.assemble((gate.id, "bold"), f"  {gate.title}"))
    print_line(gate.statement)
    print_line(f"{gate.moment}, {gate.severity}; state {state.state}: {state.reason}")
    print_line(f"check {gate.check}   fingerprint {document['fingerprint'][:16]}…")
    if gate.limits:
        rows = [[n, v.direction, f"{v.value:g}", v.unit, v.why] for n, v in gate.limits.items()]
        print_table("Limits", ["name", "rule", "value", "unit", "why"], rows)
    if rates := gate.rates:
        alarms = f"false alarms {rates.false_alarm:g} per {rates.per}"
        print_line(f"{alarms}; power {rates.power:g} where {rates.effect}")
        print_line(f"measured by {rates.measured_by}")
    elif gate_id in spec.certain:
        print_line(f"no rates: {spec.certain[gate_id]}")
    if gate.hint:
        print_line(f"when it is red: {gate.hint}")
    print_line(f"plants {', '.join(gate.plants)}")
    print_line(f"records {', '.join(state.kill_records + state.run_records) or 'none'}")


@app.command()
def coverage(evidence: Evidence = None, json: Json = False) -> None:
    """How many gates are in which state, computed from the ledger, and how many documented failures
    await a part of the stack.
    """
    from stackproof.spec.coverage import tally
    from stackproof.spec.failures import load_catalogue

    (spec, states), catalogue = _states(evidence), load_catalogue()
    counts, n_failures = tally(states), len(catalogue.failures)
    awaited = {f.id: f.awaiting for f in catalogue.awaiting()}
    document = {
        "spec": spec.version,
        "counts": counts,
        "gates": {g: {"state": s.state, "reason": s.reason} for g, s in states.items()},
        "failures": {"documented": n_failures, "awaiting": len(awaited), "awaits": awaited},
    }
    if not emit(document, json):
        print_table(f"Spec {spec.version}", ["state", "gates"], counts.items())
        print_line(f"{n_failures} documented failures, {len(awaited)} of them await a capability")
        for gate_id, state in states.items():
            if state.state not in ("discharged", "proven"):
                print_line(f"{gate_id}: {state.state}: {state.reason}")


@app.command()
def prove(
    gate_ids: Annotated[
        list[str] | None, Argument(metavar="[ID]...", help="Gates to prove; all without ids.")
    ] = None,
    matrix: Annotated[
        bool,
        Option("--matrix", help="Then run all gates on every plant; takes many times as long."),
    ] = False,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Run the control and every plant, and write the kills as a record.
    Exit code 4 if a plant survives or a control is red.
    """
    from stackproof.museum import prove as prover
    from stackproof.museum.collection import museum_config
    from stackproof.spec.failures import load_catalogue
    from stackproof.spec.gates import load_spec
    from stackproof.spec.margins import margins
    from stackproof.spec.records import OUTCOMES

    def report(kill) -> None:
        colour = "green" if kill.outcome == "killed" and kill.control == "pass" else "red"
        text = (
            f" {kill.plant:36} {kill.gate:30} control {kill.control:7} {kill.latency:13} "
            f"{kill.seconds:4.1f} s"
        )
        note(Text.assemble((f"{kill.outcome:10}", colour), text))

    claim = Claim("falsification", prover.CLAIM, prover.NOT_COVERED)
    opened = open_record(claim, museum_config(Path()).to_dict(), run_dir=run_dir, json=json)
    kills = prover.prove(gate_ids or (), report)
    crossed = _matrix(gate_ids or ()) if matrix else None
    record = prover.falsification_record(kills, opened.builder, opened.path(""), crossed)
    rows = [k.model_dump(exclude={"fingerprint", "plant_sha256"}) for k in kills]
    counts = {o: sum(k.outcome == o for k in kills) for o in OUTCOMES}
    awaiting = () if gate_ids else load_catalogue().awaiting()
    awaited = [{"failure": f.id, "awaits": f.awaiting} for f in awaiting]
    counts["awaiting"] += len(awaited)
    document = {"kills": rows, "counts": counts, "seconds": record.wall_s, "awaiting": awaited}
    document |= {"margins": [prover.plain(m._asdict()) for m in margins(load_spec(), kills)]}
    document |= {"matrix": crossed} if matrix else {}

    def show(document: dict) -> None:
        if awaited:
            print_line(f"{len(awaited)} failures await a capability: see stack gates coverage")
        print_line(f"{record.status}: {record.end_reason}")

    print_record(record, opened.directory, document, json, show)
    if not record.succeeded:
        first = next((k for k in kills if k.outcome != "killed" or k.control != "pass"), None)
        raise GateFailed(
            first.gate if first else "gates",
            what=record.end_reason,
            next_step="stack gates show ID; read the plant in stack/museum",
        )


def _matrix(gate_ids: tuple[str, ...] | list[str]) -> list[dict]:
    """Run all gates on every plant; print each row when it is done."""
    from stackproof.museum.matrix import matrix

    def report(row: dict) -> None:
        also = [g for g in row["red"] if g != row["gate"]]
        note(
            f"{row['plant']:36} red {len(row['red']):2} of {row['asked']}  {row['seconds']:5.1f} "
            f"s  also {', '.join(also)}"
        )

    return matrix(tuple(gate_ids), report)


@app.command(
    epilog=examples("stack gates mutate --n 50", "stack gates mutate --seed 7 --config experts")
)
def mutate(
    context: Context,
    n: Annotated[int, Option(min=1, help="Mutants to draw.")] = 300,
    seed: Annotated[
        int | None, Option(min=0, help="Seed of the draw. Default: another one each time.")
    ] = None,
    config: Annotated[
        list[str] | None,
        Option(
            help="Configuration to try mutants on. Repeatable. Default: all but compiled, which "
            "compiles the model in each trial."
        ),
    ] = None,
    jobs: Annotated[
        int | None, Option(min=1, help="Processes at once. Default: one per core.")
    ] = None,
    run_dir: RecordDir = None,
    json: Json = False,
) -> None:
    """Make small random changes in code that a run executes, one at a time, and measure how many
    the gates catch. Writes a record, with the changes that they did not catch.
    """
    import os
    import secrets

    from stackproof.museum.prove import workshop
    from stackproof.mutation import report
    from stackproof.mutation.mutate import mutate, survey
    from stackproof.mutation.scenarios import CONFIGURATIONS, DRAWN, scenarios

    names = config or list(DRAWN)
    if unknown := [name for name in names if name not in CONFIGURATIONS]:
        raise UsageError(
            "--config names no configuration of mutants",
            value=unknown[0],
            allowed=", ".join(CONFIGURATIONS),
            next_step="name one of these, or leave it out",
        )
    seed = secrets.randbelow(2**31) if seed is None else seed
    jobs = jobs or os.cpu_count() or 1
    settings = {"n": n, "seed": seed, "configurations": names}
    claim = Claim("mutation", report.CLAIM, report.NOT_COVERED)
    opened, judged = open_record(claim, settings, run_dir=run_dir, json=json), []

    def verb(arguments: Sequence[str]) -> None:
        try:
            context.find_root().command.main(
                list(arguments), prog_name="stack", standalone_mode=False
            )
        except BaseException as error:
            raise documented(error) or error from error

    with workshop() as root:
        made = scenarios(root, verb, names)
        clean = survey(made, root, jobs, lambda name: note(f"{name}: green without a mutant"))
        for one in mutate(clean, root, n, seed, jobs):
            judged.append(one)
            _note_mutant(one)
    record = report.mutation_record(judged, opened.builder, opened.path(""))
    document = {"seed": seed} | report.document(judged)
    print_record(record, opened.directory, document, json, _show_mutants)


def _note_mutant(one: Any) -> None:
    colour = {"caught": "green", "survivor": "red", "warned": "red", "statement": "yellow"}
    found = " ".join(filter(None, (one.ending.red, one.ending.moment)))
    text = f" {one.scenario:12} {one.mutant.target.removeprefix('stackproof.')}  {found}"
    note(Text.assemble((f"{one.outcome:10}", colour.get(one.outcome, "dim")), text))


def _show_mutants(document: dict) -> None:
    from stackproof.spec.mutants import KEYS, SHARES

    for row in document["unanswered"]:
        print_line(f"{row['outcome']}: {row['target']} line {row['line']}, {row['operator']}")
        print_line(row["diff"])
        found = ", ".join(row["differing"][:3]) or row["ending"].get("error", "nothing")
        print_line(f"  in {row['scenario']}: {found.splitlines()[0]}")
    for row in document["blaming"]:
        print_line(f"refused, in {row['scenario']}: {row['ending']['error'].splitlines()[0]}")
        print_line(row["diff"])
    print_table(f"Mutants, seed {document['seed']}", ["outcome", "n"], document["counts"].items())
    print_table("Caught", ["moment", "n"], document["moments"].items())
    named = [(name, "", document[name]) for name in SHARES]
    named += [(k, name, own["caught_frac"]) for k in KEYS for name, own in document[k].items()]
    rows = [
        [what, name, f"{own['k']} of {own['n']}", f"{own['low']:.0%} – {own['high']:.0%}"]
        for what, name, own in named
        if own["n"]
    ]
    print_table("Shares; by package, scenario and operator: caught_frac", SHARE_COLUMNS, rows)


@app.command()
def backtest(
    log: Annotated[Path, Argument(help="samples.jsonl or metrics.jsonl of any run.")],
    gate: Annotated[str, Option(help="Runtime gate to replay.")] = "sampling.coherence",
    seconds_per_step: Annotated[
        float | None,
        Option(min=0.0, help="Seconds per step, for the time saved, where the log has none."),
    ] = None,
    json: Json = False,
) -> None:
    """Replay a log through a runtime gate: when would it have fired first,
    and what would that have saved?
    """
    from stackproof.contracts.backtest import replay

    file_at(
        log, "LOG", allowed="JSON lines", next_step="give samples.jsonl or metrics.jsonl of a run"
    )
    outcome = replay(gate, log, seconds_per_step)
    if not emit(outcome, json):
        first, saved_s = outcome["first_fire_step"], outcome["saved_s"]
        fires = "never fires" if first is None else f"fires first at step {first}"
        print_line(f"{gate}: {fires}; {outcome['fires']} of {outcome['records']} line(s) red")
        if first is not None:
            share = f"{outcome['saved_frac']:.0%}"
            share += "" if saved_s is None else f", {saved_s / 3600:.3g} hours"
            print_line(f"stopping there saves {outcome['saved_steps']} steps ({share})")


@app.command(epilog=examples("stack gates repro runs/pocket-1/repro/runtime.finite-step-7"))
def repro(
    bundle: Annotated[Path, Argument(help="A folder of RUN/repro, or a copy of one.")],
    device: Annotated[str | None, Option(help="cpu or cuda. Default: where the run was.")] = None,
    base: Annotated[
        Path | None, Option(help="Step folder to begin from, where the bundle only names one.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay the steps that turned a gate red, from the folder alone.
    Exit code 4 if it is red again, 0 if it is not.
    """
    from stackproof.replay.replay import replay

    held, outcome = replay(bundle_at(bundle, "BUNDLE"), device=device, base=base)
    measured = dict(outcome.verdict.measured) if outcome.verdict else {}
    document = {
        "gate": held.gate,
        "step": held.step,
        "event": held.event,
        "reproduced": outcome.reproduced,
        "step_now": outcome.step,
        "same": outcome.same,
        "same_random_state": outcome.same_random_state,
        "measured": measured,
        "measured_then": held.measured,
        "replayed_from": held.base.step,
        "commit": held.code.commit,
        "message": outcome.verdict.message if outcome.reproduced else "",
    }
    emit(document, json)
    if outcome.reproduced:
        raise GateFailed(
            held.gate,
            what=f"reproduced: {outcome.verdict.message}",
            value=(
                f"{measured} at step {outcome.step}; in the run {held.measured} at step {held.step}"
            ),
            allowed=", ".join(f"{k} {v:g}" for k, v in held.limits.items()),
            next_step=f"fix it and replay again; stack gates show {held.gate}",
        )
    if not json:
        print_line(
            f"not reproduced: {held.gate} is green on this code from step {held.base.step} to "
            f"step {held.step}, where the run was red\n"
            f"  measured now {measured}\n  in the run   {held.measured}"
        )
