"""Sampling text from a model. Filters are pure functions of logits; randomness enters as uniform
numbers. V vocab, R draws.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from stackproof.contracts.conditions import ensure, require
from stackproof.distributed.tensors import inference, is_divided
from stackproof.evaluate.bits_per_byte import Autocast, evaluating, token_nats
from stackproof.model.forward_context import KVCache

MASKED = float("-inf")
COPY_PAYS_FROM_TOKENS = 64


def penalise_repetition(logits_V: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Repetition penalty: divide positive logits of present tokens by `penalty`, multiply negative
    ones. 1 changes nothing.

    Source: CTRL, arXiv:1909.05858, sec. 4.1.
    """
    if penalty == 1.0:
        return logits_V
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits_V.device)
    chosen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Mask all but the k largest logits with −inf; of equal logits the lower id is kept.
    0, or k ≥ V, keeps all.
    """
    if k == 0 or k >= logits_V.shape[-1]:
        return logits_V
    least = logits_V.topk(k).values[-1]
    tied = (logits_V == least).nonzero().flatten()
    n_above = int((logits_V > least).sum())
    return logits_V.masked_fill(logits_V < least, MASKED).index_fill(0, tied[k - n_above :], MASKED)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Nucleus sampling: keep the smallest set of most likely tokens with a total probability of at
    least `p`. 1 keeps all.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751, sec. 3.1.
    """
    if p >= 1.0:
        return logits_V
    support = (logits_V > MASKED).nonzero().flatten()
    order = support[logits_V[support].argsort(descending=True, stable=True)]
    probs_S = logits_V[order].double().softmax(-1)
    before_S = probs_S.cumsum(-1) - probs_S
    return logits_V.index_fill(0, order[before_S >= p], MASKED)


def filtered_probs(
    logits_V: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Probabilities (V,) float64 after temperature, then top-k, then top-p.
    With temperature 0 the most likely token has probability 1.
    """
    if temperature == 0.0:
        return torch.zeros_like(logits_V, dtype=torch.float64).index_fill(0, logits_V.argmax(), 1.0)
    return keep_top_p(keep_top_k(logits_V.double() / temperature, top_k), top_p).softmax(-1)


def pick(probs_V: Tensor, uniforms_R: Tensor) -> Tensor:
    """Ids (R,) int64 by inverting the cumulative distribution at `uniforms_R` in [0, 1]. An id of
    probability 0 is never drawn.

    The search runs over the support only, so neither u = 0 nor rounding at u → 1 leaves it
    (pytorch/pytorch#48841).
    """
    support = probs_V.nonzero().flatten()
    cumulative = probs_V[support].cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms_R.to(cumulative) * cumulative[-1], right=True)
    return support[index.clamp(max=len(support) - 1)]


def window_start(n_tokens: int, start: int, max_seq_len: int) -> int:
    """First position inside the context.
    A full context is cut to its last half, so that it is recomputed rarely.
    """
    return n_tokens - max(1, max_seq_len // 2) if n_tokens - start > max_seq_len else start


@require(
    lambda ids: len(ids) >= 1,
    "a prompt has at least one token (the end-of-text token begins a document)",
)
@require(lambda max_new_tokens: max_new_tokens >= 0, "max_new_tokens is not negative")
@require(lambda temperature: temperature >= 0, "temperature is not negative")
@require(lambda top_k: top_k >= 0, "top_k is not negative; 0 keeps all")
@require(lambda top_p: 0 < top_p <= 1, "top_p is in (0, 1]; 1 keeps all")
@require(
    lambda repetition_penalty: repetition_penalty > 0,
    "the repetition penalty is positive; 1 changes nothing",
)
@require(
    lambda temperature, generator: temperature == 0 or generator is not None,
    "sampling needs an explicit generator",
)
@ensure(
    lambda result, max_new_tokens: len(result) <= max_new_tokens,
    "at most max_new_tokens are returned",
)
def generate(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> list[int]:
    """The new token ids after the prompt `ids`, without the end-of-text token that may end them.

    Each token takes one uniform float64 from `generator` (CPU), so a seed gives the same text in
    any batch. If prompt and new tokens exceed max_seq_len, generation continues with the last half
    of the context, recomputed, with and without a cache. The mode of every module is restored.
    """
    tokens, start, cache = list(ids), 0, None
    with evaluating(model), inference(model):
        reader = laid_out_for_rows(model, max_new_tokens)
        while len(tokens) - len(ids) < max_new_tokens:
            moved = window_start(len(tokens), start, model.cfg.max_seq_len)
            cache = cache if moved == start else None
            start = moved
            logits_V, cache = next_logits(reader, tokens[start:], cache, use_cache)
            logits_V = penalise_repetition(logits_V, tokens[start:], repetition_penalty)
            if temperature == 0:
                token = int(logits_V.argmax())
            else:
                probs_V = filtered_probs(
                    logits_V, temperature=temperature, top_k=top_k, top_p=top_p
                )
                token = int(pick(probs_V, _uniform(generator)))
            if token == eos_id:
                break
            tokens.append(token)
    return tokens[len(ids) :]


def laid_out_for_rows(model: nn.Module, n_tokens: int) -> nn.Module:
    """The model; on a CPU, for enough tokens, a copy with transposed storage of its matrices.

    A product with a single row then reads its matrix sequentially, which is faster than one output
    after another.
    """
    table = model.embed.weight
    if is_divided(table) or table.device.type != "cpu" or n_tokens < COPY_PAYS_FROM_TOKENS:
        return model
    matrices = (p for p in model.parameters() if p.ndim == 2)
    return copy.deepcopy(
        model, {id(p): nn.Parameter(p.t().contiguous().t(), requires_grad=False) for p in matrices}
    )


def next_logits(
    model: nn.Module, context: Sequence[int], cache: KVCache | None, use_cache: bool
) -> tuple[Tensor, KVCache | None]:
    """Logits (V,) of the last position of `context`, and the cache that holds it. Only positions
    outside the cache are computed.
    """
    if use_cache and cache is None:
        cache = KVCache(model.cfg, device=model.embed.weight.device, dtype=model.embed.weight.dtype)
    unread = context[cache.length :] if use_cache else context
    x_BTD, _ = model.hidden_states(torch.tensor([unread], device=model.embed.weight.device), cache)
    return model.logits(x_BTD[:, -1:])[0, -1].cpu(), cache


def _uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(1, generator=generator, dtype=torch.float64)


def sample_loss(
    model: nn.Module,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    autocast: Autocast = nullcontext,
) -> float:
    """Mean loss of a model on its own samples at temperature 1, nats per token."""
    context = torch.tensor([*prompt_ids, *ids])[-model.cfg.max_seq_len - 1 :]
    n = min(len(ids), len(context) - 1)
    with evaluating(model), autocast():
        logits_TV = model(context[None, :-1].to(device))[0, -n:]
    return float(token_nats(logits_TV[None], context[None, -n:].to(device)).mean())
