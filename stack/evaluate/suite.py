"""A suite of prompts by domain, and the checkers of the answers.

A suite is a TOML file; `suites/domains.toml` is bundled. Every prompt has a sample answer that
passes its checks. Reading a suite refuses checks that the sample answer fails, and checks that an
empty answer or the question passes.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, assert_never

from pydantic import Field, ValidationError, field_validator, model_validator

from stackproof.evaluate.syllables import syllables
from stackproof.patterns import MAX_ANSWER_CHARS, found, linear
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.files import read_text
from stackproof.spec.gates import Frozen
from stackproof.spec.tables import parse_toml

SUITES = Path(__file__).parent / "suites"
MAX_SUITE_BYTES = 2**20
# Of one question: checks, words in all of them, characters as the model receives it.
MAX_CHECKS, MAX_WORDS, MAX_PROMPT_CHARS = 16, 256, 2**16
# Of a command, of a suite, and of one answer; and of all answers and questions of a suite.
MAX_FLAGS, MAX_STOPS, MAX_NEW_TOKENS = 4096, 64, 4096
MAX_SUITE_TOKENS, MAX_SUITE_CHARS = 2**20, 2**23
NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
Word = Annotated[str, Field(max_length=256)]


class Regex(Frozen):
    """The answer has a match of the pattern, case-insensitive; `^` and `$` match at lines. The
    pattern is one of the Rust crate regex: no look-around, no references to groups.
    """

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            linear(pattern)
        except ValueError as e:
            raise ValueError(f"{pattern[:80]!r} is not a pattern of a suite: {e}") from e
        return pattern


class Syllables(Frozen):
    """The first lines of the answer have these numbers of syllables. A single line is split at
    commas, semicolons, slashes and full stops.
    """

    kind: Literal["syllables"] = "syllables"
    lines: tuple[int, ...] = Field(default=(5, 7, 5), min_length=1)


class FlagExists(Frozen):
    """The answer contains the command with one of its flags, and no flag outside `flags`, the
    complete list.
    """

    kind: Literal["flag-exists"] = "flag-exists"
    command: Word = Field(min_length=1)
    flags: tuple[str, ...] = Field(min_length=1, max_length=MAX_FLAGS)

    @field_validator("flags")
    @classmethod
    def _are_flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [f for f in flags if not FLAG.fullmatch(f)]:
            raise ValueError(f"{wrong[0]!r} is not a flag; a flag begins with - or --")
        return flags


class ContainsFact(Frozen):
    """The answer has a word of every group in `needs` and no word of `forbids`: whole words,
    case-insensitive.
    """

    kind: Literal["contains-fact"] = "contains-fact"
    needs: tuple[Annotated[tuple[Word, ...], Field(min_length=1)], ...] = Field(min_length=1)
    forbids: tuple[Word, ...] = ()

    @property
    def n_words(self) -> int:
        return sum(map(len, self.needs)) + len(self.forbids)


Checker = Annotated[Regex | Syllables | FlagExists | ContainsFact, Field(discriminator="kind")]


def fault(checker: Checker, text: str) -> str:
    """Why an answer fails one checker; empty if it passes. Time is linear in its length, but with a
    large factor for a pattern, which is therefore not sought in a very long answer.
    """
    match checker:
        case Regex() if len(text) > MAX_ANSWER_CHARS:
            return f"the answer has {len(text)} characters, more than {MAX_ANSWER_CHARS}"
        case Regex(pattern=pattern):
            return "" if found(pattern, text) else f"nothing matches {pattern}"
        case Syllables(lines=wanted):
            counts = tuple(sum(map(syllables, line.split())) for line in verse(text, len(wanted)))
            return "" if counts == wanted else f"lines of {counts or 'no'} syllables, not {wanted}"
        case FlagExists(command=command, flags=flags):
            named, known = set(FLAG.findall(text)), frozenset(flags)
            if not _says(command, text):
                return f"the answer lacks {command}"
            if strange := sorted(f for f in named if not _known(f, known)):
                return f"{command} has no flag {strange[0]}"
            return "" if named else f"the answer has no flag of {command}"
        case ContainsFact(needs=needs, forbids=forbids):
            absent = [group for group in needs if not any(_says(word, text) for word in group)]
            wrong = [word for word in forbids if _says(word, text)]
            return (
                f"the answer lacks {' or '.join(absent[0])}"
                if absent
                else f"the answer contains {wrong[0]}"
                if wrong
                else ""
            )
        case _:
            assert_never(checker)


def _known(flag: str, flags: Collection[str]) -> bool:
    """Whether a flag is one of these, or a group of their letters behind one dash."""
    return flag in flags or (
        not flag.startswith("--") and all(f"-{letter}" in flags for letter in flag[1:])
    )


def verse(text: str, n_lines: int) -> list[str]:
    """The first lines with words; for a single line, its parts between punctuation marks."""
    lines = [line for line in text.splitlines() if re.search(r"[a-zA-Z]", line)]
    if len(lines) == 1:
        lines = [
            part for part in re.split(r"[,;/.!?—]\s*", lines[0]) if re.search(r"[a-zA-Z]", part)
        ]
    return lines[:n_lines]


def _says(words: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


class Prompt(Frozen):
    """One prompt. `answer` is a sample answer that passes all checks. The model does not receive
    it.
    """

    id: str = Field(pattern=NAME)
    text: str = Field(min_length=1)
    checks: tuple[Checker, ...] = Field(min_length=1, max_length=MAX_CHECKS)
    answer: str = Field(min_length=1)

    def faults(self, text: str) -> list[str]:
        """Why an answer fails, by check; empty if it passes all."""
        return [why for checker in self.checks if (why := fault(checker, text))]

    @model_validator(mode="after")
    def _decides(self) -> Self:
        n_words = sum(c.n_words for c in self.checks if isinstance(c, ContainsFact))
        if n_words > MAX_WORDS:
            raise ValueError(
                f"prompt {self.id}: its checks have {n_words} words; at most {MAX_WORDS}"
            )
        if why := self.faults(self.answer):
            raise ValueError(f"prompt {self.id}: its sample answer fails its checks: {why[0]}")
        for passing, text in (("an empty answer", ""), ("the question itself", self.text)):
            if not self.faults(text):
                raise ValueError(
                    f"prompt {self.id}: {passing} passes its checks; add a check that it fails"
                )
        return self


class Domain(Frozen):
    """Prompts of one domain."""

    name: str = Field(pattern=NAME)
    prompts: tuple[Prompt, ...] = Field(min_length=1)


class Suite(Frozen):
    """Prompts by domain, and their format. `{prompt}` in `template` is replaced by the question; an
    answer ends at the first `stop`.
    """

    name: str = Field(pattern=NAME)
    template: str = "> {prompt} / <"
    stop: tuple[str, ...] = Field(default=(" / >", "\n>", "\n\n\n"), max_length=MAX_STOPS)
    max_new_tokens: int = Field(
        default=64, ge=1, le=MAX_NEW_TOKENS, description="tokens of an answer"
    )
    domain: tuple[Domain, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")
        for what, names in (
            ("domain", [d.name for d in self.domain]),
            ("prompt", [p.id for d in self.domain for p in d.prompts]),
        ):
            if twice := [n for n, times in Counter(names).items() if times > 1]:
                raise ValueError(f"{what} {twice[0]} is used twice")
        return self

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        uses = self.template.count("{prompt}")
        rest = len(self.template) - uses * len("{prompt}")
        lengths = [rest + uses * len(p.text) for d in self.domain for p in d.prompts]
        for what, number, most in (
            ("a question with the template", max(lengths), MAX_PROMPT_CHARS),
            ("all questions with the template", sum(lengths), MAX_SUITE_CHARS),
        ):
            if number > most:
                raise ValueError(f"{what}: {number} characters; at most {most}")
        if (n_tokens := len(lengths) * self.max_new_tokens) > MAX_SUITE_TOKENS:
            raise ValueError(
                f"{len(lengths)} answers of max_new_tokens are {n_tokens} tokens; "
                f"at most {MAX_SUITE_TOKENS}"
            )
        return self

    def asked(self, prompt: Prompt) -> str:
        """The text that the model receives."""
        return self.template.replace("{prompt}", prompt.text)

    def cut(self, text: str) -> str:
        """An answer up to the first stop text, stripped."""
        return text[
            : min([len(text), *(i for mark in self.stop if (i := text.find(mark)) >= 0)])
        ].strip()


def suite_file(name: str) -> Path:
    """The file of a bundled suite by name, or the path itself.
    Raises UsageError if neither exists.
    """
    known = {p.stem: p for p in sorted(SUITES.glob("*.toml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UsageError(
            "the suite does not exist",
            value=name,
            allowed=f"{', '.join(known)}, or a TOML file",
            next_step="correct --suite",
        )
    return path


def load_suite(path: Path) -> Suite:
    """Read a suite. Raises DataError naming file, place and defect."""
    try:
        document = parse_toml(read_text(path, MAX_SUITE_BYTES))
    except (OSError, ValueError) as e:
        raise DataError(
            f"cannot read the suite {path}: {e}",
            allowed="a TOML file",
            next_step="correct the file",
        ) from e
    try:
        return Suite.model_validate(document)
    except ValidationError as e:
        first = e.errors()[0]
        raise DataError(
            f"the suite {path} is invalid at {_place(first['loc'])}: "
            f"{first['msg'].removeprefix('Value error, ')}",
            allowed="the format in docs/audits.md",
            next_step="correct the file",
        ) from e


def _place(loc: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in loc) or "the whole"
