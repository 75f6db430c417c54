"""`stack evaluate --suite`: a suite of prompts asked of one checkpoint or of
all that a run still has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stackproof.cli.models import Opened, open_model
from stackproof.cli.output import emit, stderr, stdout, table
from stackproof.cli.paths import folder_at, model_at
from stackproof.spec.errors import DataError

CLAIM = "Asked greedily, these weights gave these answers, and the suite's checks judged them so."
NOT_COVERED = (
    "other prompts, other words for the same question",
    "anything that sampling at a temperature would say",
)


def audit_models(
    model: Path,
    *,
    suite: str,
    tokenizer: Path | None,
    every_checkpoint: bool,
    earlier: Sequence[Path],
    grades: Path | None,
    run_dir: Path | None,
    json: bool,
) -> None:
    """Ask, judge, write a record with `audits.jsonl` beside it,
    and say since which step breadth stands still.
    """
    from stackproof.evaluate import audit
    from stackproof.evaluate.suite import load_suite, suite_file
    from stackproof.spec.building import artefact, write_atomically

    for directory in earlier:
        folder_at(
            directory,
            "--earlier",
            allowed="the folder of an audit of this run",
            next_step="leave it out, or name the --run-dir of one",
        )
    file = suite_file(suite)
    made, folders = load_suite(file), _folders(model) if every_checkpoint else [model]
    suite_input, answers, steps = artefact(file.resolve(), root=_root(file), name="suite"), [], []
    builder = None
    for folder in folders:
        opened = open_model(folder, tokenizer)
        builder = builder or _builder(opened, suite_input)
        builder.inputs.append(artefact(opened.folder / "model.safetensors", root=opened.run_dir))
        step = int(opened.state["step"])
        with _progress(f"asking {opened.folder}", sum(len(d.prompts) for d in made.domain)) as tell:
            answers += audit.audit(opened.model, opened.tokenizer, made, step=step, tell=tell)
        steps.append(step)
    answers = audit.graded(answers, grades) if grades else answers
    last = [a for a in answers if a.step == max(steps)]
    rounds = dict(
        sorted((_earlier(earlier, builder, suite_input.sha256) | audit.by_step(answers)).items())
    )
    document = _measured(builder, made, last, rounds, audit.standstill(rounds), audit.breadth(last))
    directory = run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "audits.jsonl", audit.to_lines(answers))
    record = builder.finish(
        directory,
        status="completed",
        end_reason="asked every prompt",
        exit_code=0,
        series=("audits.jsonl",),
    )
    document |= {
        "suite": made.name,
        "checkpoint": str(opened.folder),
        "record": record.id,
        "run_dir": str(directory),
    }
    if not emit(document, json):
        _show(document)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, one line elsewhere."""
    if not stderr.is_terminal:
        stderr.print(what, style="dim", markup=False)
        yield lambda prompt: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda prompt: bar.advance(task)


def _root(file: Path) -> Path:
    """What the path of a suite is told from: the installed code for one that comes along."""
    from stackproof.spec import ROOT

    return ROOT if file.resolve().is_relative_to(ROOT) else Path.cwd()


def _folders(model: Path) -> list[Path]:
    """Step folders of a run, in the order of their steps."""
    from stackproof.train import checkpoint

    root = checkpoint.find(model_at(model)).parent
    return sorted(p for p in root.glob("step-*") if (p / "manifest.json").is_file())


def _builder(opened: Opened, suite_input: Any) -> Any:
    from stackproof.spec.building import RecordBuilder, artefact
    from stackproof.spec.gates import load_spec
    from stackproof.spec.provenance import environment

    builder = RecordBuilder(
        kind="evaluate",
        spec=load_spec(),
        config=opened.cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        environment=environment(),
        parents=(opened.state["record"],),
    )
    builder.inputs = [suite_input, artefact(opened.run_dir / "tokenizer.json", root=opened.run_dir)]
    return builder


def _earlier(
    directories: Sequence[Path], builder: Any, suite_sha256: str
) -> dict[int, dict[str, int]]:
    """Passes by domain by step of earlier audits of the same run by the same suite."""
    from stackproof.evaluate import audit
    from stackproof.spec.canonical import sha256_file
    from stackproof.spec.records import read_record

    found: dict[int, dict[str, int]] = {}
    for directory in directories:
        record, path = read_record(directory / "metadata.json"), directory / "audits.jsonl"
        same = {i.name: i.sha256 for i in record.inputs}.get(
            "suite"
        ) == suite_sha256 and record.parents == tuple(builder.parents)
        if record.kind != "evaluate" or not same:
            raise DataError(
                f"{directory} is no audit of this run by this suite",
                value=f"{record.kind} of {', '.join(record.parents) or 'no run'}",
                allowed=(
                    f"an audit of {builder.parents[0]} with the suite of sha256 "
                    f"{suite_sha256[:12]}…"
                ),
                next_step="leave it out, or audit with the suite it was made with",
            )
        if {s.path: s.sha256 for s in record.series}.get("audits.jsonl") != sha256_file(path):
            raise DataError(
                f"{path} is not what its record was made with",
                next_step="restore it, or leave --earlier out; grades go into a copy",
            )
        for line in audit.read_answers(path):
            passes = found.setdefault(line["step"], {})
            passes[line["domain"]] = passes.get(line["domain"], 0) + bool(line["passed"])
    return found


def _measured(
    builder: Any, suite: Any, last: list, rounds: dict, still: Any, passes: dict[str, int]
) -> dict[str, Any]:
    """The document, its numbers stated in the record as well.
    Answers are those of the last step.
    """
    n = {d.name: len(d.prompts) for d in suite.domain}
    wide = sum(p > 0 for p in passes.values())
    builder.metric("breadth", wide, "domains", n=len(n), better="higher")
    builder.metric("passes", sum(passes.values()), "prompts", n=len(last), better="higher")
    for name, count in passes.items():
        builder.metric(f"passes_{name}", count, "prompts", n=n[name], better="higher")
    builder.metric("step", last[0].step, "steps")
    given = [a.grade for a in last if a.grade is not None]
    if given:
        builder.metric(
            "mean_grade",
            sum(given) / len(given),
            "the grader's scale",
            n=len(given),
            better="higher",
        )
    if still:
        builder.metric("breadth_stands_still_since", still.step, "steps", n=len(rounds))
    return {
        "breadth": wide,
        "domains": {name: {"passes": count, "prompts": n[name]} for name, count in passes.items()},
        "step": last[0].step,
        "rounds": [
            {"step": s, "breadth": sum(p > 0 for p in r.values()), "domains": r}
            for s, r in rounds.items()
        ],
        "stands_still": vars(still) if still else None,
        "answers": [vars(a) for a in last],
    }


def _show(document: dict[str, Any]) -> None:
    for answer in document["answers"]:
        verdict = "pass" if answer["passed"] else "fail: " + "; ".join(answer["faults"])
        text = " ".join(answer["text"].split())
        stdout.print(
            f"{answer['domain']}/{answer['prompt']}  {verdict}",
            style="green" if answer["passed"] else "red",
            markup=False,
        )
        stdout.print(f"  {text[:160]}", markup=False)
    lost = sum(a["lost_prompt_tokens"] > 0 for a in document["answers"])
    if lost:
        stdout.print(
            f"{lost} prompt(s) are longer than the context: the model has not read their beginning",
            style="yellow",
        )
    rows = [[name, d["passes"], d["prompts"]] for name, d in document["domains"].items()]
    stdout.print(
        table(
            f"Step {document['step']}: breadth {document['breadth']} of {len(rows)}",
            ["domain", "passes", "prompts"],
            rows,
        )
    )
    if len(document["rounds"]) > 1:
        stdout.print(
            table(
                "Over the run",
                ["step", "breadth"],
                [[r["step"], r["breadth"]] for r in document["rounds"]],
            )
        )
        still = document["stands_still"]
        since = (
            f"breadth stands still at {still['breadth']} since step {still['step']}"
            if still
            else "breadth does not stand still yet"
        )
        stdout.print(
            since
            + (f"; lost again: {', '.join(still['lost'])}" if still and still["lost"] else ""),
            markup=False,
        )
    stdout.print(
        f"record {document['run_dir']}/metadata.json  ({document['record']})", markup=False
    )
