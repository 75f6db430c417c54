"""What the filters reject and keep, to the border of every rule;
and that no configuration can leave one out.
"""

import sys
from types import ModuleType
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from stackproof.config import (
    DataConfig,
    FilesSource,
    Mixture,
    Pangram,
    StdlibCodeSource,
    StdlibDocsSource,
)
from stackproof.contracts.corpus import GOOD, PLANTED, SENTENCES, WORDS
from stackproof.data import filters, plugins
from stackproof.data.filters import RULES, limits, reason_to_drop, rejection
from stackproof.spec.errors import ConfigError

ANSWER = "< Understood, and so it shall be."
FILLER = (
    "The path leads from the harbour to the mill and back along the river, where nobody had "
    "walked before the spring of that year. Old Marten kept bees there, sold honey at the bridge "
    "on Sundays, and knew every heron by the way it stood. His sister wrote letters to the "
    "capital about fish prices, storms, a broken weir, and one lost violin. When snow came early, "
    "carters slept in the barn; their horses stamped until dawn while somebody sang below. "
    "Nothing of this is in any archive, yet three families tell it alike, down to the colour of a "
    "certain door."
)


def chat(user, answer=ANSWER):
    return f"> {user} / {answer}"


def of_length(start, n):
    """A text of exactly n characters that begins with `start` and goes on in prose."""
    return (start + FILLER)[:n]


# --- the shape of a system prompt -----------------------------------------------------------------

TWO_HEADERS = "# Who\n## How\n"
PROMPTS = {
    "three headers": chat("# A\n## B\n### C\nbe brief"),
    "three headers of the lowest level": chat(
        "###### A\nx\n###### B\ny\n###### C\nz and some more"
    ),
    "headers after text": chat("Hello there, read this.\n# A\ntext\n# B\ntext\n# C\ntext"),
    "two headers and 500 characters": chat(of_length(TWO_HEADERS, 500)),
    "a phrase and a header": chat("This file defines who you are.\n# Rules\nNone."),
    "a phrase that is a header": chat("# Agent X\nYou answer in short sentences."),
    "a phrase and 400 characters": chat(of_length("Read it. Become it. ", 400)),
    "every phrase": chat("# Rules\nYour shard is one of many; the Shadow Clone is another."),
    "ornaments nobody has seen yet": chat("# ◆ ONE ◆\n⟁ x\n# ◆ TWO ◆\n⟁ y\n# ◆ THREE ◆\n⟁ z"),
    "ornaments of last month": chat("# ○ ONE\n● x\n# ■ TWO\n□ y\n# ○ THREE"),
    "headers around a path": chat(
        "# A\nread /etc/hosts and https://example.org/a/b\n# B\n/usr/bin/env\n# C\nsrc/main"
    ),
    "a slash between spaces before the headers": chat("Role / duty\n# A\n# B\n# C\nbe brief"),
    "a later turn is harmless": chat(
        "# A\n# B\n# C", "< Yes, I will. / > Good, then begin. / < I begin."
    ),
}
HARMLESS = {
    "two headers and 499 characters": chat(of_length(TWO_HEADERS, 499)),
    "one header and 500 characters": chat(of_length("# Question\n", 500)),
    "a phrase without a header in 399 characters": chat(of_length("Read it. Become it. ", 399)),
    "no phrase, no header, 500 characters": chat(FILLER),
    "headers in the answer": chat(
        "Please write a page of documentation.",
        "< # One\n## Two\n### Three\n#### Four\nThere you are.",
    ),
    "a phrase in the answer": chat(
        "What does the note say?", f"< It says: this file... no, 'Your shard'. {FILLER}"
    ),
    "headers in the second user turn": chat(
        "Please fix my notes.", "< Which ones? / > # A\n# B\n# C\nthese / < Done, all of them."
    ),
    "a hash without a space": chat(
        "#include <stdio.h>\n#define A 1\n#pragma once\nwhy does this not compile?"
    ),
    "a hash inside a line": chat("issue # 1 and # 2 and # 3 are open, which one is first?"),
    "seven hashes": chat("####### A\n####### B\n####### C\nis this a header?"),
    "an address with slashes": chat(
        "Where is https://example.org/# A/# B/# C in the tree of /usr/share?"
    ),
    "a single unknown ornament": chat("What does the sign ◆ mean, and where does ⟁ come from?"),
    "headers in a text that is no chat": (
        "# A\n\n## B\n\n### C\n\nThis is a readme, and it is meant to have headers."
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_system_prompt_in_the_users_place_is_rejected_by_its_shape(name):
    assert rejection(PROMPTS[name], ("en",)) == "system-prompt"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_like_it_is_kept(name):
    assert rejection(HARMLESS[name], ("en",)) is None


def test_a_turn_ends_where_the_other_speaker_begins():
    assert (
        filters.first_user_turn("> see a/b and c/ d or /e / < yes / > no")
        == "see a/b and c/ d or /e"
    )
    assert filters.first_user_turn("> no answer to this / > really") is None
    assert filters.first_user_turn("no mark / < yes") is None


def test_ornaments_play_no_part():
    """With every ornament exchanged for another or for a letter the decision is the same."""
    for text in [*PROMPTS.values(), *HARMLESS.values()]:
        for other in "◈◇x":
            exchanged = text.translate(str.maketrans("○●■□◆⟁", other * 6))
            assert rejection(exchanged, ("en",)) == rejection(text, ("en",))


# --- the other rules, to their borders ------------------------------------------------------------

# of different words, so that no other rule speaks
LONG = " ".join(f"{w}{i}" for i in range(60) for w in WORDS)

BORDERS = [
    ("too-short", "en", "nineteen characters", "twenty characters it"),
    ("broken-text", "en", GOOD + "\0", GOOD + "\x01"),
    ("broken-text", "en", GOOD + "\ufffd", GOOD + "\ufffc"),
    ("blank-run", "en", GOOD + " " * 10001 + GOOD, GOOD + "\n" * 10000 + SENTENCES[0]),
    ("long-paragraph", "en", LONG[:2001], LONG[:2000]),
    (
        "long-paragraph",
        "en",
        GOOD + "\n" + LONG[:2001] + "\n" + GOOD,
        "\n".join([LONG[:2000], LONG[2000:3900]]),
    ),
    (
        "foreign-script",
        "en",
        "Это предложение на другом языке.",
        "Это is Russian for this, as one learns in the first lesson.",
    ),
    (
        "foreign-script",
        "en",
        "Эдо, а не что другое, m².",
        "½ kg, ¼ l, ¾ kg, 14 m², 9 m²; as the list in the kitchen says.",
    ),
    ("foreign-script", "ru", GOOD, "Это предложение на своём языке, a laser is лазер."),
    ("low-diversity", "en", "region " * 60, "one two three four five six seven eight nine ten"),
    ("low-diversity", "en", "a b " * 20, "a b " * 3 + "and then it goes on in other ways"),
    (
        "low-diversity",
        "zh",
        "我們明天再去看一看" * 30,
        "我們明天再去看一看，那裡的花開得正好，路上行人不多。",
    ),
    ("repetition", "en", f"{FILLER}\n{FILLER}\n{FILLER}", f"{FILLER}\n{' '.join(SENTENCES[:6])}"),
    (
        "chat-turns",
        "en",
        "> What is it, please? / < This. / < And that.",
        "> What is it, please? / < This. / > And that?",
    ),
    (
        "chat-turns",
        "en",
        "> What is it, please? / <  / > And that?",
        "> What is it, please? / < . / > And that?",
    ),
]


@pytest.mark.parametrize(("reason", "language", "rejected", "kept"), BORDERS)
def test_every_rule_has_two_sides(reason, language, rejected, kept):
    assert rejection(rejected, language) == reason and rejection(kept, language) is None


def test_every_rule_is_tried_and_the_gate_plants_each():
    assert (
        {b[0] for b in BORDERS} | {"system-prompt"}
        == set(RULES)
        == {reason for reason, _, _ in PLANTED if reason}
    )


def test_the_limits_are_those_of_the_gate(spec):
    assert vars(limits()) == {
        name: limit.value for name, limit in spec.gates["corpus.filters"].limits.items()
    }
    assert (limits().chars_min, limits().paragraph_chars_max) == (20, 2000)


@pytest.mark.parametrize(("n", "reason"), [(2000, None), (2001, "long-paragraph")])
def test_a_long_line_is_measured_in_characters_not_bytes(n, reason):
    assert rejection(LONG.replace("e", "é")[:n], "en") == reason


ENGLISH = "".join(c for c in FILLER if c.isalpha())
RUSSIAN = "".join(
    c
    for c in "дорога ведёт от гавани к мельнице и обратно вдоль реки где никто не ходил до весны "
    * 2
    if c.isalpha()
)


def in_words(letters):
    return " ".join(letters[i : i + 5] for i in range(0, len(letters), 5))


@pytest.mark.parametrize(("foreign", "reason"), [(10, None), (11, "foreign-script")])
def test_a_tenth_of_foreign_letters_is_allowed_and_a_letter_more_is_not(foreign, reason):
    text = in_words(ENGLISH[: 100 - foreign] + RUSSIAN[:foreign])
    assert sum(c.isalpha() for c in text) == 100 and rejection(text, "en") == reason


@pytest.mark.parametrize(("own", "reason"), [(20, None), (19, "foreign-script")])
def test_a_fifth_of_the_letters_must_be_of_the_declared_script(own, reason):
    assert rejection(in_words(RUSSIAN[:own] + ENGLISH[: 100 - own]), "ru") == reason


def test_marks_on_letters_are_no_letters():
    """Vowel signs do not make room for letters of another script: in every language a third of
    foreign letters is too much.
    """
    for language in ("hi", "he", "ar"):
        letters = [c for c in SAMPLES[language] if c.isalpha()]
        text = f"{SAMPLES[language]} {in_words(RUSSIAN[: len(letters) // 2])}"
        assert rejection(text, language) == "foreign-script", language


SAMPLES = {
    "en": GOOD,
    "de": "Der Weg führt über die Brücke, größer als jede andere im Süden des Landes.",
    "fr": "Le garçon a reçu une lettre à Noël, où l'on parlait d'œufs et de cœurs.",
    "pl": "Zażółć gęślą jaźń, powiedział sąsiad, i wyszedł z domu w stronę rzeki.",
    "tr": "Pijamalı hasta yağız şoföre çabucak güvendi, sonra yoluna devam etti.",
    "vi": "Tiếng Việt có nhiều dấu thanh, và người học cần thời gian để quen với chúng.",
    "el": "Ο δρόμος περνά πίσω από το λιμάνι και κανείς δεν τον είχε περπατήσει.",
    "ru": "Дорога ведёт от гавани к мельнице и обратно вдоль реки, где никто не ходил.",
    "uk": "Стежка веде від гавані до млина і назад уздовж річки, де ґрунт м'який, а їжаки сплять.",
    "zh": "这条路从港口通向磨坊,再沿着河流返回,在那年春天之前没有人走过这条路。",
    "ja": "この道は港から水車小屋まで続いていて、春になるまで誰も歩いたことがありませんでした。",
    "ko": "이 길은 항구에서 방앗간까지 이어지며 그해 봄까지 아무도 걸어 본 적이 없었습니다.",
    "ar": "يمتد هذا الطريق من الميناء إلى الطاحونة ثم يعود على طول النهر حيث لم يمش أحد.",
    "fa": "این راه از بندر تا آسیاب می‌رود و سپس در کنار رودخانه بازمی‌گردد و کسی نرفته است.",
    "he": "השביל מוביל מן הנמל אל הטחנה ובחזרה לאורך הנהר, ואיש לא הלך בו לפני האביב.",
    "hi": "यह रास्ता बंदरगाह से चक्की तक जाता है और नदी के किनारे वापस आता है।",
    "code": (
        "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4), area(5, 6))\n"
    ),
}
# groups of one script
ALIKE = ({"en", "de", "fr", "pl", "tr", "vi", "code"}, {"ru", "uk"}, {"ar", "fa"})
# which share characters, so that a text may pass as the other's
AMBIGUOUS = ({"zh", "ja"}, {"zh", "ko"}, {"ja", "ko"})


@pytest.mark.parametrize("language", SAMPLES)
def test_a_language_keeps_its_own_and_rejects_those_of_other_scripts(language):
    assert rejection(SAMPLES[language], language) is None
    for other, text in SAMPLES.items():
        wanted = (
            None
            if other == language or any({other, language} <= group for group in ALIKE)
            else "foreign-script"
        )
        if {other, language} not in AMBIGUOUS:
            assert rejection(text, language) == wanted, other
        assert rejection(f"{text}\n{GOOD[:40]}", ("en", other)) is None


def test_every_declared_language_has_its_scripts():
    languages = get_args(get_args(FilesSource.model_fields["languages"].annotation)[0])
    assert set(filters.SCRIPTS_OF) == set(languages) and all(
        s in filters.SCRIPTS for v in filters.SCRIPTS_OF.values() for s in v
    )


@pytest.mark.parametrize(("cycle", "reason"), [(6, None), (5, "low-diversity")])
def test_three_tenths_of_the_pairs_must_be_distinct(cycle, reason):
    """Twenty pairs of words, of which six or five are distinct."""
    assert rejection(" ".join(WORDS[i % cycle] for i in range(21)), "en") == reason


@pytest.mark.parametrize(("again", "reason"), [(54, None), (55, "repetition")])
def test_three_tenths_of_the_long_runs_may_be_repeated(again, reason):
    """A hundred words and the first of them again: 42 of 142 or 43 of 143 runs of thirteen words.
    Code may repeat half.
    """
    words = LONG.split()[:100]
    text = " ".join([*words, "\n", *words[:again]])
    assert rejection(text, "en") == reason and rejection(text, "code") is None


def test_code_may_repeat_more_than_prose():
    table = "\n".join(f"    {i % 4}, {i % 3}, {i % 4}, 0, 0, 0, 0, 0," for i in range(12))
    body = "\n".join(
        f"def f{i}(a, b):\n    c{i} = a + {i}\n    return c{i} * b - {i * 7}\n" for i in range(14)
    )
    assert rejection(f"{body}\n{table}", "code") is None


# --- purity ---------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        "> ",
        "< ",
        " / ",
        "# ",
        "\n",
        "region ",
        "# Agent ",
        "\0",
        "\ufffd",
        GOOD,
        "日本",
        "жук ",
        "x" * 700,
        "\u2028",
        "\r",
    ]
)
TEXTS = st.one_of(
    st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=40).map("".join)
)


@settings(max_examples=300, deadline=None)
@given(
    TEXTS, st.sampled_from([("en",), ("code",), ("ru", "en"), ("zh",), ("ja", "ko", "ar")]), TEXTS
)
def test_rejection_is_pure_and_never_raises(text, languages, between):
    first = rejection(text, languages)
    rejection(between, languages)
    assert rejection(text, languages) == first and (first is None or first in RULES)
    assert reason_to_drop(text, languages, ()) == first


def test_only_the_codes_own_text_is_exempt():
    assert rejection("region " * 60, Pangram.languages) is None
    assert rejection("region " * 60, ("en",)) == "low-diversity"
    for languages in ([Pangram.languages[0]], ["en", Pangram.languages[0]], []):
        with pytest.raises(ValidationError):
            FilesSource.model_validate({"name": "a", "paths": ["x"], "languages": languages})


# --- plug-ins -------------------------------------------------------------------------------------


def load_permitted(names):
    with plugins.permitted(names):
        return plugins.load(names)


@pytest.fixture
def plugin_module(monkeypatch):
    module = ModuleType("a_users_filters")
    module.no_bees = lambda text, languages: "bees" in text
    module.broken = lambda text, languages: 1 / 0
    module.number = 3
    module.seen = []
    module.watch = lambda text, languages: module.seen.append((text, languages))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_plugin_drops_under_its_own_name(plugin_module):
    plugins = load_permitted(["a_users_filters:no_bees"])
    assert reason_to_drop(FILLER, ("en",), plugins) == "plugin:a_users_filters:no_bees"
    assert reason_to_drop(GOOD, ("en",), plugins) is None


def test_plugins_come_after_the_rules_and_can_keep_nothing_that_a_rule_rejects(plugin_module):
    plugins = load_permitted(["a_users_filters:watch"])
    assert (
        reason_to_drop("region " * 60, ("en",), plugins) == "low-diversity"
        and plugin_module.seen == []
    )
    assert reason_to_drop(GOOD, ("en",), plugins) is None and plugin_module.seen == [
        (GOOD, ("en",))
    ]


def test_a_plugin_that_fails_is_named(plugin_module):
    with pytest.raises(ConfigError, match="a_users_filters:broken failed: ZeroDivisionError"):
        reason_to_drop(GOOD, ("en",), load_permitted(["a_users_filters:broken"]))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a_users_filters:absent", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("a_users_filters", "cannot be imported"),
        ("raising_filters:f", "cannot be imported: ZeroDivisionError"),
        ("misspelt_filters:f", "cannot be imported: SyntaxError"),
        (":f", "cannot be imported"),
        ("a_users_filters:number", "is not a function"),
    ],
)
def test_a_plugin_that_cannot_be_had_is_named(plugin_module, tmp_path, monkeypatch, name, says):
    (tmp_path / "raising_filters.py").write_text("1 / 0\n")
    (tmp_path / "misspelt_filters.py").write_text("def f(\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=says) as error:
        load_permitted([name])
    assert name in str(error.value)


def test_the_fingerprint_knows_the_source_of_plugins_and_bears_that_there_is_none(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_filters.py").write_text("def f(text, languages):\n    return False\n")
    assert (
        len(
            {
                filters.fingerprint(()),
                filters.fingerprint(["own_filters:f"]),
                filters.fingerprint(["math:isfinite"]),
            }
        )
        == 3
    )


# --- no way around --------------------------------------------------------------------------------


def models_of(model, seen=None):
    """A configuration type and all types inside its fields."""
    seen = {} if seen is None else seen
    if isinstance(model, type) and issubclass(model, BaseModel) and model not in seen:
        seen[model] = None
        for field in model.model_fields.values():
            models_of(field.annotation, seen)
    for inner in get_args(model):
        models_of(inner, seen)
    return list(seen)


def test_no_key_of_the_configuration_can_leave_out_a_filter():
    """Every key there is, by type: whoever adds one has to say here that it disables no reason."""
    arm, files = (
        {"name", "weight", "cap", "floor"},
        {"kind", "paths", "documents", "text_field", "languages", "license"},
    )
    assert set(FilesSource.model_fields) == arm | files
    assert (
        set(StdlibDocsSource.model_fields) == set(StdlibCodeSource.model_fields) == arm | {"kind"}
    )
    assert set(Mixture.model_fields) == {"kind", "sources"}
    build = {
        "corpus",
        "split",
        "tokenizer",
        "filters",
        "dedup",
        "decontaminate",
        "decontaminate_fields",
    }
    assert set(DataConfig.model_fields) == build | {"packing", "on_exhausted", "verify"}
    reasons = {reason.replace("-", "_") for reason in RULES}
    exceptions = {
        "skip",
        "trust",
        "trusted",
        "clean",
        "exempt",
        "allow",
        "disable",
        "enable",
        "rules",
    }
    keys = {k for m in models_of(DataConfig) for k in m.model_fields}
    assert len(keys) > 20 and not {
        k for k in keys if exceptions & set(k.split("_")) or any(r in k for r in reasons)
    }


@pytest.mark.parametrize("key", [*RULES, "skip_filters", "filters", "trusted"])
def test_a_source_that_asks_for_an_exception_is_refused(key):
    for model, needed in (
        (FilesSource, {"name": "a", "paths": ("x",)}),
        (StdlibDocsSource, {"name": "a"}),
    ):
        assert model.model_validate(needed)
        with pytest.raises(ValidationError, match="extra_forbidden"):
            model.model_validate(needed | {key: False})
