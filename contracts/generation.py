"""Gate of generation: each new token follows from the model, the declared filters and the given
random numbers. V vocab.
"""

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.declared import contextual_weights
from stackproof.contracts.gate import Verdict, decide, decides, failed
from stackproof.contracts.subject import Subject

DROPOUT, MAX_LAYERS = 0.5, 2
N_NEW, MANY_NEW = 8, 80  # so many that a stack may prepare the model for them
LOGITS, SEEN = torch.linspace(-4.0, 4.0, 9), (0, 2, 2, 4, 7)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with a penalty": {"temperature": 0.0, "repetition_penalty": 1.7},
    "drawn": {"temperature": 1.0},
    "drawn warm, top_k": {"temperature": 1.5, "top_k": 7},
    "drawn cool, top_p": {"temperature": 0.7, "top_p": 0.8},
    "drawn with everything": {
        "temperature": 1.2,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
    },
}


@decides("sampling.generation")
def generation(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Each token of a generation is the one that follows from the model's full forward in
    evaluation mode, written out here in float64.

    The model has dropout and is in training mode when generation begins; its tokens depend on the
    context. One uniform float64 per token comes from `generator`; a token is drawn by inverting the
    cumulative distribution in the order of ids. A token whose choice lies within margin_min of
    another in probability is not judged, and the generation is compared up to it. Where prompt and
    new tokens exceed the context length, the model continues with the last half of its context;
    one prompt nearly fills it.
    """
    sampling, max_seq_len = subject.sampling, subject.model.max_length
    model = contextual_model(subject, DROPOUT)
    own_prompt = _prompt(subject.model.vocab_size, max_seq_len)
    generate = partial(sampling.generate, model)
    modes, wrong, judged = [m.training for m in model.modules()], [], 0
    filling = (own_prompt * -(-max_seq_len // len(own_prompt)))[: max(1, max_seq_len - 3)]
    asked = [(name, own_prompt, options) for name, options in SETTINGS.items()]
    asked.append(("beyond the context", filling, {"temperature": 1.0, "repetition_penalty": 1.3}))
    for name, prompt, options in asked:
        expected = _expected(
            model,
            prompt,
            torch.Generator().manual_seed(17),
            options,
            limits.margin_min,
            max_seq_len,
        )
        judged += len(expected)
        for use_cache in (True, False):
            chance = torch.Generator().manual_seed(17)
            got = generate(
                prompt,
                max_new_tokens=N_NEW,
                generator=chance,
                eos_id=None,
                use_cache=use_cache,
                **options,
            )
            if got[: len(expected)] != expected or len(got) != N_NEW:
                wrong.append(f"{name}, {'with' if use_cache else 'without'} cache")
    if [m.training for m in model.modules()] != modes:
        return failed(
            "a generation left modules in another mode than it found them in", wrong=len(wrong)
        )
    greedy = generate(own_prompt, max_new_tokens=N_NEW, temperature=0.0, eos_id=None)
    expected = _expected(
        model, own_prompt, torch.Generator(), {"temperature": 0.0}, limits.margin_min, max_seq_len
    )
    if (
        generate(own_prompt, max_new_tokens=MANY_NEW, temperature=0.0, eos_id=None)[: len(expected)]
        != expected
    ):
        wrong.append(f"{MANY_NEW} tokens asked for at once")
    if (
        generate(own_prompt, max_new_tokens=N_NEW, temperature=0.0, eos_id=greedy[2])
        != greedy[: greedy.index(greedy[2])]
    ):
        wrong.append("the end of text does not end it")
    penalised = sampling.token_probs(LOGITS.double(), repetition_penalty=1.7, seen=SEEN)
    expected_V = _penalised(LOGITS.double(), SEEN, 1.7).softmax(-1)
    if not torch.allclose(penalised.double(), expected_V, rtol=1e-6, atol=0):
        wrong.append("the penalty on repetition")
    enough = judged >= limits.judged_frac_min * len(asked) * N_NEW
    text = (
        f"not what the model's own forward gives: {'; '.join(wrong)}"
        if wrong
        else f"only {judged} tokens could be judged"
    )
    return decide(
        len(wrong) <= limits.wrong_max and enough, text, wrong=len(wrong), judged_tokens=judged
    )


def contextual_model(subject: Subject, dropout: float) -> nn.Module:
    """A small model of the run in training mode, with at least this dropout, whose next token
    depends on the context.
    """
    architecture = subject.declared.architecture
    n_layers = min(architecture["n_layers"], MAX_LAYERS)
    model = subject.model.fresh(n_layers=n_layers, min_dropout=dropout).train()
    small = architecture | {"n_layers": n_layers}
    model.load_state_dict(contextual_weights(small, subject.model.vocab_size))
    return model


def _prompt(vocab_size: int, max_seq_len: int) -> list[int]:
    length, draw = max(1, min(24, max_seq_len - 8)), torch.Generator().manual_seed(53)
    return torch.randint(0, vocab_size, (length,), generator=draw).tolist()


def _expected(
    model: nn.Module,
    prompt: Sequence[int],
    chance: torch.Generator,
    options: dict[str, Any],
    margin_min: float,
    max_seq_len: int,
) -> list[int]:
    """Tokens by the full forward, up to the first whose choice is closer than `margin_min`."""
    tokens, training, start = list(prompt), model.training, 0
    model.eval()
    try:
        for _ in range(N_NEW):
            if len(tokens) - start > max_seq_len:
                start = len(tokens) - max(1, max_seq_len // 2)
            with torch.no_grad():
                logits_V = (
                    model(torch.tensor([tokens[start:]], device=next(model.parameters()).device))[
                        0, -1
                    ]
                    .cpu()
                    .double()
                )
            probs_V = _probabilities(
                _penalised(logits_V, tokens[start:], options.get("repetition_penalty", 1.0)),
                options,
            )
            token, margin = _chosen(probs_V, options, chance)
            if margin < margin_min:
                break
            tokens.append(token)
    finally:
        model.train(training)
    return tokens[len(prompt) :]


def _penalised(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """What was seen becomes less likely, whatever the sign of its logit.
    Source: arXiv:1909.05858, sec. 4.1.
    """
    logits_V = logits_V.clone()
    for token in set(seen):
        logits_V[token] = (
            logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
        )
    return logits_V


def _probabilities(logits_V: Tensor, options: dict[str, Any]) -> Tensor:
    """Temperature, then the k largest, then the fewest whose probability reaches p."""
    if options["temperature"] == 0:
        return logits_V.softmax(-1)
    logits_V = logits_V / options["temperature"]
    order = logits_V.argsort(descending=True).tolist()
    kept = order[: options.get("top_k") or len(order)]
    probs = logits_V[kept].softmax(-1).tolist()
    nucleus, total = [], 0.0
    for token, p in zip(kept, probs):
        if total >= options.get("top_p", 1.0):
            break
        nucleus.append(token)
        total += p
    return (
        torch.full_like(logits_V, -math.inf)
        .index_copy(0, torch.tensor(nucleus), logits_V[nucleus])
        .softmax(-1)
    )


def _chosen(probs_V: Tensor, options: dict[str, Any], chance: torch.Generator) -> tuple[int, float]:
    """(token, distance of the choice from another, in probability)."""
    if options["temperature"] == 0:
        (first, second), (token, _) = (part.tolist() for part in probs_V.topk(2))
        return token, first - second
    u, cumulative_V = (
        float(torch.rand(1, generator=chance, dtype=torch.float64)),
        probs_V.cumsum(-1),
    )
    token = int((cumulative_V > u).nonzero()[0])
    return token, float((cumulative_V - u).abs().min())
