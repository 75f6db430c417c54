"""Suites of prompts: each checker has an answer it takes and one it refuses, and a suite that says
nothing is refused when it is read.
"""

import copy
import pydoc_data.topics
import re
import tomllib

import pytest
from pydantic import ValidationError

from stackproof.evaluate.suite import (
    SUITES,
    ContainsFact,
    FlagExists,
    Regex,
    Suite,
    Syllables,
    fault,
    load_suite,
    suite_file,
    verse,
)
from stackproof.evaluate.syllables import syllables
from stackproof.spec import ROOT
from stackproof.spec.errors import DataError, UsageError

RAIN = "Rain's rhythmic refrain, Rivulets on the window, Respite from life's pain."
POND = (
    "An old silent pond.\nA frog jumps into the pond.\nSplash! Silence again.\nAnd a fourth line."
)
PIP = FlagExists(command="pip list", flags=("--outdated", "-o", "-v", "-m"))
BIRDS = ContainsFact(
    needs=(("dodo", "carolina parakeet"), ("extinct", "died out")), forbids=("alive",)
)

# What a dictionary gives. Three in a hundred kinds of words of running prose come out wrong;
# none of these may.
WORDS = {
    1: (
        "rain life's walked leaves rose blue through strength eyes called night frog splash the "
        "world pain dream cold"
    ),
    2: (
        "window silent again table apple wanted roses poem being quiet water winter branches "
        "lonely movement people going careless handled"
    ),
    3: (
        "rivulets beautiful area idea family elephant remember piano another radio however "
        "completely video created"
    ),
    4: "information especially operation mathematics biology television",
    5: "university electricity imagination international possibility",
}


@pytest.mark.parametrize("n", WORDS)
def test_syllables_of_words_in_a_list(n):
    assert {w: syllables(w) for w in WORDS[n].split()} == dict.fromkeys(WORDS[n].split(), n)


def test_what_is_no_word_has_no_syllable():
    assert [syllables(w) for w in ("", "—", "42", "'", "(rain)", "RAIN", "life\u2019s")] == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("checker", "passing", "failing"),
    [
        (
            Regex(pattern=r"\balias(es|ing)?\b"),
            "This is called Aliasing.",
            "This is called an alibi.",
        ),
        (Regex(pattern="^night$"), "first\nnight\nlast", "first night"),
        (Syllables(), RAIN, RAIN.replace("Rain's", "The rain's")),
        (Syllables(), POND, POND.replace("silent ", "")),
        (Syllables(lines=(7,)), "A frog jumps into the pond", "A frog jumps in the pond"),
        (
            PIP,
            "Use pip list --outdated names to see the pip packages list",
            "Use pip list --stale names to see them",
        ),
        (PIP, "python -m pip list -o", "python -m pip freeze -o"),
        (PIP, "pip list -ov shows them", "pip list -ox shows them"),
        (PIP, "pip list --outdated", "pip list shows outdated packages"),
        (PIP, "pip list --outdated", "pip list --outdated --newer"),
        (
            BIRDS,
            "black spider montano is there, Carolina parakeet is extinct.",
            "Carolina parakeet is a bird.",
        ),
        (BIRDS, "The dodo died out.", "The dodos died out."),
        (BIRDS, "The dodo is extinct.", "The dodo is alive, others are extinct."),
    ],
)
def test_a_checker_has_two_sides(checker, passing, failing):
    assert fault(checker, passing) == ""
    assert fault(checker, failing) and fault(checker, "")


def test_a_verse_is_lines_or_parts_of_one_line():
    assert verse(POND, 3) == POND.splitlines()[:3]
    assert [p.strip() for p in verse(RAIN, 3)] == [
        "Rain's rhythmic refrain",
        "Rivulets on the window",
        "Respite from life's pain",
    ]
    assert verse("one\n\n---\ntwo\n", 3) == ["one", "two"] and verse("", 3) == []


def test_the_suite_that_comes_along_asks_of_six_domains():
    suite = load_suite(suite_file("domains"))
    assert len(suite.domain) == 6 and all(len(d.prompts) >= 3 for d in suite.domain)
    kinds = {c.kind for d in suite.domain for p in d.prompts for c in p.checks}
    assert kinds == {"regex", "syllables", "flag-exists", "contains-fact"}
    prompts = [p for d in suite.domain for p in d.prompts]
    assert all(not p.faults(p.answer) for p in prompts)
    others = {
        p.id: [q.id for q in prompts if q.id != p.id and not p.faults(q.answer)] for p in prompts
    }
    assert {name: found for name, found in others.items() if found} == {
        "rhyme-light": ["haiku-winter"]
    }, "of 552 pairs"


def test_founding_samples_are_judged_as_their_readers_judged_them():
    prompts = {p.id: p for d in load_suite(suite_file("domains")).domain for p in d.prompts}
    said = {
        "extinct-birds": "black spider montano is alive, carolina parakeet is extinct.",
        "fourier": (
            "The Fourier transform decomposes signals into frequency components, allowing "
            "analysis of signal characteristics"
        ),
        "haiku-rain": RAIN,
        "outdated-packages": (
            "Use pip list --outdated names to see the pip packages list in your project "
            "management..."
        ),
    }
    assert all(not prompts[name].faults(text) for name, text in said.items())
    collapsed = (
        "region region region region region",
        "''''' ''''' '' ''' '' '''",
        "games, games, games, games",
        "Budy Budy Budy",
    )
    assert all(p.faults(text) for p in prompts.values() for text in collapsed)


def test_prose_about_something_else_hardly_passes_anything():
    """Pieces of 40 words of the interpreter's help topics: measured 16 passes in 38,400, and at
    most 8 in 1,600 of one prompt.
    """
    topics = [pydoc_data.topics.topics[name].split() for name in sorted(pydoc_data.topics.topics)]
    pieces = [
        " ".join(words[i : i + 40]) for words in topics for i in range(0, len(words) - 40, 40)
    ]
    prompts = [p for d in load_suite(suite_file("domains")).domain for p in d.prompts]
    passes = {p.id: sum(not p.faults(text) for text in pieces) for p in prompts}
    assert len(pieces) > 1000 and sum(passes.values()) < len(pieces) * len(prompts) / 1000, passes
    assert max(passes.values()) < len(pieces) / 100, passes


GOOD = tomllib.loads("""
name = "mine"
[[domain]]
name = "sums"
prompts = [{ id = "two-and-two", text = "What is two and two?", answer = "It is four.", checks = [{ kind = "regex", pattern = "four" }] }]
[[domain]]
name = "names"
prompts = [{ id = "capital", text = "Capital of France?", answer = "Paris", checks = [{ kind = "contains-fact", needs = [["Paris"]] }] }]
""")  # noqa: E501


def changed(path, value):
    """The good suite with one value changed."""
    document = node = copy.deepcopy(GOOD)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            ("domain", 0, "prompts", 0, "answer"),
            "It is five.",
            "two-and-two: its sample answer fails its checks: nothing matches four",
        ),
        (
            ("domain", 0, "prompts", 0, "checks"),
            [{"kind": "regex", "pattern": ".*"}],
            "an empty answer passes",
        ),
        (
            ("domain", 0, "prompts", 0, "text"),
            "Is two and two four?",
            "the question itself passes",
        ),
        (
            ("domain", 0, "prompts", 0, "checks"),
            [{"kind": "regex", "pattern": "(four"}],
            "not a pattern of a suite: unclosed group",
        ),
        (
            ("domain", 0, "prompts", 0, "checks"),
            [{"kind": "judge"}],
            "regex.*syllables.*flag-exists.*contains-fact",
        ),
        (
            ("domain", 0, "prompts", 0, "checks"),
            [{"kind": "flag-exists", "command": "ls", "flags": ["long"]}],
            "'long' is not a flag",
        ),
        (("domain", 0, "prompts", 0, "checks"), [], "at least 1"),
        (("domain", 1, "name"), "sums", "domain sums is used twice"),
        (("domain", 1, "prompts", 0, "id"), "two-and-two", "prompt two-and-two is used twice"),
        (("domain",), GOOD["domain"][:1], "at least 2"),
        (("template",), "Answer:", "template must contain"),
        (("surprise",), 1, "Extra inputs"),
        (("max_new_tokens",), 0, "greater than or equal to 1"),
    ],
)
def test_a_suite_that_says_nothing_is_refused(path, value, says):
    Suite.model_validate(GOOD)
    with pytest.raises(ValidationError, match=re.compile(says, re.DOTALL)):
        Suite.model_validate(changed(path, value))


CHECKS = ("domain", 1, "prompts", 0, "checks")
FACT = {"kind": "contains-fact", "needs": [["Paris"]]}


@pytest.mark.parametrize(
    ("path", "taken", "refused", "why"),
    [
        (("max_new_tokens",), 4096, 4097, "less than or equal to 4096"),
        (("template",), "{prompt}" * 3000, "{prompt}" * 4000, "80000 characters; at most 65536"),
        (("stop",), ["a"] * 64, ["a"] * 65, "at most 64 items"),
        (CHECKS, [FACT] * 16, [FACT] * 17, "at most 16 items"),
        (
            CHECKS,
            [FACT | {"forbids": ["x"] * 255}],
            [FACT | {"forbids": ["x"] * 256}],
            "257 words; at most 256",
        ),
        (
            CHECKS,
            [FACT | {"forbids": ["x" * 256]}],
            [FACT | {"forbids": ["x" * 257]}],
            "at most 256 characters",
        ),
        (
            ("domain", 0, "prompts", 0, "answer"),
            "four" + " " * 16_380,
            "four" + " " * 16_381,
            "16385 characters, more than 16384",
        ),
    ],
)
def test_a_suite_is_refused_by_the_bound_that_it_exceeds(path, taken, refused, why):
    Suite.model_validate(changed(path, taken))
    with pytest.raises(ValidationError, match=why):
        Suite.model_validate(changed(path, refused))


def test_all_questions_of_a_suite_are_bounded_together():
    [prompt] = GOOD["domain"][0]["prompts"]
    many = [prompt | {"id": f"a-{i}"} for i in range(255)]
    document = changed(("domain", 0, "prompts"), many)
    Suite.model_validate(document | {"max_new_tokens": 4096})
    document["domain"][0]["prompts"].append(prompt)
    with pytest.raises(ValidationError, match=r"257 answers.* at most 1048576"):
        Suite.model_validate(document | {"max_new_tokens": 4096})
    with pytest.raises(ValidationError, match=r"all questions.* at most 8388608"):
        Suite.model_validate(document | {"template": "{prompt}" + "a" * 40_000})


def test_a_bad_file_is_named_with_the_place(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n[[domain]]\nname = 'a b'\nprompts = []\n")
    with pytest.raises(DataError, match=r"mine\.toml is invalid at domain\.0\.name"):
        load_suite(path)
    path.write_text("name = ")
    with pytest.raises(DataError, match="cannot read the suite"):
        load_suite(path)
    with pytest.raises(UsageError, match="domains, or a TOML file"):
        suite_file(str(tmp_path / "other.toml"))
    assert suite_file("domains") == SUITES / "domains.toml" and suite_file(str(path)) == path


def test_the_suite_of_the_page_is_one(tmp_path):
    page = (ROOT / "docs" / "audits.md").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    suite = load_suite(tmp_path / "mine.toml")
    assert [d.name for d in suite.domain] == [
        "biology",
        "poetry",
    ] and suite.template == Suite.model_fields["template"].default
    assert (
        suite.stop == Suite.model_fields["stop"].default
        and suite.max_new_tokens == Suite.model_fields["max_new_tokens"].default
    )


def test_an_answer_ends_where_the_next_turn_begins():
    suite = Suite.model_validate(GOOD)
    assert suite.asked(suite.domain[0].prompts[0]) == "> What is two and two? / <"
    assert (
        suite.cut(" four. / > And three?") == "four."
        and suite.cut(" four\n> no") == "four"
        and suite.cut(" four ") == "four"
    )
