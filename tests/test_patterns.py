"""Patterns of other people: those that could take for ever are refused, published ones pass."""

import pytest
from pydantic import ValidationError

from stackproof.data.tokenizer import GPT2_WORDS
from stackproof.evaluate.suite import (
    SUITES,
    ContainsFact,
    FlagExists,
    Regex,
    Syllables,
    fault,
    load_suite,
)
from stackproof.patterns import MAX_ANSWER_CHARS, MAX_CHARS, MAX_SIZE, found, linear, slow

PUBLISHED = {
    "gpt-2": GPT2_WORDS,
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|"
    r"'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}"
    r"\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}"
    r"\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "digits": r"\p{N}{1,3}(?=(?:\p{N}{3})*$)",
}
SLOW = ["(a+)+$", "(a*)*", "(?:a+){2,}", "(a|aa)+$", "(?:(a+)b?)*", "((a+))+", r"(\w+\s?)*$"]
SLOW += ["(?=a(b+)c)+", r"(a)\1+", r"\g<0>", "(?R)", "(a+){1,30}", "(?>x|(y+)+)", "(x+x+)+y"]
SLOW += ["(a?a)*", "a?" * 30 + "a" * 30, r"\w+\d+\w+\d+x", "a*b*a*b*", "(a|b){3}c+" * 4]
# A reader that takes a bracket or a repeat for something else would overlook a repeat of a repeat.
SLOW += ["a{1,64}+b", "a{2,3}{2,}", "a+*", "[a[b]](c+)+", "[[:a]](c+)+]", "(?x)(?:a* #)\n)*"]
SLOW += ["(?:a*(?#()))*", r"(?:a*(?:\c()?)*", r"\g{(a+)+}", r"(?<n>a+)\k<n>", "(?~a)", "(*F)"]
SLOW += ["[:a:](x|x)+y", "[:a:](x+x+)+y"]  # such a class has its meaning only inside of another
SLOW += [".*a" * 6, r"\s*" * 6, "a" * (MAX_CHARS + 1), "([^]]+)+", r"(\p{L}+)+", "(?<n>a+)*"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_pattern_passes(name):
    assert slow(PUBLISHED[name]) == ""


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_repeats_a_repeat_is_refused(pattern):
    assert slow(pattern)


@pytest.mark.parametrize("pattern", ["", "(", ")", "[", "[]", "[^]", "\\", "{", "a{", "a{,}", "(?"])
def test_a_broken_pattern_is_looked_through_to_its_end(pattern):
    slow(pattern)


def test_every_bundled_suite_is_read():
    checks = [
        check
        for path in SUITES.glob("*.toml")
        for domain in load_suite(path).domain
        for prompt in domain.prompts
        for check in prompt.checks
    ]
    assert any(isinstance(c, Regex) for c in checks)


def test_up_to_three_unbounded_repeats_may_follow_each_other():
    assert slow(r"\s*\w+\d+") == "" and "too many ways" in slow(r"\s*\w+\d+x?")
    assert slow("|".join([r"\s*\w+\d+"] * 2)), "alternatives add up"


def test_the_engine_of_tokenizers_gives_up_at_one_place_of_a_text(tmp_path):
    """What the docstring of the module states of the installed library."""
    from tokenizers import Regex as Pattern
    from tokenizers.pre_tokenizers import Split

    with pytest.raises(BaseException, match="retry-limit-in-match over") as raised:
        Split(Pattern("(a+)+$"), "isolated").pre_tokenize_str("a" * 40 + "b")
    assert type(raised.value).__name__ == "PanicException"


EXPONENTIAL = ["(a+)+$", "(a|aa)+$", "(a?a)*b", "a?" * 200 + "a" * 200 + "b", ".*a" * 100 + "b"]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_the_engine_of_suites_does_not_backtrack(pattern):
    """With one that does, these do not end."""
    assert not found(pattern, "a" * (MAX_ANSWER_CHARS - 1) + "!")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        ("(a", "unclosed group"),
        (f"a{{{MAX_SIZE + 1}}}", "written out it has 501 characters, over 500"),
        ("((a{2}b){9}c|d){20}", "written out it has 580 characters"),
        (r"\w{400}", "exceeds size limit"),
        ("a" * (MAX_CHARS + 1), "more than 4096 characters"),
    ],
)
def test_a_pattern_beyond_the_engine_of_suites_is_refused(pattern, why):
    with pytest.raises(ValueError, match=why):
        linear(pattern)
    with pytest.raises(ValidationError, match=why):
        Regex(pattern=pattern)


def test_a_pattern_of_a_suite_ignores_case_and_matches_at_lines():
    assert found("^ab$", "x\nAB\ny") and not found("^ab$", "xab") and found(r"\w\d\s", "é٣ ")


def test_an_answer_beyond_the_limit_fails():
    check = Regex(pattern="a")
    assert fault(check, "a" * MAX_ANSWER_CHARS) == ""
    assert fault(check, "a" * (MAX_ANSWER_CHARS + 1)) == (
        "the answer has 16385 characters, more than 16384"
    )


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (ContainsFact(needs=(("a",),)), "a"),
        (Syllables(lines=(1,)), "one"),
        (FlagExists(command="ls", flags=("-l",)), "ls -l"),
    ],
)
def test_an_answer_beyond_the_limit_of_patterns_is_judged_by_the_other_checks(check, answer):
    assert fault(check, answer + " " * MAX_ANSWER_CHARS) == ""
    assert fault(check, " " * MAX_ANSWER_CHARS + "otherwise") != ""
