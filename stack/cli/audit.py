"""`stack evaluate --suite`: run a suite of prompts on one checkpoint or all checkpoints of a
run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from stackproof.cli.load_model import OpenedModel, open_model
from stackproof.cli.output import note, print_line, print_table, progress_bar, stderr
from stackproof.cli.paths import folder_at, model_at
from stackproof.cli.recording import Claim, OpenRecord, open_record
from stackproof.spec.errors import DataError

CLAIM = Claim(
    "evaluate",
    "With greedy decoding, these weights gave these answers, with these verdicts of the checks.",
    (
        "other prompts, other wordings of the same question",
        "answers sampled at a temperature above 0",
    ),
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
    """Run and judge the suite, report the plateau of breadth over steps, and write a record with
    `audits.jsonl`.
    """
    from stackproof.contracts.subject import Subject
    from stackproof.evaluate import audit
    from stackproof.evaluate.suite import load_suite, suite_file
    from stackproof.spec.building import artefact
    from stackproof.spec.files import write_atomically
    from stackproof.subject.commands import Answered, rows_read

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
    record = None
    for folder in folders:
        opened = open_model(folder, tokenizer)
        record = record or _open(opened, suite_input, run_dir, json)
        record.input(opened.weights_file, opened.run_dir)
        step, reader = int(opened.state["step"]), opened.model
        n_prompts = sum(len(d.prompts) for d in made.domain)
        with _progress(f"asking {opened.folder}", n_prompts) as tell, rows_read(reader) as rows:
            given = audit.audit(reader, opened.tokenizer, made, step=step, tell=tell)
        shown = partial(Answered, reader, opened.tokenizer, made, file, rows=rows)
        if folder != folders[-1]:  # the last one is judged with the numbers of the record
            used = opened.shown(given[0].step)
            record.judge(Subject(opened=used, answered=shown(answers=given)), step=step)
        answers += given
        steps.append(step)
    answers = audit.graded(answers, grades) if grades else answers
    last = [a for a in answers if a.step == max(steps)]
    rounds = dict(
        sorted(
            (_earlier(earlier, record.builder, suite_input.sha256) | audit.by_step(answers)).items()
        )
    )
    document = _measured(
        record.builder, made, last, rounds, audit.standstill(rounds), audit.breadth(last)
    )
    numbers = {"metrics": record.metrics, "rounds": rounds, "every_answer": answers}
    used = opened.shown(document["step"])
    record.judge(
        Subject(opened=used, answered=shown(answers=last, **numbers)), step=used.stated_step
    )
    write_atomically(record.path("audits.jsonl"), audit.to_lines(answers))
    record.series.append("audits.jsonl")
    document |= {"suite": made.name, "checkpoint": str(opened.folder)}
    record.close("ran every prompt", document, _show)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, one line otherwise."""
    if not stderr.is_terminal:
        note(what, "dim")
        yield lambda prompt: None
        return
    with progress_bar(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda prompt: bar.advance(task)


def _root(file: Path) -> Path:
    """The folder that the path of a suite is relative to: the installed code for a bundled
    suite.
    """
    from stackproof.spec import ROOT

    return ROOT if file.resolve().is_relative_to(ROOT) else Path.cwd()


def _folders(model: Path) -> list[Path]:
    """The checkpoints of a run in order."""
    from stackproof.train import checkpoint

    root = checkpoint.find(model_at(model)).parent
    return sorted(p for p in root.glob("step-*") if (p / "manifest.json").is_file())


def _open(opened: OpenedModel, suite_input: Any, run_dir: Path | None, json: bool) -> OpenRecord:
    config = opened.cfg.to_dict() | {"evaluate": {"of": "suite"}}
    parents = (opened.state["record"],)
    record = open_record(CLAIM, config, run_dir=run_dir, json=json, parents=parents)
    record.builder.inputs.append(suite_input)
    record.input(opened.run_dir / "tokenizer.json", opened.run_dir)
    return record


def _earlier(
    directories: Sequence[Path], builder: Any, suite_sha256: str
) -> dict[int, dict[str, int]]:
    """Passes by step and domain of earlier audits of the same run with the same suite."""
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
                f"{directory} is not an audit of this run with this suite",
                value=f"{record.kind} of {', '.join(record.parents) or 'no run'}",
                allowed=(
                    f"an audit of {builder.parents[0]} with the suite of sha256 "
                    f"{suite_sha256[:12]}…"
                ),
                next_step="leave it out, or audit with its suite",
            )
        if {s.path: s.sha256 for s in record.series}.get("audits.jsonl") != sha256_file(path):
            raise DataError(
                f"{path} was changed since it was recorded",
                next_step="restore it, or leave --earlier out; write grades into a copy",
            )
        for line in audit.read_answers(path):
            passes = found.setdefault(line["step"], {})
            passes[line["domain"]] = passes.get(line["domain"], 0) + bool(line["passed"])
    return found


def _measured(
    builder: Any, suite: Any, last: list, rounds: dict, still: Any, passes: dict[str, int]
) -> dict[str, Any]:
    """The document; its numbers are also written into the record. Answers are those of the last
    step.
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
        "answers": [a.line() for a in last],
    }


def _show(document: dict[str, Any]) -> None:
    for answer in document["answers"]:
        verdict = "pass" if answer["passed"] else "fail: " + "; ".join(answer["faults"])
        text = " ".join(answer["text"].split())
        colour = "green" if answer["passed"] else "red"
        print_line(f"{answer['domain']}/{answer['prompt']}  {verdict}", colour)
        print_line(f"  {text[:160]}")
    if lost := sum(a["lost_prompt_tokens"] > 0 for a in document["answers"]):
        print_line(f"{lost} prompt(s) exceed the context: the beginning was cut off", "yellow")
    rows = [[name, d["passes"], d["prompts"]] for name, d in document["domains"].items()]
    title = f"Step {document['step']}: breadth {document['breadth']} of {len(rows)}"
    print_table(title, ["domain", "passes", "prompts"], rows)
    if len(document["rounds"]) > 1:
        columns = ("step", "breadth")
        print_table("Over the run", columns, map(itemgetter(*columns), document["rounds"]))
        text = "breadth is still growing, or too few audits followed its maximum"
        if still := document["stands_still"]:
            text = f"breadth has been constant at {still['breadth']} since step {still['step']}"
            text += f"; no longer passed: {', '.join(still['lost'])}" if still["lost"] else ""
        print_line(text)
