"""Gates of sampling: cached decoding equals the full forward,
and draws follow the declared distribution.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide, decides, failed, worst, worst_at
from stackproof.contracts.generation import contextual_model
from stackproof.contracts.subject import Subject

# --- cached decoding ------------------------------------------------------------------------------


@decides("sampling.cache-parity")
@torch.no_grad()
def cache_parity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Reading a text in one piece, token by token, and in chunks gives the same logits at every
    position, up to the last one.

    Judged on the run's own weights, and on others by which the context matters: at step 0 attention
    is so weak that an error of its positions is lost in rounding.
    """
    length = min(subject.model.max_length, 512)
    errors = _cache_errors(subject, subject.model.module, length)
    strong = contextual_model(subject, dropout=0.0).eval()
    errors |= {f"{way}, strong": e for way, e in _cache_errors(subject, strong, length).items()}
    where = worst_at(errors)
    return decide(
        all(e <= limits.rel_error_max for e in errors.values()),
        f"decoding with the cache differs from the full forward ({where})",
        rel_error=errors[where],
        worst=where,
        tokens=length,
    )


def _cache_errors(subject: Subject, model: nn.Module, length: int) -> dict[str, float]:
    """Largest error of a logit by way of reading, in standard deviations of the logits."""
    sampling = subject.sampling
    draw = torch.Generator().manual_seed(21)
    ids = torch.randint(0, subject.model.vocab_size, (2, length), generator=draw)
    expected = sampling.logits(model, ids)
    scale = float(expected.double().std())
    short = min(length, 24)
    ways = {
        "token by token": [1] * short,
        "in chunks": _chunks(short),
        "to the end of the context": [length - 3, 1, 1, 1] if length > 3 else [1] * length,
    }
    errors = {}
    for name, sizes in ways.items():
        cache, got, start = sampling.cache(), [], 0
        for size in sizes:
            got.append(sampling.logits(model, ids[:, start : start + size], cache))
            start += size
        errors[name] = float((torch.cat(got, 1) - expected[:, :start]).abs().max()) / scale
    return errors


def _chunks(length: int) -> list[int]:
    """Chunk lengths 5, 1, 2, 3, 5, 1, … that add up to `length`."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min((5, 1, 2, 3)[len(sizes) % 4], length - sum(sizes)))
    return sizes


# --- the distribution of draws --------------------------------------------------------------------

PROBS = (0.40, 0.25, 0.0, 0.15, 0.10, 0.06, 0.04, 0.0)


@decides("sampling.distribution")
def distribution(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Filters keep exactly the sets they declare, impossible tokens cannot be drawn, and counts
    follow the probabilities.
    """
    token_probs, pick = subject.sampling.token_probs, subject.sampling.pick
    probs = torch.tensor(PROBS, dtype=torch.float64)
    logits = probs.log()
    wrong = [
        name
        for name, (options, kept) in _supports().items()
        if _support(token_probs(logits, **options)) != kept
    ]
    off = _identity_error(token_probs, logits, probs)
    impossible = _impossible_draws(pick, probs)
    chi_square, p_value = _chi_square(token_probs, pick, logits, probs, int(limits.draws_min))
    if wrong:
        return failed(
            f"the kept set is wrong for: {', '.join(wrong)}",
            wrong_supports=len(wrong),
            impossible_draws=impossible,
        )
    ok = off <= limits.abs_error_max and impossible == 0 and p_value >= limits.p_value_min
    text = (
        "a token of probability 0 was drawn"
        if impossible
        else "draws or probabilities do not follow the declared distribution"
    )
    return decide(
        ok,
        text,
        abs_error=off,
        impossible_draws=impossible,
        p_value=p_value,
        chi_square=chi_square,
        wrong_supports=0,
    )


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


def _identity_error(token_probs: Callable[..., Tensor], logits: Tensor, probs: Tensor) -> float:
    """Largest difference to probabilities known in closed form: unfiltered, sharpened,
    and cut to two tokens.
    """
    sharpened = probs.square() / probs.square().sum()
    cut = torch.zeros_like(probs)
    cut[:2] = probs[:2] / probs[:2].sum()
    cases = (
        ({"temperature": 1.0}, probs),
        ({"temperature": 0.5}, sharpened),
        ({"temperature": 1.0, "top_k": 2}, cut),
    )
    return worst(
        float((token_probs(logits, **options).double() - expected).abs().max())
        for options, expected in cases
    )


def _impossible_draws(pick: Callable[[Tensor, Tensor], Tensor], probs: Tensor) -> int:
    """Draws of an id of probability 0 at the edges of every interval, for impossible ids at the
    front, inside and at the end.
    """
    drawn = 0
    for shift in range(len(probs)):
        shifted = probs.roll(shift)
        edges = torch.cat((torch.zeros(1, dtype=torch.float64), shifted.cumsum(0))).clamp(max=1)
        uniforms = torch.cat(
            (
                edges,
                torch.nextafter(edges, torch.zeros_like(edges)),
                torch.nextafter(edges, torch.ones_like(edges)),
            )
        )
        uniforms = torch.cat(
            (
                uniforms.clamp(0, 1),
                torch.tensor([0.0, 5e-324, 1 - 2**-53, 1 - 2**-24, 1.0], dtype=torch.float64),
            )
        )
        drawn += int((shifted[pick(shifted, uniforms)] == 0).sum())
    return drawn


def _chi_square(
    token_probs: Callable, pick: Callable, logits: Tensor, probs: Tensor, draws: int
) -> tuple[float, float]:
    """Pearson's statistic of `draws` draws with a fixed seed and its p-value (Wilson-Hilferty),
    over the possible ids.
    """
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = (
        pick(token_probs(logits, temperature=1.0), uniforms).bincount(minlength=len(probs)).double()
    )
    possible = probs > 0
    expected = probs[possible] * draws
    statistic, k = (
        float(((counts[possible] - expected) ** 2 / expected).sum()),
        int(possible.sum()) - 1,
    )
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return statistic, 0.5 * math.erfc(z / math.sqrt(2))
