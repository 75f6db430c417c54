"""Audits of what a model can do: a suite's prompts asked one by one, judged by machine,
with room for a person's grade.

Breadth is the number of domains in which at least one prompt passes.
Over the steps of a run it is a sign of convergence: see `standstill`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stackproof.evaluate.sampling import generate
from stackproof.evaluate.suite import Suite
from stackproof.spec.errors import DataError

AFTER = 2  # audits that must follow the widest one before breadth is said to stand still


@dataclass(frozen=True)
class Answer:
    """One prompt at one step. `faults` are the machine's, empty where it passes; `grade` is a
    person's, of whatever scale, or None.
    """

    step: int
    domain: str
    prompt: str
    asked: str
    text: str
    passed: bool
    faults: tuple[str, ...]
    lost_prompt_tokens: int
    dropped_prompt_chars: int
    grade: float | None = None


def audit(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    step: int,
    tell: Callable[[str], None] = lambda prompt: None,
) -> list[Answer]:
    """Ask every prompt, greedily: nothing is drawn, so the same weights give the same answers.

    A context that is too short is cut as in all sampling; `lost_prompt_tokens` counts what of the
    prompt the model has not read. `tell` hears the id of every prompt after it was asked.
    """
    answers = []
    for domain in suite.domain:
        for prompt in domain.prompts:
            asked = suite.asked(prompt)
            encoding = tokenizer.encode(asked)
            ids = [tokenizer.eos_id, *encoding.ids]
            new = generate(
                model,
                ids,
                max_new_tokens=suite.max_new_tokens,
                temperature=0.0,
                eos_id=tokenizer.eos_id,
            )
            text = suite.cut(tokenizer.decode(new))
            faults = tuple(prompt.faults(text))
            lost = (
                max(0, len(ids) - model.cfg.max_seq_len // 2)
                if len(ids) > model.cfg.max_seq_len
                else 0
            )
            answers.append(
                Answer(
                    step,
                    domain.name,
                    prompt.id,
                    asked,
                    text,
                    not faults,
                    faults,
                    lost,
                    encoding.dropped_chars,
                )
            )
            tell(prompt.id)
    return answers


def breadth(answers: Iterable[Answer]) -> dict[str, int]:
    """Passes by domain, in the order of the suite; breadth is how many of them are above 0."""
    passes: Counter[str] = Counter()
    for answer in answers:
        passes[answer.domain] += answer.passed
    return dict(passes)


def graded(answers: Sequence[Answer], grades: Path) -> list[Answer]:
    """Answers with the grades that a person has put into an earlier file of answers.

    Raises DataError for a grade of another text: what was graded is not what is said now.
    """
    known = {
        (line["step"], line["prompt"]): line
        for line in read_answers(grades)
        if line["grade"] is not None
    }
    found = []
    for answer in answers:
        line = known.pop((answer.step, answer.prompt), None)
        if line is not None and line["text"] != answer.text:
            raise DataError(
                f"{grades} grades another answer to {answer.prompt} at step {answer.step}",
                value=repr(line["text"][:60]),
                allowed=repr(answer.text[:60]),
                next_step="grade the answers of this checkpoint, or leave --grades out",
            )
        found.append(answer if line is None else replace(answer, grade=line["grade"]))
    if known:
        step, prompt = next(iter(known))
        raise DataError(
            f"{grades} grades {prompt} at step {step}, which is not asked here",
            next_step="give the suite and run of that file",
        )
    return found


def to_lines(answers: Iterable[Answer]) -> bytes:
    """One JSON object per line, as `audits.jsonl` holds them."""
    return b"".join(json.dumps(asdict(a), ensure_ascii=False).encode() + b"\n" for a in answers)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an `audits.jsonl`.
    Raises DataError for one that is no answer, or whose grade is no number.
    """
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise DataError(
            f"cannot read the answers {path}: {e}",
            allowed="the audits.jsonl of an audit",
            next_step="correct the file",
        ) from e
    for number, line in enumerate(lines, 1):
        fields = set(line) if isinstance(line, dict) else set()
        grade = line.get("grade") if fields else None
        if not {"step", "domain", "prompt", "text", "passed"} <= fields or not (
            grade is None or type(grade) in (int, float)
        ):
            raise DataError(
                f"{path}, line {number}: no answer with a grade that is a number or null",
                next_step="correct the line",
            )
    return lines


@dataclass(frozen=True)
class Standstill:
    """Since which step breadth has not grown, how wide it was there, how many audits followed, and
    what was lost again by the last.
    """

    step: int
    breadth: int
    audits_since: int
    lost: tuple[str, ...]


def standstill(rounds: Mapping[int, Mapping[str, int]]) -> Standstill | None:
    """Where breadth came to stand still, of passes by domain by step; None while fewer than AFTER
    audits have followed its widest.

    The first step of the greatest breadth counts. What was passed there and is not passed at the
    last step is `lost`: a model that forgets stands still as well, but has not converged. Raises
    DataError if the rounds are of other domains.
    """
    steps = sorted(rounds)
    if len({frozenset(rounds[s]) for s in steps}) > 1:
        raise DataError(
            "audits of different domains have no common breadth",
            next_step="compare audits of one suite",
        )
    wide = {s: sum(n > 0 for n in rounds[s].values()) for s in steps}
    if not steps:
        return None
    best = max(steps, key=lambda s: (wide[s], -s))
    after = len(steps) - 1 - steps.index(best)
    lost = tuple(d for d, n in rounds[best].items() if n and not rounds[steps[-1]][d])
    return Standstill(best, wide[best], after, lost) if after >= AFTER else None


def by_step(answers: Iterable[Answer]) -> dict[int, dict[str, int]]:
    """Passes by domain by step."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.step, []).append(answer)
    return {step: breadth(found[step]) for step in sorted(found)}
