"""Gate of suites: each answer is what the model gives to its question alone, and is judged as it
stands.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from stackproof.contracts.drawn import DrawOptions, follow, problems
from stackproof.contracts.gate import Verdict, decide, decides, first_of, worst
from stackproof.contracts.subject import Subject, SuiteAnswer, offered

# What a suite that does not state them has: docs/audits.md.
TEMPLATE, STOPS, MAX_NEW_TOKENS = "> {prompt} / <", (" / >", "\n>", "\n\n\n"), 64


class Question(NamedTuple):
    """A prompt of a suite, as its file has it."""

    domain: str
    prompt: str
    text: str


@decides("evaluation.answers")
def answers(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Every question of the suite's file is put once, in its order, as template plus question; each
    answer is the greedy continuation of that text alone, cut at the first stop text; its verdict is
    that of the checks on this text; the counts of the record are those of the answers.

    The file is read here, and each continuation is followed by one full forward.
    """
    found = subject.answered
    given = list(found.answers)
    suite = tomllib.loads(Path(found.suite_file).read_text("utf-8"))
    questions = [
        Question(d["name"], p["id"], p["text"]) for d in suite["domain"] for p in d["prompts"]
    ]
    wrong = []
    if [(a.domain, a.prompt) for a in given] != [(q.domain, q.prompt) for q in questions]:
        wrong.append(f"{len(given)} answers are not those to the {len(questions)} questions")
    options = DrawOptions(
        suite.get("max_new_tokens", MAX_NEW_TOKENS), eos_id=found.tokenizer.eos_id
    )
    gaps, rows = [0.0], []
    for question, answer in zip(questions, given):
        asked = suite.get("template", TEMPLATE).replace("{prompt}", question.text)
        decoded = found.tokenizer.decode(list(answer.ids))
        drawn = follow(
            found.last_logits,
            found.tokenizer,
            asked,
            answer.ids,
            decoded,
            options,
            None,
            found.max_length,
        )
        gaps += drawn.distances
        encoding = found.tokenizer.encode(asked)
        prompt_ids = [found.tokenizer.eos_id, *encoding.ids]
        cut = len(prompt_ids) > found.max_length
        lost = len(prompt_ids) - max(1, found.max_length // 2) if cut else 0
        ended = len(answer.ids) < options.max_new_tokens
        rows += _rows_read(prompt_ids, answer.ids, ended, found.max_length)
        faults = list(found.faults(question.prompt, answer.text))
        if why := [
            *problems(drawn, limits),
            *(["the model was not given template and question"] if answer.asked != asked else []),
            *(
                ["the tokens and characters that the prompt lost are others"]
                if (answer.lost_prompt_tokens, answer.dropped_prompt_chars)
                != (lost, encoding.dropped_chars)
                else []
            ),
            *(["the text is not the answer"] if answer.text != _cut(decoded, suite) else []),
            *(
                ["the verdict is not that of its text"]
                if list(answer.faults) != faults or answer.passed == bool(faults)
                else []
            ),
        ]:
            wrong.append(f"{answer.prompt}: {why[0]}")
    if [list(row) for row in found.rows] != rows:
        wrong.append("the model was given other rows than template and question")
    if (metrics := offered(lambda: found.metrics)) is not None:
        wrong += _miscounted(given, questions, metrics)
        wrong += _lost_rounds(found.every_answer, found.rounds)
    return decide(
        len(wrong) <= limits.wrong_max,
        first_of(wrong),
        wrong=len(wrong),
        questions=len(questions),
        largest_gap=worst(gaps),
    )


def _rows_read(
    prompt_ids: list[int], ids: Sequence[int], ended: bool, max_length: int
) -> Iterator[list[int]]:
    """The rows of more than one token that a model with a cache reads for an answer: the prompt,
    and the last half of the context each time that it is full. `ended`: by an end-of-text token.
    """
    tokens, start, read = [*prompt_ids, *ids], 0, -1
    for at in range(len(prompt_ids), len(tokens) + ended):
        if at - start > max_length:
            start = at - max(1, max_length // 2)
        if start != read and at - start > 1:
            yield tokens[start:at]
        read = start


def _cut(text: str, suite: Mapping[str, Any]) -> str:
    """A text up to the first stop text, stripped."""
    for stop in suite.get("stop", STOPS):
        text = text.split(stop, 1)[0]
    return text.strip()


def _lost_rounds(
    every: Sequence[SuiteAnswer], rounds: Mapping[int, Mapping[str, int]]
) -> list[str]:
    """Steps whose passes by domain are not those of their answers."""
    passes: dict[int, dict[str, int]] = {}
    for answer in every:
        of_step = passes.setdefault(answer.step, {})
        of_step[answer.domain] = of_step.get(answer.domain, 0) + answer.passed
    return [
        f"the passes of step {step} are not those of its answers"
        for step, expected in passes.items()
        if rounds.get(step) != expected
    ]


def _miscounted(
    given: Sequence[SuiteAnswer], questions: Sequence[Question], metrics: Mapping[str, float]
) -> list[str]:
    """Numbers of the record that are not those of the answers."""
    passes = {q.domain: 0 for q in questions}
    for answer in given:
        passes[answer.domain] = passes.get(answer.domain, 0) + answer.passed
    expected = {f"passes_{name}": n for name, n in passes.items()}
    expected |= {"passes": sum(passes.values()), "breadth": sum(n > 0 for n in passes.values())}
    return [
        f"{name} is {metrics.get(name)} in the record, {n} of the answers"
        for name, n in expected.items()
        if metrics.get(name) != n
    ]
