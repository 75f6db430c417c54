"""What makes a document unfit for training.
Pure functions of one text; every source passes all of them, in this order.

The limits are those of the gate `corpus.filters`, which judges the shipped
shards by the same rules.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from types import SimpleNamespace

import numpy as np

from stackproof.config import Pangram
from stackproof.data import plugins
from stackproof.data.plugins import Plugin
from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import ConfigError
from stackproof.spec.gates import load_spec

HEADER = re.compile(r"^#{1,6} ", re.MULTILINE)
FINGERPRINTS = ("# Agent ", "Shadow Clone", "Your shard", "Read it. Become it", "This file defines")
USER, ASSISTANT, TURN = "> ", "< ", " / "
NEXT_TURN = re.compile(r" / (?=[<>] )")

SCRIPTS = {
    "latin": "A-Za-zªºÀ-ÖØ-öø-ʸᴀ-ᶿḀ-ỿⱠ-ⱿꜢ-ꟿﬀ-ﬆＡ-Ｚａ-ｚ",
    "greek": "Ͱ-Ͽἀ-῿",
    "cyrillic": "Ѐ-ԯᲀ-ᲈⷠ-ⷿꙀ-ꚟ",
    "hebrew": "\u0591-\u05f4\ufb1d-\ufb4f",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "han": "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
}
SCRIPTS_OF = dict.fromkeys("en de fr es it pt nl pl tr vi code".split(), ("latin",)) | {
    "el": ("greek",),
    "ru": ("cyrillic",),
    "uk": ("cyrillic",),
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul", "han"),
    "ar": ("arabic",),
    "fa": ("arabic",),
    "he": ("hebrew",),
    "hi": ("devanagari",),
}
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Chinese, Japanese and Thai leave no blanks between words; each of their characters counts as one.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
PIECES = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
# a run of n characters holds n // STRIDE of every STRIDE-th; looking at those first is quick
STRIDE = 100
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
NO_LETTERS = bytes(b for b in range(128) if not chr(b).isalpha())


@cache
def limits() -> SimpleNamespace:
    """The limits of the gate `corpus.filters`, by name."""
    return SimpleNamespace(
        **{name: limit.value for name, limit in load_spec().gates["corpus.filters"].limits.items()}
    )


def rejection(text: str, languages: str | tuple[str, ...]) -> str | None:
    """Why a document may not be trained on, as a reason code, or None.
    Pure: the same text always gives the same answer.
    """
    languages = (languages,) if isinstance(languages, str) else languages
    if languages == Pangram.languages:
        return None
    return next(
        (reason for reason, unfit in RULES.items() if unfit(text, languages, limits())), None
    )


def _too_short(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    return len(text) < limit.chars_min


def _broken_text(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """NUL bytes, or replacement characters of bytes that could not be decoded."""
    return "\0" in text or "\ufffd" in text


def _blank_run(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """White space without end, on which tokenizers choke."""
    n = int(limit.blank_run_chars_max) + 1
    if len(text) < n or not _blanks(n // STRIDE).search(text[::STRIDE]):
        return False
    return _blanks(n).search(text) is not None


@cache
def _blanks(n: int) -> re.Pattern:
    return re.compile(rf"\s{{{n}}}")


def _long_paragraph(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """A stretch without a line end that no context holds: minified code, a table on one line, a
    text that lost its lines.
    """
    return (
        len(text) > limit.paragraph_chars_max
        and max(map(len, text.split("\n"))) > limit.paragraph_chars_max
    )


@cache
def _letters_of(scripts: tuple[str, ...]) -> re.Pattern:
    """Letters of scripts."""
    return re.compile(f"(?=[^\\W\\d_])[{''.join(SCRIPTS[s] for s in scripts)}]")


def _foreign_script(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """Too many letters of other scripts, or hardly any of the declared ones."""
    if any(SCRIPTS_OF[language] == ("latin",) for language in languages) and text.isascii():
        return False
    scripts = tuple(s for language in languages for s in SCRIPTS_OF[language])
    n_ascii = len(text.encode("ascii", "ignore").translate(None, NO_LETTERS))
    other = "".join(NOT_ASCII.findall(text))
    letters = n_ascii + sum(map(str.isalpha, other))
    if not letters:
        return False
    # Latin is never foreign: names, units and formulas are written in it.
    foreign = letters - n_ascii - len(_letters_of(("latin", *scripts)).findall(other))
    own = len(_letters_of(scripts).findall(other)) + (n_ascii if "latin" in scripts else 0)
    return foreign > limit.foreign_letters_max * letters or own < limit.own_letters_min * letters


def first_user_turn(text: str) -> str | None:
    """The first user turn of a chat (`> user / < assistant / > …`),
    or None for a text of another form.

    Turns end at " / " with spaces before the mark of the next speaker;
    a bare "/" is part of an address or a path.
    """
    if not text.startswith(USER) or f"{TURN}{ASSISTANT}" not in text:
        return None
    return NEXT_TURN.split(text[len(USER) :], maxsplit=1)[0]


def has_system_prompt_shape(turn: str, limit: SimpleNamespace) -> bool:
    """Whether a user turn is built like a system prompt: by headers, length and phrases,
    never by single characters.
    """
    headers = len(HEADER.findall(turn))
    if headers >= limit.headers_min or (
        headers >= limit.headers_with_length_min and len(turn) >= limit.headed_chars_min
    ):
        return True
    return any(f in turn for f in FINGERPRINTS) and (
        headers >= 1 or len(turn) >= limit.fingerprint_chars_min
    )


def _system_prompt(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    turn = first_user_turn(text)
    return turn is not None and has_system_prompt_shape(turn, limit)


def _chat_turns(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """A chat whose turns are empty or do not alternate between user and assistant."""
    if first_user_turn(text) is None:
        return False
    return not takes_turns(NEXT_TURN.split(text))


def takes_turns(turns: list[str]) -> bool:
    """Whether turns of user and assistant alternate, the user's first, at least one of each, none
    of them empty.
    """
    return len(turns) > 1 and all(
        t[2:].strip() and t[:2] == (USER, ASSISTANT)[i % 2] for i, t in enumerate(turns)
    )


@lru_cache(maxsize=1)
def _words(text: str) -> tuple[list[str], int]:
    """The words of a text, and how many of its pairs of neighbours were there before; a bound on
    every kind of repetition.
    """
    folded = text.casefold()
    words = PIECES.findall(folded) if HAS_UNSPACED.search(folded) else folded.split()
    return words, max(0, len(words) - 1) - len(set(zip(words, words[1:])))


def _hashes(words: list[str]) -> np.ndarray:
    """One number per word; equal words are equal within this process."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _low_diversity(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """Too many runs of words in which the same pairs come again and again."""
    words, n_repeated = _words(text)
    n, window = len(words) - 1, int(limit.diversity_window_words)
    if (
        n < limit.diversity_words_min
        or n_repeated <= (1 - limit.distinct_pairs_min) * min(n, window) - 1
    ):
        return False
    if n <= window:
        return n - n_repeated < limit.distinct_pairs_min * n
    value = _hashes(words)
    with np.errstate(over="ignore"):
        pairs = value[:-1] * MULTIPLIER ^ value[1:]
    starts = np.arange(0, n - window + 1, window // 2)
    rows = np.sort(pairs[starts[:, None] + np.arange(window)], axis=1)
    distinct = 1 + (rows[:, 1:] != rows[:, :-1]).sum(1)
    poor = (distinct < limit.distinct_pairs_min * window).mean()
    return bool(
        poor > (limit.code_poor_windows_max if "code" in languages else limit.poor_windows_max)
    )


def _repetition(text: str, languages: tuple[str, ...], limit: SimpleNamespace) -> bool:
    """A large part of the text are long word runs that it already had:
    whole sentences or blocks again.
    """
    words, n_repeated = _words(text)
    run = int(limit.repeated_run_words)
    allowed = limit.code_repeated_runs_max if "code" in languages else limit.repeated_runs_max
    n = len(words) - run + 1
    if n < run or n_repeated <= allowed * n:  # a repeated run begins with a repeated pair
        return False
    value, total = _hashes(words), np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for k in range(run):
            total = total * MULTIPLIER + value[k : k + n]
    return 1 - len(np.unique(total)) / n > allowed


RULES: dict[str, Callable[[str, tuple[str, ...], SimpleNamespace], bool]] = {
    "too-short": _too_short,
    "broken-text": _broken_text,
    "blank-run": _blank_run,
    "system-prompt": _system_prompt,
    "chat-turns": _chat_turns,
    "long-paragraph": _long_paragraph,
    "foreign-script": _foreign_script,
    "low-diversity": _low_diversity,
    "repetition": _repetition,
}


def fingerprint(names: Iterable[str]) -> str:
    """Hash of everything that decides what is dropped: these rules, their limits,
    and the source of every plug-in's module. Imports nothing.
    """
    rules = inspect.getsource(sys.modules[__name__])
    return sha256_json([vars(limits()), [rules, *map(plugins.source, names)]])


def reason_to_drop(text: str, languages: tuple[str, ...], extra: Iterable[Plugin]) -> str | None:
    """The first built-in rule or plug-in that rejects a document.
    Raises ConfigError if a plug-in fails.
    """
    if (reason := rejection(text, languages)) is not None:
        return reason
    for plugin in extra:
        try:
            if plugin.function(text, languages):
                return f"plugin:{plugin.name}"
        except Exception as e:
            raise ConfigError(
                f"the filter {plugin.name} failed: {type(e).__name__}: {e}",
                next_step="repair it, or take it out",
            ) from e
    return None
