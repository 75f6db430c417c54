"""`stack evidence`: records, the ledger, its archive and pins, and what repeats a record."""

from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated

from rich.text import Text
from typer import Argument, Option, Typer

from stackproof.cli.options import Evidence, Json, Plugins, RecordDir, Sets, without_record
from stackproof.cli.output import MARKS, emit, print_line, print_table
from stackproof.cli.paths import folder_at
from stackproof.cli.recording import print_record
from stackproof.spec.errors import IntegrityError

app = Typer(name="evidence", help="Records and the ledger.", no_args_is_help=True)


def _directory(given: Path | None) -> Path:
    from stackproof.evidence.ledgering import default_directory

    return given or default_directory()


def _existing(given: Path | None) -> Path:
    """The evidence folder. Raises UsageError if it does not exist."""
    return folder_at(
        _directory(given),
        "--evidence" if given else "the evidence folder",
        allowed="a folder with ledger.jsonl; an installed package holds none",
        next_step="give the command in a checkout, or name the folder with --evidence; "
        "stack evidence add RUN_DIR makes one",
    )


@app.command()
def add(
    run_dir: Annotated[Path, Argument(help="A folder with metadata.json.")],
    supersedes: Annotated[
        str | None, Option(help="Id of a wrong record that this one replaces.")
    ] = None,
    evidence: Evidence = None,
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
    document = {k: getattr(entry, k) for k in ("record", "seq", "sha256", "prev")}
    if not emit(document | {"dirty": record.code.dirty}, json):
        print_line(f"added {record.id} as line {entry.seq + 1}")
        if record.code.dirty:
            print_line("its code was not committed, so it cannot discharge a gate", style="yellow")


@app.command()
def show(
    record_id: Annotated[
        str, Argument(metavar="ID", help="Record id, unique prefix, or run directory.")
    ],
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Show one record."""
    from stackproof.evidence.ledgering import find

    record = find(_directory(evidence), record_id)
    if emit(record.model_dump(by_alias=True, mode="json"), json):
        return
    ending = f"  {record.kind}  {record.status}: {record.end_reason}"
    print_line(Text.assemble((record.id, "bold"), ending))
    print_line(f"claim        {record.claim}")
    print_line(f"not covered  {'; '.join(record.not_covered)}")
    print_line(f"code         {record.code.commit}{' (dirty)' if record.code.dirty else ''}")
    print_line(f"command      {' '.join(record.command)}")
    rows = [
        [n, m.value, m.unit, m.n or "", m.stderr or ""] for n, m in sorted(record.metrics.items())
    ]
    print_table("Metrics", ["name", "value", "unit", "n", "stderr"], rows)
    if record.gates:
        rows = [[g.id, MARKS[g.verdict], g.checks, g.message] for g in record.gates]
        print_table("Gates", ["gate", "verdict", "looks", "message"], rows)
    if record.kills:
        columns = ("plant", "gate", "outcome", "control")
        print_table("Kills", columns, map(attrgetter(*columns), record.kills))


@app.command()
def verify(evidence: Evidence = None, json: Json = False) -> None:
    """Verify the hashes of every record, the chain of the ledger, and its pins.

    Archived records are read from git history; without history they count as not verified. Exit
    code 6 if anything differs.
    """
    from stackproof.evidence.ledgering import verify as problems_of
    from stackproof.spec.ledger import Ledger

    directory = _existing(evidence)
    problems, ledger = problems_of(directory), Ledger(directory)
    if not (lines := len(ledger.lines())):
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
        verdict = "BROKEN" if problems else hold
        print_line(f"{lines} record(s), head {ledger.head[:16]}…: {verdict}")
        if unread:
            missing = "the checkout lacks history"
            print_line(f"{unread} archived record(s) or series not verified: {missing}", "yellow")
    if problems:
        raise IntegrityError(
            "the evidence does not verify: " + "; ".join(problems[:5]),
            next_step="restore evidence/ from git, or name another folder with --evidence",
        )


@app.command()
def repair(evidence: Evidence = None, json: Json = False) -> None:
    """Remove the incomplete last line of ledger.jsonl and of archive.jsonl, as a power failure
    leaves it, and print what was removed.

    Nothing else is changed: a complete line is never removed. Give the command that wrote the line
    again afterwards.
    """
    from stackproof.evidence import ledgering

    directory = _existing(evidence)
    removed = ledgering.repair(directory)
    lines = [
        {"file": name, "bytes": len(line), "line": line.decode("utf-8", "backslashreplace")}
        for name, line in removed.items()
    ]
    if not emit({"folder": str(directory), "removed": lines}, json):
        for row in lines:
            print_line(f"removed {row['bytes']} byte(s) from {row['file']}: {row['line']}")
        if not lines:
            print_line("no incomplete line; nothing was changed")


@app.command()
def archive(
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Only list the records that stay, with the reason, "
            "and those that would be archived.",
        ),
    ] = False,
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Archive records and large series that are not needed in the tree; git history keeps them.

    These stay: records of released models, records cited by a file of the tree, runs that did not
    succeed, the records that determine the state of each gate, one record of each kind, and the
    parents and data sets of all these. The others are removed, and so is each series above 256 KiB
    of a record that stays: a line in archive.jsonl holds the commit and the sha256 of the files.
    `show`, `verify` and the integrity check read them from history.
    Nothing is committed. A call that was killed is finished by the next one.
    Exit code 6 if the folder differs from its commit, or if the clone lacks history.
    """
    from stackproof.evidence import archiving

    directory = _existing(evidence)
    plan = archiving.plan(directory) if dry_run else archiving.archive(directory)
    leaving = [line.record for line in plan.lines if line.whole]
    series = [f"{x.record}/{name}" for x in plan.lines if not x.whole for name in x.files]
    document = {"dry_run": dry_run, "archived": leaving, "archived_series": series}
    document |= {"bytes": plan.n_bytes, "kept": plan.kept}
    if emit(document, json):
        return
    print_table(f"{len(plan.kept)} record(s) stay", ["record", "why"], plan.kept.items())
    for name in (*leaving, *series):
        print_line(name)
    done = "would be archived" if dry_run else "archived; commit the folder"
    print_line(f"{len(leaving)} record(s), {len(series)} series, {plan.n_bytes} bytes, {done}")


@app.command()
def pin(
    key: Annotated[Path, Option(help="OpenSSH key, or a public key that ssh-agent holds.")],
    signer: Annotated[str, Option(help="Name of the key in evidence/allowed_signers.")],
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Sign the ledger as it is now, with ssh-keygen, and append the pin to pins.jsonl.

    From then on every ledger that does not begin with the pinned lines fails the integrity check.
    """
    from stackproof.evidence import pinning

    signed = pinning.pin(_existing(evidence), key, signer)
    if not emit(signed.model_dump(), json):
        print_line(f"pinned {signed.pin.size} line(s), head {signed.pin.head[:16]}…, by {signer}")


@app.command()
def inclusion(
    record_id: Annotated[str, Argument(metavar="ID", help="Id of a record.")],
    out: Annotated[Path, Option(help="File to write.")] = Path("inclusion.json"),
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Write the proof that a record is in the newest pinned ledger.

    It holds the line, the pin with its signature, and the hashes between them.
    """
    from stackproof.evidence import pinning
    from stackproof.spec.canonical import canonical_json
    from stackproof.spec.files import write_atomically

    document = pinning.inclusion(_existing(evidence), record_id).model_dump(mode="json")
    write_atomically(out, canonical_json(document) + b"\n")
    if not emit(document, json):
        print_line(f"wrote {out}: {record_id} is line {document['index'] + 1}")


@app.command("check-inclusion")
def check_inclusion(
    proof: Annotated[Path, Argument(help="The file that stack evidence inclusion has written.")],
    allowed_signers: Annotated[Path, Option(help="File of OpenSSH with the allowed signers.")],
    json: Json = False,
) -> None:
    """Verify a proof of inclusion, without the ledger. Exit code 6 if it does not hold."""
    from stackproof.evidence import pinning

    entry = pinning.check_inclusion(proof, allowed_signers)
    if not emit(entry.model_dump(), json):
        print_line(f"{entry.record}, sha256 {entry.sha256}, is line {entry.seq + 1}")


@app.command()
def diff(
    a: Annotated[str, Argument(help="Record id or run directory.")],
    b: Annotated[str, Argument(help="Record id or run directory.")],
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Show the fields in which two records differ, without ids and times."""
    from stackproof.evidence.ledgering import differences, find

    directory = _directory(evidence)
    found = differences(find(directory, a), find(directory, b))
    if not emit({"a": a, "b": b, "differences": found}, json):
        rows = map(itemgetter("key", "a", "b"), found)
        print_table(f"{len(found)} difference(s)", ["field", a, b], rows)


@app.command()
def rerun(
    record_id: Annotated[
        str,
        Argument(metavar="ID", help="Id or run directory of a record of training or of a trace."),
    ],
    plugin: Plugins = None,
    run_dir: RecordDir = None,
    evidence: Evidence = None,
    json: Json = False,
) -> None:
    """Repeat the training run or the trace of a record, and compare weights by hash and figures by
    value.

    Exit code 6 if they differ.
    """
    from stackproof.cli.console import ProgressReporter
    from stackproof.cli.rerun import rerun_trace, series_of_run
    from stackproof.evidence.ledgering import find, is_run
    from stackproof.replay.rerun import rerun as again
    from stackproof.spec.ledger import Ledger

    record = find(_directory(evidence), record_id)
    reporter = ProgressReporter(quiet=json, next_later=True)
    if record.kind in ("trace", "compare"):
        given, accepted = Path(record_id), Ledger(_directory(evidence)).series
        read = partial(series_of_run, given) if is_run(given) else accepted
        outcome = rerun_trace(record, read, run_dir)
    else:
        from stackproof.data import plugins

        with plugins.permitted(plugin or (), origin=f"record {record.id}"):
            outcome = again(record, run_dir, reporter)
    if not emit(outcome, json):
        rows = [
            [c["what"], *(str(c[k])[:20] for k in ("recorded", "now")), c["equal"]]
            for c in outcome["compared"]
        ]
        print_table("Re-run", ["what", "recorded", "now", "equal"], rows)
    if not outcome["ok"]:
        raise IntegrityError(
            "the re-run differs from the record",
            value=outcome["run_dir"],
            next_step="stack evidence diff ID RUN_DIR",
        )
    reporter.show_next()


@app.command("certify-resume")
def certify_resume(
    recipe: Annotated[str, Argument(help="Recipe to run in small.")] = "pocket",
    steps: Annotated[int, Option(help="Optimizer steps of each run.")] = 60,
    kills: Annotated[
        int, Option(help="Number of SIGKILLs at random moments in the second run.")
    ] = 3,
    nproc: Annotated[
        int, Option(min=1, help="Processes of each run; a kill is of one of them.")
    ] = 1,
    resume_nproc: Annotated[
        int | None,
        Option(min=1, help="Processes after each kill, if not --nproc: compares losses, not bits."),
    ] = None,
    set_: Sets = None,
    run_dir: Annotated[
        Path | None,
        Option(help="Folder for both runs and the certificate.", callback=without_record),
    ] = None,
    json: Json = False,
) -> None:
    """Train once without interruption and once through SIGKILLs, compare the weights byte for byte,
    and write a record of kind resume.
    """
    from stackproof.recipes import recipe as named
    from stackproof.replay.certificate import Processes, certify

    record, directory = certify(
        named(recipe),
        steps=steps,
        kills=kills,
        sets=tuple(set_ or ()),
        run_dir=run_dir,
        processes=Processes(nproc, resume_nproc or nproc),
    )
    document = {"status": record.status, "metrics": {n: m.value for n, m in record.metrics.items()}}
    ending = lambda document: print_line(f"{record.status}: {record.end_reason}")  # noqa: E731
    print_record(record, directory, document, json, ending)
    if not record.succeeded:
        raise IntegrityError(
            f"the resumed run is not the uninterrupted one: {record.end_reason}",
            value=str(directory),
            next_step="stack evidence show " + str(directory),
        )
