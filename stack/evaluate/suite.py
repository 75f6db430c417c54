"""A suite of prompts by domain, and the checkers that judge what a model answers.

A suite is TOML; `suites/domains.toml` is the one that comes along. Every prompt carries an answer
that passes its checks, so that a check that cannot pass is refused when the suite is read, and so
is one that cannot fail.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, assert_never

from pydantic import Field, ValidationError, field_validator, model_validator

from stackproof.evaluate.syllables import syllables
from stackproof.spec.errors import DataError, UsageError
from stackproof.spec.gates import Frozen

SUITES = Path(__file__).parent / "suites"
NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


class Regex(Frozen):
    """The answer holds a match of the pattern, without regard to case;
    `^` and `$` are those of a line.
    """

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"{pattern!r} is no regular expression: {e}") from e
        return pattern


class Syllables(Frozen):
    """The first lines of the answer have these syllables; a single line is cut at commas,
    semicolons, slashes and full stops.
    """

    kind: Literal["syllables"] = "syllables"
    lines: tuple[int, ...] = Field(default=(5, 7, 5), min_length=1)


class FlagExists(Frozen):
    """The answer names the command with one of its flags, and no flag that the command does not
    have. `flags` is all of them.
    """

    kind: Literal["flag-exists"] = "flag-exists"
    command: str = Field(min_length=1)
    flags: tuple[str, ...] = Field(min_length=1)

    @field_validator("flags")
    @classmethod
    def _are_flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [f for f in flags if not FLAG.fullmatch(f)]:
            raise ValueError(f"{wrong[0]!r} is no flag; one begins with - or --")
        return flags


class ContainsFact(Frozen):
    """The answer has a word of every group in `needs`, as whole words without regard to case,
    and none of `forbids`.
    """

    kind: Literal["contains-fact"] = "contains-fact"
    needs: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = Field(min_length=1)
    forbids: tuple[str, ...] = ()


Checker = Annotated[Regex | Syllables | FlagExists | ContainsFact, Field(discriminator="kind")]


def fault(checker: Checker, text: str) -> str:
    """What an answer lacks by one checker, or an empty text if it passes."""
    match checker:
        case Regex(pattern=pattern):
            return (
                ""
                if re.search(pattern, text, re.IGNORECASE | re.MULTILINE)
                else f"nothing matches {pattern}"
            )
        case Syllables(lines=wanted):
            found = tuple(sum(map(syllables, line.split())) for line in verse(text, len(wanted)))
            return "" if found == wanted else f"lines of {found or 'no'} syllables, not {wanted}"
        case FlagExists(command=command, flags=flags):
            named = set(FLAG.findall(text))
            if not _says(command, text):
                return f"{command} is not named"
            if strange := sorted(f for f in named if not _known(f, flags)):
                return f"{command} has no flag {strange[0]}"
            return "" if named else f"no flag of {command} is named"
        case ContainsFact(needs=needs, forbids=forbids):
            absent = [group for group in needs if not any(_says(word, text) for word in group)]
            wrong = [word for word in forbids if _says(word, text)]
            return (
                f"{' or '.join(absent[0])} is not said"
                if absent
                else f"{wrong[0]} is said"
                if wrong
                else ""
            )
        case _:
            assert_never(checker)


def _known(flag: str, flags: Sequence[str]) -> bool:
    """Whether a flag is one of these, or several letters of them behind one dash."""
    return flag in flags or (
        not flag.startswith("--") and all(f"-{letter}" in flags for letter in flag[1:])
    )


def verse(text: str, n_lines: int) -> list[str]:
    """The first lines that hold words; where the text is one line, its parts between marks."""
    lines = [line for line in text.splitlines() if re.search(r"[a-zA-Z]", line)]
    if len(lines) == 1:
        lines = [
            part for part in re.split(r"[,;/.!?—]\s*", lines[0]) if re.search(r"[a-zA-Z]", part)
        ]
    return lines[:n_lines]


def _says(words: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


class Prompt(Frozen):
    """One question. `answer` is an answer that passes all checks;
    it is never shown to the model.
    """

    id: str = Field(pattern=NAME)
    text: str = Field(min_length=1)
    checks: tuple[Checker, ...] = Field(min_length=1)
    answer: str = Field(min_length=1)

    def faults(self, text: str) -> list[str]:
        """What an answer lacks, by check; empty if it passes all."""
        return [why for checker in self.checks if (why := fault(checker, text))]

    @model_validator(mode="after")
    def _decides(self) -> Self:
        if why := self.faults(self.answer):
            raise ValueError(f"prompt {self.id}: its own answer does not pass: {why[0]}")
        for passing, text in (("an empty answer", ""), ("the question said again", self.text)):
            if not self.faults(text):
                raise ValueError(
                    f"prompt {self.id}: {passing} passes its checks, so they say nothing"
                )
        return self


class Domain(Frozen):
    """Prompts about one thing."""

    name: str = Field(pattern=NAME)
    prompts: tuple[Prompt, ...] = Field(min_length=1)


class Suite(Frozen):
    """Prompts by domain, and how a model is asked.
    `{prompt}` in `template` stands for the question; an answer ends at the first `stop`.
    """

    name: str = Field(pattern=NAME)
    template: str = "> {prompt} / <"
    stop: tuple[str, ...] = (" / >", "\n>", "\n\n\n")
    max_new_tokens: int = Field(default=64, ge=1, description="tokens of an answer")
    domain: tuple[Domain, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if "{prompt}" not in self.template:
            raise ValueError("template has no {prompt}, so every question is the same")
        for what, names in (
            ("domain", [d.name for d in self.domain]),
            ("prompt", [p.id for d in self.domain for p in d.prompts]),
        ):
            if twice := [n for n in names if names.count(n) > 1]:
                raise ValueError(f"{what} {twice[0]} comes twice")
        return self

    def asked(self, prompt: Prompt) -> str:
        """What the model reads."""
        return self.template.replace("{prompt}", prompt.text)

    def cut(self, text: str) -> str:
        """An answer up to the first mark that ends it, without blanks around it."""
        return text[
            : min([len(text), *(i for mark in self.stop if (i := text.find(mark)) >= 0)])
        ].strip()


def suite_file(name: str) -> Path:
    """The file of a suite that comes along, by its name, or else the path itself.
    Raises UsageError if there is neither.
    """
    known = {p.stem: p for p in sorted(SUITES.glob("*.toml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UsageError(
            "there is no such suite",
            value=name,
            allowed=f"{', '.join(known)}, or a TOML file",
            next_step="correct --suite",
        )
    return path


def load_suite(path: Path) -> Suite:
    """Read a suite. Raises DataError naming file, place and what is wrong."""
    try:
        return Suite.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise DataError(
            f"cannot read the suite {path}: {e}",
            allowed="a TOML file",
            next_step="correct the file",
        ) from e
    except ValidationError as e:
        first = e.errors()[0]
        raise DataError(
            f"the suite {path} is wrong at {_place(first['loc'])}: "
            f"{first['msg'].removeprefix('Value error, ')}",
            allowed="the form that docs/audits.md shows",
            next_step="correct the file",
        ) from e


def _place(loc: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in loc) or "the whole"
