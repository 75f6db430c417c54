"""`stack evidence add | show | verify | archive | diff | rerun | certify-resume`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from stackproof.cli.output import MARKS, Json, emit, stdout, table
from stackproof.cli.paths import folder_at
from stackproof.cli.recording import RecordDir, print_record, without_record
from stackproof.spec.errors import IntegrityError

app = typer.Typer(help="Records and the ledger.", no_args_is_help=True)
Directory = Annotated[
    Path | None,
    typer.Option("--evidence", help="Evidence folder. Default: ./evidence, else the checkout's."),
]


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="evidence")


def _directory(given: Path | None) -> Path:
    from stackproof.evidence.ledgering import default_directory

    return given or default_directory()


@app.command()
def add(
    run_dir: Annotated[Path, typer.Argument(help="A folder with metadata.json.")],
    supersedes: Annotated[
        str | None,
        typer.Option("--supersedes", help="Id of a wrong record that this one replaces."),
    ] = None,
    evidence: Directory = None,
    json: Json = False,
) -> None:
    """Copy a run's record into the evidence folder and append it to the ledger."""
    from stackproof.evidence.ledgering import accept

    folder_at(
        run_dir,
        "RUN_DIR",
        allowed="a folder with metadata.json",
        next_step="give the folder of a run, an evaluation or a proof",
    )
    record, entry = accept(run_dir, _directory(evidence), supersedes=supersedes)
    if not emit(
        {
            "record": record.id,
            "seq": entry.seq,
            "sha256": entry.sha256,
            "prev": entry.prev,
            "dirty": record.code.dirty,
        },
        json,
    ):
        stdout.print(f"added {record.id} as line {entry.seq + 1}")
        if record.code.dirty:
            stdout.print(
                "its code was not committed, so it cannot discharge a gate", style="yellow"
            )


@app.command()
def show(
    record_id: Annotated[
        str, typer.Argument(metavar="ID", help="Record id, unique prefix, or run directory.")
    ],
    evidence: Directory = None,
    json: Json = False,
) -> None:
    """Show one record."""
    from stackproof.evidence.ledgering import find

    record = find(_directory(evidence), record_id)
    if emit(record.model_dump(by_alias=True, mode="json"), json):
        return
    stdout.print(f"[bold]{record.id}[/]  {record.kind}  {record.status}: {record.end_reason}")
    stdout.print(f"claim        {record.claim}", markup=False)
    stdout.print(f"not covered  {'; '.join(record.not_covered)}", markup=False)
    stdout.print(
        f"code         {record.code.commit}{' (dirty)' if record.code.dirty else ''}", markup=False
    )
    stdout.print(f"command      {' '.join(record.command)}", markup=False)
    rows = [
        [n, m.value, m.unit, m.n or "", m.stderr or ""] for n, m in sorted(record.metrics.items())
    ]
    stdout.print(table("Metrics", ["name", "value", "unit", "n", "stderr"], rows))
    if record.gates:
        stdout.print(
            table(
                "Gates",
                ["gate", "verdict", "looks", "message"],
                [[g.id, MARKS[g.verdict], g.checks, g.message] for g in record.gates],
            )
        )
    if record.kills:
        stdout.print(
            table(
                "Kills",
                ["plant", "gate", "outcome", "control"],
                [[k.plant, k.gate, k.outcome, k.control] for k in record.kills],
            )
        )


@app.command()
def verify(evidence: Directory = None, json: Json = False) -> None:
    """Verify the hashes of every record and the chain of the ledger.

    Archived records are read from git history; without history they count as not verified. Exit
    code 6 if anything differs.
    """
    from stackproof.evidence.ledgering import verify as problems_of
    from stackproof.spec.ledger import Ledger

    directory = _directory(evidence)
    problems = problems_of(directory)
    ledger = Ledger(directory)
    lines = len(ledger.lines())
    if lines == 0:
        problems = [*problems, f"{ledger.path} holds no line"]
    unread = len(ledger.unread()) + len(ledger.unread_series()) if not problems else 0
    document = {
        "ok": not problems and not unread,
        "records": lines,
        "not_verified": unread,
        "head": ledger.head,
        "problems": problems,
    }
    if not emit(document, json):
        hold = f"all hashes {'of the others ' if unread else ''}hold"
        stdout.print(
            f"{lines} record(s), head {document['head'][:16]}…: {'BROKEN' if problems else hold}"
        )
        if unread:
            stdout.print(
                f"{unread} archived record(s) or series not verified: the checkout lacks history",
                style="yellow",
            )
    if problems:
        raise IntegrityError(
            "the evidence does not verify: " + "; ".join(problems[:5]),
            next_step="restore evidence/ from git, or name another folder with --evidence",
        )


@app.command()
def archive(
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only list the records that stay, with the reason, "
            "and those that would be archived.",
        ),
    ] = False,
    evidence: Directory = None,
    json: Json = False,
) -> None:
    """Archive records and large series that are not needed in the tree; git history keeps them.

    These stay: records of released models, records cited by a file of the tree, runs that did not
    succeed, the records that determine the state of each gate, one record of each kind, and the
    parents and data sets of all these. The others are removed, and so is each series above 256 KiB
    of a record that stays: a line in archive.jsonl holds the commit and the sha256 of the files.
    `show`, `verify` and the integrity check read them from history.
    Nothing is committed. Exit code 6 if the folder differs from its commit, or if the clone lacks
    history.
    """
    from stackproof.evidence import archiving

    directory = _directory(evidence)
    plan = archiving.plan(directory) if dry_run else archiving.archive(directory)
    leaving = [line.record for line in plan.lines if line.whole]
    series = [f"{x.record}/{name}" for x in plan.lines if not x.whole for name in x.files]
    document = {"dry_run": dry_run, "archived": leaving, "archived_series": series}
    document |= {"bytes": plan.n_bytes, "kept": plan.kept}
    if emit(document, json):
        return
    stdout.print(
        table(
            f"{len(plan.kept)} record(s) stay",
            ["record", "why"],
            [[n, why] for n, why in plan.kept.items()],
        )
    )
    for name in (*leaving, *series):
        stdout.print(name, markup=False)
    done = "would be archived" if dry_run else "archived; commit the folder"
    stdout.print(f"{len(leaving)} record(s), {len(series)} series, {plan.n_bytes} bytes, {done}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Record id or run directory.")],
    b: Annotated[str, typer.Argument(help="Record id or run directory.")],
    evidence: Directory = None,
    json: Json = False,
) -> None:
    """Show the fields in which two records differ, without ids and times."""
    from stackproof.evidence.ledgering import differences, find

    directory = _directory(evidence)
    found = differences(find(directory, a), find(directory, b))
    if not emit({"a": a, "b": b, "differences": found}, json):
        stdout.print(
            table(
                f"{len(found)} difference(s)",
                ["field", a, b],
                [[d["key"], d["a"], d["b"]] for d in found],
            )
        )


@app.command()
def rerun(
    record_id: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Id or run directory of a record of training or of a trace."
        ),
    ],
    run_dir: RecordDir = None,
    evidence: Directory = None,
    json: Json = False,
) -> None:
    """Repeat the training run or the trace of a record, and compare weights by hash and figures by
    value.

    Exit code 6 if they differ.
    """
    from stackproof.cli.console import ProgressReporter
    from stackproof.cli.rerun import rerun_trace
    from stackproof.evidence.archiving import folder_of
    from stackproof.evidence.ledgering import find
    from stackproof.replay.rerun import rerun as again

    record = find(_directory(evidence), record_id)
    if record.kind in ("trace", "compare"):
        given = Path(record_id)
        with (
            nullcontext(given)
            if given.is_dir()
            else folder_of(_directory(evidence), record.id) as folder
        ):
            outcome = rerun_trace(record, folder, run_dir)
    else:
        outcome = again(record, run_dir, ProgressReporter(quiet=json))
    if not emit(outcome, json):
        stdout.print(
            table(
                "Re-run",
                ["what", "recorded", "now", "equal"],
                [
                    [c["what"], *(str(c[k])[:20] for k in ("recorded", "now")), c["equal"]]
                    for c in outcome["compared"]
                ],
            )
        )
    if not outcome["ok"]:
        raise IntegrityError(
            "the re-run differs from the record",
            value=outcome["run_dir"],
            next_step="stack evidence diff ID RUN_DIR",
        )


@app.command("certify-resume")
def certify_resume(
    recipe: Annotated[str, typer.Argument(help="Recipe to run in small.")] = "pocket",
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps of each run.")] = 60,
    kills: Annotated[
        int,
        typer.Option("--kills", help="Number of SIGKILLs at random moments in the second run."),
    ] = 3,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: a.b=v. Repeatable.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", help="Folder for both runs and the certificate.", callback=without_record
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train once without interruption and once through SIGKILLs, compare the weights byte for byte,
    and write a record of kind resume.
    """
    from stackproof.recipes import recipe as named
    from stackproof.replay.certificate import certify

    record, directory = certify(
        named(recipe), steps=steps, kills=kills, sets=tuple(set_ or ()), run_dir=run_dir
    )
    document = {"status": record.status, "metrics": {n: m.value for n, m in record.metrics.items()}}
    print_record(
        record,
        directory,
        document,
        json,
        lambda document: stdout.print(f"{record.status}: {record.end_reason}"),
    )
    if not record.succeeded:
        raise IntegrityError(
            "the resumed run differs from the uninterrupted one",
            value=str(directory),
            next_step="stack evidence show " + str(directory),
        )
