"""Patterns of other people: those that could take for ever are refused, published ones pass."""

import pytest

from stackproof.data.tokenizer import GPT2_WORDS
from stackproof.evaluate.suite import SUITES, Regex, load_suite
from stackproof.patterns import MAX_CHARS, slow

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


def test_every_bundled_suite_passes():
    checks = [
        check
        for path in SUITES.glob("*.toml")
        for domain in load_suite(path).domain
        for prompt in domain.prompts
        for check in prompt.checks
    ]
    assert any(isinstance(c, Regex) for c in checks)
    assert [c.pattern for c in checks if isinstance(c, Regex) and slow(c.pattern)] == []
