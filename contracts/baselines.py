"""Gate of the baselines beside a held-out score: each is the declared model of the tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from stackproof.contracts.gate import Verdict, decide, decides, worst
from stackproof.contracts.subject import Subject

VOCAB_SIZE, TRAINED, HELD_OUT = 11, 400, 90


class _Tokens:
    """A stream of given ids, as the splits of a data set."""

    def __init__(self, ids: np.ndarray):
        self.ids, self.n_tokens = ids, len(ids)

    def token_range(self, first: int, stop: int) -> np.ndarray:
        return self.ids[first:stop]


@decides("evaluation.baselines")
def baselines(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The unigram and the bigram baseline, on few tokens, equal their formulas in plain loops. Some
    held-out tokens and pairs are not among the trained ones, and tokens have 0 to 3 bytes.
    """
    draw = np.random.default_rng(17)
    trained = draw.choice(VOCAB_SIZE - 1, TRAINED, p=_falling(VOCAB_SIZE - 1))
    held_out = draw.integers(0, VOCAB_SIZE, HELD_OUT)
    sizes = np.arange(VOCAB_SIZE) % 4
    tokenizer = SimpleNamespace(vocab_size=VOCAB_SIZE, token_bytes=sizes.astype(np.int32))
    found = subject.evaluation.baselines(_Tokens(trained), _Tokens(held_out), tokenizer)
    truth = {
        "baseline_unigram_bits_per_byte": _bits(trained, held_out, sizes, _unigram),
        "baseline_bigram_bits_per_byte": _bits(trained, held_out, sizes, _bigram),
    }
    errors = {name: abs(found.get(name, math.inf) - bits) / bits for name, bits in truth.items()}
    name = max(errors, key=errors.get)
    return decide(
        worst(errors.values()) <= limits.baseline_rel_error_max,
        f"{name} is {found.get(name)}, its formula gives {truth[name]:.6g}",
        baseline_rel_error=worst(errors.values()),
        compared=len(errors),
    )


def _falling(n: int) -> np.ndarray:
    weights = 1 / np.arange(1, n + 1)
    return weights / weights.sum()


def _bits(trained: np.ndarray, held_out: np.ndarray, sizes: np.ndarray, law) -> float:
    """Bits per byte of all held-out tokens but the first, which has none before it."""
    ids, known = held_out.tolist(), trained.tolist()
    nats = [-math.log(law(known, before, token)) for before, token in zip(ids, ids[1:])]
    return math.fsum(nats) / math.log(2) / sum(int(sizes[token]) for token in ids[1:])


def _unigram(known: Sequence[int], before: int, token: int) -> float:
    """(count + 1) / (n + V)."""
    return (Counter(known)[token] + 1) / (len(known) + VOCAB_SIZE)


def _bigram(known: Sequence[int], before: int, token: int) -> float:
    """Witten-Bell: (count(a, b) + k(a)·p(b)) / (count(a) + k(a)), k(a) the kinds seen after a."""
    after = Counter(b for a, b in zip(known, known[1:]) if a == before)
    kinds = max(1, len(after))
    return (after[token] + kinds * _unigram(known, before, token)) / (sum(after.values()) + kinds)
