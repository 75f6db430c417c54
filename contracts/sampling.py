"""Gates of sampling: cached decoding equals the full forward, draws follow the declared distribution, text stays coherent."""

import math
import re
import statistics
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from contracts.events import Event, Sampled, Started
from contracts.gate import Verdict, decide, decides, failed

# --- coherence ------------------------------------------------------------------------------------------------------

WINDOW, STRIDE = 32, 16
LONG_UNIT, PIECE, BLANK_RUN = 24, 6, 16
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
    class code data number default given text line""",
    )
)


@dataclass(frozen=True)
class Coherence:
    """A text's score, 0-100, with the parts it is the sum of, and further signs that are reported but not added."""

    score: float
    parts: Mapping[str, float]


def coherence(text: str, language: str = "en") -> Coherence:
    """How much a text looks like writing and how little like a loop. `language` is en, code or any.

    Units are lower-cased words without outer punctuation; a unit of punctuation only counts as one symbol. Diversity D_k is the
    share of distinct k-grams, averaged over windows of 32 k-grams (stride 16), so that it does not sink with the length of a text.
    Score = 35·ramp(D_2; 0.2, 0.6) + 35·ramp(D_3; 0.3, 0.8) + 20·(share of word-like units) + 10·min(1, distinct letters / 16).
    An empty text scores 0. Source: the founding note ANDREA-120M.
    """
    units = _units(text)
    if not units:
        return Coherence(0.0, dict.fromkeys(("bigram", "trigram", "words", "letters", "top_unit_frac", "compressed_frac"), 0.0))
    wordlike = WORDLIKE[language]
    shown = {
        "bigram": 35 * _ramp(_diversity(units, 2), 0.2, 0.6),
        "trigram": 35 * _ramp(_diversity(units, 3), 0.3, 0.8),
        "words": 20 * sum(wordlike(u) for u in units) / len(units),
        "letters": 10 * min(1.0, len({c for c in text.lower() if c.isalpha()}) / 16),
    }
    score = sum(shown.values())
    raw = text.encode()
    top = Counter(units).most_common(1)[0][1] / len(units)
    shown |= {"top_unit_frac": top, "compressed_frac": len(zlib.compress(raw, 9)) / len(raw)}
    return Coherence(round(score, 4), {k: round(v, 4) for k, v in shown.items()})


def _units(text: str) -> list[str]:
    """Words, symbols for punctuation and for long blank runs; a run too long to be a word is cut into pieces."""
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
    """Cut an unbroken run behind characters whose code is divisible by 4, so that a loop is cut alike in each of its rounds."""
    pieces = [""]
    for char in run:
        pieces[-1] += char
        if ord(char) % 4 == 0 or len(pieces[-1]) == 2 * PIECE:
            pieces.append("")
    return [p for p in pieces if p]


def _diversity(units: Sequence[str], k: int) -> float:
    """Distinct over total k-grams, averaged over sliding windows; 1 for a text of fewer than k units."""
    grams = [tuple(units[i : i + k]) for i in range(max(1, len(units) - k + 1))]
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
    return float(not re.search(r"[^aeiouy\W\d_]{6}|(.)\1\1", unit) and any(c.isalpha() for c in unit))


def _program(unit: str) -> float:
    """An identifier, number, string or call as programs are made of; a lone operator."""
    return float(unit != "<s>" and re.fullmatch(r"[\w.,:;=+\-*/%<>!&|^~@#$?()\[\]{}'\"`\\]{1,60}", unit, re.ASCII) is not None)


def _letters_share(unit: str) -> float:
    """Share of letters, marks and digits in the unit."""
    return 0.0 if unit in ("<p>", "<s>") else sum(c.isalnum() for c in unit) / len(unit)


WORDLIKE: dict[str, Callable[[str], float]] = {"en": _english, "code": _program, "any": _letters_share}


@decides("sampling.coherence")
class CoherenceWatch:
    """Red at the sample that makes one more low score in a row than is allowed; a good sample starts the count afresh."""

    events = (Sampled,)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.low = limits, 0

    def observe(self, event: Event) -> Verdict:
        result = coherence(event.text, event.language)
        self.low = self.low + 1 if not result.score >= self.limits.score_min else 0
        return decide(
            self.low <= self.limits.low_in_a_row_max,
            f"step {event.step}: coherence {result.score:.1f} of 100 is the {self.low}th low score in a row: {event.text[:60]!r}",
            score=result.score,
            low_in_a_row=self.low,
            **result.parts,
        )

    def state_dict(self) -> dict:
        return {"low": self.low}

    def load_state_dict(self, state: dict) -> None:
        self.low = state["low"]


@decides("sampling.dominance")
class Dominance:
    """Red at the sample that makes one more in a row than is allowed in which a single word has too large a share.

    A model that has only learnt how frequent words are says the most frequent one too often; samples of the warm-up do not count.
    """

    events = (Started, Sampled)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.high, self.warmup_steps = limits, 0, 0

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.warmup_steps = event.plan.get("warmup_steps", 0)
            return None
        words = [u for u in _units(event.text) if u[0].isalpha()]
        word, n = Counter(words).most_common(1)[0] if words else ("", 0)
        share = n / len(words) if len(words) >= self.limits.words_min else 0.0
        self.high = self.high + 1 if share > self.limits.top_word_frac_max and event.step > self.warmup_steps else 0
        return decide(
            self.high <= self.limits.high_in_a_row_max,
            f"step {event.step}: {word!r} is {share:.0%} of the words, in the {self.high}th sample in a row",
            top_word=word,
            top_word_frac=share,
            high_in_a_row=self.high,
        )

    def state_dict(self) -> dict:
        return {"high": self.high}

    def load_state_dict(self, state: dict) -> None:
        self.high = state["high"]


@decides("sampling.memorised")
class Memorised:
    """A sample the model finds far too easy must not be a passage of the training text."""

    events = (Sampled,)

    def __init__(self, limits: SimpleNamespace):
        self.limits, self.losses = limits, deque(maxlen=32)

    def observe(self, event: Event) -> Verdict | None:
        if event.loss_nats is None:
            return None
        usual = self.losses if len(self.losses) >= self.limits.known_samples_min else None
        low = statistics.mean(usual) - self.limits.sigmas_below * statistics.stdev(usual) if usual else -math.inf
        suspicious = event.loss_nats < max(low, self.limits.loss_nats_min)
        if not suspicious:
            self.losses.append(event.loss_nats)
        found = event.found_in_corpus() if suspicious and event.found_in_corpus else 0.0
        return decide(
            found <= self.limits.found_frac_max,
            f"step {event.step}: loss {event.loss_nats:.2f} on its own sample, {found:.0%} of which is training text: {event.text[:60]!r}",
            sample_loss_nats=event.loss_nats,
            suspicious=suspicious,
            found_frac=found,
        )

    def state_dict(self) -> dict:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])


# --- cached decoding ------------------------------------------------------------------------------------------------


@decides("sampling.cache-parity")
@torch.no_grad()
def cache_parity(
    limits: SimpleNamespace,
    *,
    full_logits: Callable[[Tensor], Tensor],
    cached_logits: Callable[[Tensor, Any], Tensor],
    make_cache: Callable[[int], Any],
    vocab_size: int,
    max_seq_len: int,
) -> Verdict:
    """Reading a text in one piece, token by token, and in chunks gives the same logits at every position, up to the last one.

    `full_logits(ids_BT)` reads without cache, `cached_logits(ids_BT, cache)` continues what `make_cache(batch_size)` holds.
    """
    length = min(max_seq_len, 512)
    ids = torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(21))
    expected = full_logits(ids)
    scale = float(expected.double().std())
    short = min(length, 24)
    ways = {
        "token by token": [1] * short,
        "in chunks": _chunks(short),
        "to the end of the context": [length - 3, 1, 1, 1] if length > 3 else [1] * length,
    }
    errors = {}
    for name, sizes in ways.items():
        cache, got, start = make_cache(len(ids)), [], 0
        for size in sizes:
            got.append(cached_logits(ids[:, start : start + size], cache))
            start += size
        errors[name] = float((torch.cat(got, 1) - expected[:, :start]).abs().max()) / scale
    worst = max(errors, key=lambda k: errors[k] if math.isfinite(errors[k]) else math.inf)
    ok = all(e <= limits.rel_error_max for e in errors.values())
    return decide(
        ok, f"decoding with the cache differs from the full forward ({worst})", rel_error=errors[worst], worst=worst, tokens=length
    )


def _chunks(length: int) -> list[int]:
    """Chunk lengths 5, 1, 2, 3, 5, 1, … that add up to `length`."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min((5, 1, 2, 3)[len(sizes) % 4], length - sum(sizes)))
    return sizes


# --- the distribution of draws --------------------------------------------------------------------------------------

PROBS = (0.40, 0.25, 0.0, 0.15, 0.10, 0.06, 0.04, 0.0)


@decides("sampling.distribution")
def distribution(limits: SimpleNamespace, *, filtered_probs: Callable[..., Tensor], pick: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Filters keep exactly the sets they declare, impossible tokens cannot be drawn, and counts follow the probabilities.

    `filtered_probs(logits_V, temperature=, top_k=, top_p=)` gives probabilities; `pick(probs_V, uniforms_R)` gives ids.
    """
    probs = torch.tensor(PROBS, dtype=torch.float64)
    logits = probs.log()
    wrong = [name for name, (options, kept) in _supports().items() if _support(filtered_probs(logits, **options)) != kept]
    off = _identity_error(filtered_probs, logits, probs)
    impossible = _impossible_draws(pick, probs)
    chi_square, p_value = _chi_square(filtered_probs, pick, logits, probs, int(limits.draws_min))
    if wrong:
        return failed(f"the kept set is wrong for: {', '.join(wrong)}", wrong_supports=len(wrong), impossible_draws=impossible)
    ok = off <= limits.abs_error_max and impossible == 0 and p_value >= limits.p_value_min
    text = "a token of probability 0 was drawn" if impossible else "draws or probabilities do not follow the declared distribution"
    return decide(ok, text, abs_error=off, impossible_draws=impossible, p_value=p_value, chi_square=chi_square, wrong_supports=0)


def _supports() -> dict[str, tuple[dict[str, Any], set[int]]]:
    """Settings of the filters and the ids they must keep of PROBS, worked out by hand."""
    every = {0, 1, 3, 4, 5, 6}
    return {
        "no filter": ({"temperature": 1.0}, every),
        "top_k 0": ({"temperature": 1.0, "top_k": 0}, every),
        "top_k above V": ({"temperature": 1.0, "top_k": 99}, every),
        "top_k 1": ({"temperature": 1.0, "top_k": 1}, {0}),
        "top_k 3": ({"temperature": 1.0, "top_k": 3}, {0, 1, 3}),
        "top_p 1": ({"temperature": 1.0, "top_p": 1.0}, every),
        "top_p 0.01 keeps the first": ({"temperature": 1.0, "top_p": 0.01}, {0}),
        "top_p 0.5 keeps the crossing token": ({"temperature": 1.0, "top_p": 0.5}, {0, 1}),
        "top_p 0.7 keeps the crossing token": ({"temperature": 1.0, "top_p": 0.7}, {0, 1, 3}),
        "top_p after temperature": ({"temperature": 0.5, "top_p": 0.7}, {0, 1}),
        "top_k, then top_p of the rest": ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, {0, 1}),
        "temperature 0": ({"temperature": 0.0}, {0}),
        "temperature 0 with filters": ({"temperature": 0.0, "top_k": 3, "top_p": 0.9}, {0}),
    }


def _support(probs_V: Tensor) -> set[int]:
    return set(probs_V.nonzero().flatten().tolist())


def _identity_error(filtered_probs: Callable[..., Tensor], logits: Tensor, probs: Tensor) -> float:
    """Largest difference to probabilities known in closed form: unfiltered, sharpened, and cut to two tokens."""
    sharpened = probs.square() / probs.square().sum()
    cut = torch.zeros_like(probs)
    cut[:2] = probs[:2] / probs[:2].sum()
    cases = (({"temperature": 1.0}, probs), ({"temperature": 0.5}, sharpened), ({"temperature": 1.0, "top_k": 2}, cut))
    return max(float((filtered_probs(logits, **options).double() - expected).abs().max()) for options, expected in cases)


def _impossible_draws(pick: Callable[[Tensor, Tensor], Tensor], probs: Tensor) -> int:
    """Draws of an id of probability 0 at the edges of every interval, for impossible ids at the front, inside and at the end."""
    drawn = 0
    for shift in range(len(probs)):
        shifted = probs.roll(shift)
        edges = torch.cat((torch.zeros(1, dtype=torch.float64), shifted.cumsum(0))).clamp(max=1)
        uniforms = torch.cat((edges, torch.nextafter(edges, torch.zeros_like(edges)), torch.nextafter(edges, torch.ones_like(edges))))
        uniforms = torch.cat((uniforms.clamp(0, 1), torch.tensor([0.0, 5e-324, 1 - 2**-53, 1 - 2**-24, 1.0], dtype=torch.float64)))
        drawn += int((shifted[pick(shifted, uniforms)] == 0).sum())
    return drawn


def _chi_square(filtered_probs: Callable, pick: Callable, logits: Tensor, probs: Tensor, draws: int) -> tuple[float, float]:
    """Pearson's statistic of `draws` draws with a fixed seed and its p-value (Wilson-Hilferty), over the possible ids."""
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = pick(filtered_probs(logits, temperature=1.0), uniforms).bincount(minlength=len(probs)).double()
    possible = probs > 0
    expected = probs[possible] * draws
    statistic, k = float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return statistic, 0.5 * math.erfc(z / math.sqrt(2))
