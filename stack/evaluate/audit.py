"""Audits: answers of a model to the prompts of a suite, judged by checkers, with optional human
grades.

Breadth is the number of domains with at least one passed prompt. Its plateau over the steps of a
run is a sign of convergence: see `standstill`.
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
from stackproof.spec.errors import DataError, IntegrityError
from stackproof.spec.files import read_bytes
from stackproof.spec.series import parse_series

AFTER = 2  # audits that must follow the maximum of breadth before it counts as a plateau


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt at one step. `ids` are the drawn tokens, which no file holds.
    `faults` are those found by the checkers, empty if it passes. `grade` is a human grade on any
    scale, or None.
    """

    step: int
    domain: str
    prompt: str
    asked: str
    ids: tuple[int, ...]
    text: str
    passed: bool
    faults: tuple[str, ...]
    lost_prompt_tokens: int
    dropped_prompt_chars: int
    grade: float | None = None

    def line(self) -> dict[str, Any]:
        """The answer as a line of `audits.jsonl`."""
        return {name: value for name, value in asdict(self).items() if name != "ids"}


def audit(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    step: int,
    tell: Callable[[str], None] = lambda prompt: None,
) -> list[Answer]:
    """Answer every prompt with greedy decoding, so equal weights give equal answers.

    A prompt that exceeds the context is cut as in all sampling; `lost_prompt_tokens` counts its
    tokens outside the context. `tell` is called with the id of each finished prompt.
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
                    tuple(new),
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
    """Passed prompts by domain, in the order of the suite; breadth is the number of domains above
    0.
    """
    passes: Counter[str] = Counter()
    for answer in answers:
        passes[answer.domain] += answer.passed
    return dict(passes)


def graded(answers: Sequence[Answer], grades: Path) -> list[Answer]:
    """The answers with the human grades of an earlier file of answers.

    Raises DataError for a grade of another text, or of a prompt that was not run.
    """
    known = {
        (line["step"], line["prompt"]): line
        for line in read_answers(grades)
        if line.get("grade") is not None
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
            f"{grades} grades {prompt} at step {step}, which is not part of this audit",
            next_step="use the suite and run of that file",
        )
    return found


def to_lines(answers: Iterable[Answer]) -> bytes:
    """The answers as lines of `audits.jsonl`, one JSON object each."""
    return b"".join(json.dumps(a.line(), ensure_ascii=False).encode() + b"\n" for a in answers)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an `audits.jsonl`.
    Raises DataError for a line that is not an answer, or with a grade that is not a number.
    """
    try:
        return parse_series(read_bytes(path), "audits.jsonl", origin=str(path))
    except (OSError, IntegrityError) as e:
        raise DataError(
            f"cannot read the answers {path}: {e}",
            allowed="the audits.jsonl of an audit, with a number or null as grade",
            next_step="correct the file",
        ) from e


@dataclass(frozen=True)
class Standstill:
    """A plateau of breadth: its first step, its breadth, the audits since, and the domains that
    regressed by the last audit.
    """

    step: int
    breadth: int
    audits_since: int
    lost: tuple[str, ...]


def standstill(rounds: Mapping[int, Mapping[str, int]]) -> Standstill | None:
    """The plateau of breadth, from passed prompts by domain by step; None while fewer than AFTER
    audits follow the maximum.

    The plateau begins at the first step of the maximum. Domains passed there and not at the last
    step are `lost`: a model that forgets has a plateau too, but has not converged. Raises DataError
    if the audits have different domains.
    """
    steps = sorted(rounds)
    if len({frozenset(rounds[s]) for s in steps}) > 1:
        raise DataError(
            "these audits have different domains, so their breadths cannot be compared",
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
    """Passed prompts by domain, by step."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.step, []).append(answer)
    return {step: breadth(found[step]) for step in sorted(found)}
