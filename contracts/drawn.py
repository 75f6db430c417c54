"""Gate of drawn texts: every token follows from the prompt, the options and random numbers.

T tokens, V vocab
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackproof.contracts.events import Event, Sampled, TextDrawn
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide_all, decides, measured_by, worst

if TYPE_CHECKING:
    from stackproof.contracts.subject import TextTokenizer

IMPOSSIBLE = 1.0  # distance of a token that the filters exclude
CLOSE = 1e-5  # a filter whose border is this close to a token keeps it or not by rounding

# Logits (n, V) float32 of the last n positions of a row of ids, by the full forward without a
# cache, in evaluation mode.
LastLogits = Callable[[list[int], int], Tensor]


@dataclass(frozen=True)
class DrawOptions:
    """How a text is declared to be drawn. A temperature of 0 is greedy, `top_k` 0 and `top_p` 1
    keep all tokens. `eos_id` ends a text; None: nothing does.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_id: int | None = None


def follow(
    last_logits: LastLogits,
    tokenizer: TextTokenizer,
    prompt: str,
    ids: Sequence[int],
    text: str,
    options: DrawOptions,
    chance: torch.Generator | None,
    max_seq_len: int,
    step: int = 0,
) -> TextDrawn:
    """Compare drawn `ids` and their `text` with what a full forward over the declared prompt,
    which an end-of-text token begins, gives under `options`. `chance` is a fresh generator of the
    declared seed, one float64 per token; None for a greedy text.

    Beyond `max_seq_len` tokens the model continues with the last half of its context.
    """
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt).ids]
    first, ended = len(tokens), len(ids) < options.max_new_tokens
    tokens += ids
    if ended and options.eos_id is not None:
        tokens.append(options.eos_id)
    distances: list[float] = []
    start, at = 0, first
    while at < len(tokens):
        if at - start > max_seq_len:
            start = at - max(1, max_seq_len // 2)
        stop = min(len(tokens), start + max_seq_len + 1)
        logits_TV = last_logits(tokens[start : stop - 1], stop - at).double()
        for logits_V in logits_TV:
            distances.append(_distance(logits_V, tokens[start:at], tokens[at], options, chance))
            at += 1
    ended = ended and options.eos_id is not None
    return TextDrawn(
        step,
        distances=tuple(distances),
        greedy=options.temperature == 0,
        ended=ended,
        n_unfinished=0 if ended else len(ids) - options.max_new_tokens,
        is_text=text == tokenizer.decode(list(ids)),
    )


def _distance(
    logits_V: Tensor,
    seen: Sequence[int],
    token: int,
    options: DrawOptions,
    chance: torch.Generator | None,
) -> float:
    """How far a token is from the one that follows: of a greedy one in logits, of a drawn one the
    distance of the uniform number from its interval of the cumulative distribution.
    """
    logits_V = _penalised(logits_V, seen, options.repetition_penalty)
    if options.temperature == 0:
        return float(logits_V.max() - logits_V[token])
    u = float(torch.rand(1, generator=chance, dtype=torch.float64))
    ordered_V, order_V = (logits_V / options.temperature).sort(descending=True, stable=True)
    k = min(options.top_k or len(order_V), len(order_V))
    probs_K = ordered_V[:k].softmax(-1)
    before_K = probs_K.cumsum(-1) - probs_K
    n = int((before_K < options.top_p).sum())
    close = k < len(order_V) and float(ordered_V[k - 1] - ordered_V[k]) < CLOSE
    if options.top_p < 1:
        close = close or float((before_K - options.top_p).abs().min()) < CLOSE
    if close:
        return 0.0
    kept, by_id = order_V[:n].sort()
    probs_N = ordered_V[:n].softmax(-1)[by_id]
    after_N, place = probs_N.cumsum(-1), (kept == token).nonzero()
    if not len(place):
        return IMPOSSIBLE
    above = float(after_N[place[0, 0]])
    return max(0.0, above - float(probs_N[place[0, 0]]) - u, u - above)


def _penalised(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Tokens that were seen become less likely, whatever the sign of their logit.
    Source: arXiv:1909.05858, sec. 4.1.
    """
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    old = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(old > 0, old / penalty, old * penalty))


def problems(drawn: TextDrawn, limits: SimpleNamespace) -> list[str]:
    """What of a drawn text does not follow; empty if all of it does."""
    allowed = limits.greedy_gap_max if drawn.greedy else limits.distance_max
    wrong = sum(not d <= allowed for d in drawn.distances)
    found = []
    if wrong > limits.wrong_frac_max * len(drawn.distances):
        found.append(
            f"{wrong} of {len(drawn.distances)} tokens do not follow from the prompt, the declared "
            "options and the seed"
        )
    if drawn.ended and not drawn.distances[-1] <= allowed:
        found.append("it ends where its end-of-text token does not follow")
    if drawn.n_unfinished:
        found.append(f"{drawn.n_unfinished:+d} tokens beside those that were declared")
    if not drawn.is_text:
        found.append("the text is not that of the drawn tokens")
    return found


@decides("sampling.drawn")
@measured_by(follow)
class TextFollows(RuntimeCheck):
    """Every token of a sample is the one that the declared prompt, options and seed give."""

    events = (Sampled, TextDrawn)

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Sampled):
            return None
        return decide_all(
            problems(event, self.limits),
            f"step {event.step}: ",
            n_tokens=len(event.distances),
            largest_distance=worst(event.distances, 0.0),
        )
