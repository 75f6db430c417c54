"""Gates of the texts that a run samples: coherence, dominant words and loops."""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from stackproof.contracts.events import Event, Sampled, Started
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide, decides, failed, passed

WINDOW, STRIDE = 32, 16
PASSAGE = 6  # words of a passage that healthy text hardly ever repeats
LONGEST_LOOP = 512  # units of the longest period that is searched at the end of a text
LONG_UNIT, PIECE, BLANK_RUN = 24, 6, 16
RULING = re.compile(r"(\W)\1{3,}")  # one sign, four times or more
VOWELS = set("aeiouy")
COMMON_EN = frozenset(
    re.split(
        r"\s+",
        """the of and to in a is that for it as was with be by on not he i this are or his from at which but have an had they you were
    their one all we can her has there been if more when will would who so no she my your its than them then now only do did does some
    could time these two may first any like other into our over out up about what after new such me him us also most made many must
    before should very where through back much own see how because each just those people mr way use used using get set go make
    between being under never same another while last might here even both without part again off down well too year years day long
    work against right still know take good found found men thing come world same think little old life every three upon say said
    great since however since state true false none object value values return returns name type list string file function method
    class code data number default given text line""",  # noqa: E501
    )
)


PARTS = ("bigram", "trigram", "words", "letters")


@dataclass(frozen=True)
class Coherence:
    """The score of a text, 0-100; the parts that it is the sum of, and further measurements that
    are reported but not added.
    """

    score: float
    parts: Mapping[str, float]


def coherence(text: str, language: str = "en") -> Coherence:
    """Score of how much a text resembles writing rather than a loop. `language` is en, code or any.

    Units are lower-cased words without outer punctuation; a unit of punctuation only counts as one
    symbol. Diversity D_k is the share of distinct k-grams, averaged over windows of 32 k-grams
    (stride 16), so that it does not sink with the length of a text. Score = F · (35·ramp(D_2; 0.2,
    0.6) + 35·ramp(D_3; 0.3, 0.8) + 20·(share of word-like units) + 10·min(1, distinct letters /
    16)). F = ramp(share of distinct 6-grams in the whole text; 0.4, 0.7) lowers it for loops of
    whole sentences or paragraphs, which windows of 32 do not show. For the interpreter's help
    topics, and any four of them in a row, the least share is 0.69; a passage that comes three times
    has 0.41 or less. An empty text scores 0. Source: the founding note ANDREA-120M.

    Also reported: the share of the most frequent unit, the share of the text that is a loop of
    three rounds or more at its end, and its size under zlib as a share.
    """
    units = _units(text)
    if not units:
        return Coherence(
            0.0,
            dict.fromkeys(
                (*PARTS, "distinct_frac", "top_unit_frac", "loop_frac", "compressed_frac"), 0.0
            ),
        )
    wordlike = WORDLIKE[language]
    passages = _grams(units, PASSAGE)
    distinct = len(set(passages)) / len(passages)
    full = {
        "bigram": 35 * _ramp(_diversity(units, 2), 0.2, 0.6),
        "trigram": 35 * _ramp(_diversity(units, 3), 0.3, 0.8),
        "words": 20 * sum(wordlike(u) for u in units) / len(units),
        "letters": 10 * min(1.0, len({c for c in text.lower() if c.isalpha()}) / 16),
    }
    shown = {name: part * _ramp(distinct, 0.4, 0.7) for name, part in full.items()}
    score = sum(shown.values())
    raw = text.encode()
    top = Counter(units).most_common(1)[0][1] / len(units)
    shown |= {"distinct_frac": distinct, "top_unit_frac": top, "loop_frac": looping_end(units)}
    shown |= {"compressed_frac": len(zlib.compress(raw, 9)) / len(raw)}
    return Coherence(round(score, 4), {k: round(v, 4) for k, v in shown.items()})


def _units(text: str) -> list[str]:
    """Words, and symbols for punctuation and long runs of blanks. A run too long to be a word is
    cut into pieces.
    """
    units: list[str] = []
    for blank, raw in re.findall(r"(\s+)|(\S+)", text.lower()):
        if blank:
            units += ["<s>"] * (len(blank) // BLANK_RUN)
            continue
        word = re.sub(r"^\W+|\W+$", "", raw)
        if not word:
            units += ["<p>"] * (1 + len(raw) // LONG_UNIT * (LONG_UNIT // PIECE))
        else:
            units += _pieces(word) if len(word) > LONG_UNIT else [word]
    return units


def _pieces(run: str) -> list[str]:
    """Cut an unbroken run behind characters whose code is divisible by 4, so that a loop is cut
    alike in each of its rounds.
    """
    pieces = [""]
    for char in run:
        pieces[-1] += char
        if ord(char) % 4 == 0 or len(pieces[-1]) == 2 * PIECE:
            pieces.append("")
    return [p for p in pieces if p]


def looping_end(units: Sequence[str]) -> float:
    """Share of a text that is a loop at its end: a period of one to LONGEST_LOOP units, three
    rounds or more.
    """
    longest = 0
    for period in range(1, min(len(units) // 3, LONGEST_LOOP) + 1):
        same = 0
        while same < len(units) - period and units[-1 - same] == units[-1 - same - period]:
            same += 1
        longest = max(longest, same + period if same >= 2 * period else 0)
    return longest / len(units)


def _grams(units: Sequence[str], k: int) -> list[tuple[str, ...]]:
    """All runs of k units; the whole, where there are fewer."""
    return [tuple(units[i : i + k]) for i in range(max(1, len(units) - k + 1))]


def _diversity(units: Sequence[str], k: int) -> float:
    """Distinct over total k-grams, averaged over sliding windows;
    1 for a text of fewer than k units.
    """
    grams = _grams(units, k)
    starts = range(0, max(1, len(grams) - WINDOW + STRIDE), STRIDE)
    shares = [len(set(part)) / len(part) for s in starts if (part := grams[s : s + WINDOW])]
    return sum(shares) / len(shares)


def _ramp(x: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (x - low) / (high - low)))


def _english(unit: str) -> float:
    """A common word, a short number, or letters in a shape English words have."""
    if unit in COMMON_EN or re.fullmatch(r"[+-]?\d[\d.,:/%-]{0,9}", unit):
        return 1.0
    for part in re.split(r"['’\-–_./()=,:]", unit):
        if part and not (part.isalpha() and 2 <= len(part) <= 20 and VOWELS & set(part)):
            return 0.0
    return float(
        not re.search(r"[^aeiouy\W\d_]{6}|(.)\1\1", unit) and any(c.isalpha() for c in unit)
    )


def _program(unit: str) -> float:
    """An identifier, number, string or call as programs are made of; a lone operator."""
    return float(
        unit != "<s>"
        and re.fullmatch(r"[\w.,:;=+\-*/%<>!&|^~@#$?()\[\]{}'\"`\\]{1,60}", unit, re.ASCII)
        is not None
    )


def _letters_share(unit: str) -> float:
    """Share of letters, marks and digits in the unit."""
    return 0.0 if unit in ("<p>", "<s>") else sum(c.isalnum() for c in unit) / len(unit)


WORDLIKE: dict[str, Callable[[str], float]] = {
    "en": _english,
    "code": _program,
    "any": _letters_share,
}


@decides("sampling.coherence")
class CoherenceWatch(RuntimeCheck):
    """Red if more samples in a row have a low score than allowed."""

    events = (Sampled,)
    kept = ("low",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.low = 0

    def observe(self, event: Event) -> Verdict:
        result = coherence(event.text, event.language)
        self.low = self.low + 1 if not result.score >= self.limits.score_min else 0
        return decide(
            self.low <= self.limits.low_in_a_row_max,
            f"step {event.step}: coherence {result.score:.1f} of 100 is the {self.low}th low "
            f"score in a row: {event.text[:60]!r}",
            score=result.score,
            low_in_a_row=self.low,
            **result.parts,
        )


@decides("sampling.dominance")
class Dominance(RuntimeCheck):
    """Red if a single word has too large a share in more samples in a row than allowed.

    A model that has learned only the frequencies of words repeats the most frequent one. Samples of
    the warm-up do not count. The first such sample is a warning: a green verdict with a message.
    """

    events = (Started, Sampled)
    kept = ("high",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.high, self.warmup_steps = 0, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.warmup_steps = event.plan.get("warmup_steps", 0)
            return None
        words = [u for u in _units(event.text) if u[0].isalpha()]
        word, n = Counter(words).most_common(1)[0] if words else ("", 0)
        share = n / len(words) if len(words) >= self.limits.words_min else 0.0
        self.high = (
            self.high + 1
            if share > self.limits.top_word_frac_max and event.step > self.warmup_steps
            else 0
        )
        message = (
            f"step {event.step}: {word!r} is {share:.0%} of the words, in the {self.high}th "
            "sample in a row"
        )
        measured = {"top_word": word, "top_word_frac": share, "high_in_a_row": self.high}
        return (passed if self.high <= self.limits.high_in_a_row_max else failed)(
            message if self.high else "", **measured
        )


@decides("sampling.loops")
class Loops(RuntimeCheck):
    """Red if `in_a_row` samples after the warm-up end in a loop or become very short under zlib.

    A line of one repeated sign does not count as a loop; it is shortened before the sample is
    judged. A text of nothing else is judged by `sampling.coherence`.
    """

    events = (Started, Sampled)
    kept = ("in_a_row",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.warmup_steps, self.in_a_row = 0, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.warmup_steps = event.plan.get("warmup_steps", 0)
            return None
        text = RULING.sub(lambda line: line[0][:3], event.text)
        parts = coherence(text, event.language).parts
        packed = parts["compressed_frac"] if len(text) >= self.limits.chars_min else 1.0
        looping = (
            parts["loop_frac"] > self.limits.loop_frac_max
            or packed < self.limits.compressed_frac_min
        )
        self.in_a_row = self.in_a_row + 1 if looping and event.step > self.warmup_steps else 0
        return decide(
            self.in_a_row < self.limits.in_a_row,
            f"step {event.step}: {parts['loop_frac']:.0%} of the sample loops at its end, zlib "
            f"leaves {packed:.0%}, for the {self.in_a_row}th sample in a row: {event.text[-50:]!r}",
            loop_frac=parts["loop_frac"],
            compressed_frac=packed,
            in_a_row=self.in_a_row,
        )
