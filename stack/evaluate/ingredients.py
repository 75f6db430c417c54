"""What the gates of model, sampling and evaluation get to see of a run.
Functions are looked up when called, not when gathered.

Besides these, the gates take from the training side:
    build_model()                              a fresh model of the run, on its device
    make_optimizer(model)                      the run's optimizer
    paired_difference_std spread over held-out batches of the loss difference
    between two evaluations, nats
    n_eval_batches                             held-out batches of each evaluation
B batch, T tokens, D d_model, V vocab
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.contracts.declared import contextual_weights
from stackproof.contracts.evaluation import KNOWN
from stackproof.evaluate import bits_per_byte, sampling, stopping
from stackproof.model import moe
from stackproof.model.build import build_model
from stackproof.model.forward_context import KVCache
from stackproof.model.transformer import Transformer

IGNORE = bits_per_byte.IGNORE
PROBE_DROPOUT = 0.1
# rows of an untrained model all cost ln V; wider logits make them differ, so that weighting shows
PROBE_SPREAD = 8.0


def expert_ingredients(cfg: RunConfig) -> dict[str, Any]:
    """Parts of a mixture of experts; its gates are installed only in runs that have one."""
    return {
        "route": lambda logits_RE, top_k, bias_E: moe.route(logits_RE, top_k, bias_E),
        "dispatch": lambda *arguments: moe.dispatch(*arguments),
        "balance": lambda probs_RE, experts_Rk: moe.balance(probs_RE, experts_Rk),
        "update_selection_bias": lambda model, loads_LE, rate: moe.update_selection_bias(
            model, loads_LE, rate
        ),
        "make_moe_layer": lambda: build_model(cfg.model, 2, seed=cfg.seed).layers[0].ffn,
    }


def model_ingredients(cfg: RunConfig, model: Transformer, tokenizer: Any) -> dict[str, Any]:
    """Ingredients of every preflight gate of these three subsystems that the model, the tokenizer
    and the configuration can give.

    `model` is at step 0.
    """
    device = model.embed.weight.device
    return {
        **_model_parts(cfg, model, tokenizer),
        **_sampling_parts(cfg, model, device),
        **_evaluation_parts(cfg, model, tokenizer, device),
        **expert_ingredients(cfg),
    }


# --- model ----------------------------------------------------------------------------------------


def _model_parts(cfg: RunConfig, model: Transformer, tokenizer: Any) -> dict[str, Any]:
    return {
        "model": model,
        "vocab_size": tokenizer.vocab_size,
        "max_seq_len": cfg.model.max_seq_len,
        "eos_id": tokenizer.eos_id,
        "declared_architecture": cfg.model.model_dump(),
    }


def _random_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- sampling -------------------------------------------------------------------------------------


def _probe_model(
    cfg: RunConfig, vocab_size: int, dropout: float, device: torch.device
) -> Transformer:
    """The first two layers of the model with at least this dropout,
    and logits so wide that tokens differ.
    """
    small = cfg.model.model_copy(
        update={"n_layers": min(cfg.model.n_layers, 2), "dropout": max(cfg.model.dropout, dropout)}
    )
    model = build_model(small, vocab_size, seed=51, device=device)
    with torch.no_grad():
        model.head_weight.mul_(PROBE_SPREAD)
    return model


def _sampling_parts(cfg: RunConfig, model: Transformer, device: torch.device) -> dict[str, Any]:
    generating = _probe_model(cfg, model.vocab_size, 0.5, device)
    generating.load_state_dict(
        contextual_weights(generating.cfg.model_dump(), generating.vocab_size)
    )

    def logits(ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        with bits_per_byte.evaluating(model):
            return model(ids_BT.to(device), cache).cpu()

    return {
        "full_logits": logits,
        "cached_logits": logits,
        "make_cache": lambda batch_size: KVCache(cfg.model, batch_size, device=device),
        "filtered_probs": lambda logits_V, **options: sampling.filtered_probs(logits_V, **options),
        "pick": lambda probs_V, uniforms_R: sampling.pick(probs_V, uniforms_R),
        "penalised": lambda logits_V, seen, penalty: sampling.penalise_repetition(
            logits_V, seen, penalty
        ),
        "generating_model": generating,
        "generate": lambda ids, **options: sampling.generate(generating, ids, **options),
        "generation_prompt": _random_ids(
            (max(1, min(24, cfg.model.max_seq_len - 8)),), model.vocab_size, seed=53
        ).tolist(),
    }


# --- evaluation -----------------------------------------------------------------------------------


class ProbeTokenizer:
    """One id per ASCII character, an end-of-text token, and nothing else:
    its unknown characters are known to the gate.
    """

    kind, eos_id, vocab_size = "char", 0, 128

    def __init__(self) -> None:
        self.token_bytes = np.array([0] + [1] * 127, dtype=np.int32)

    def encode(self, text: str) -> SimpleNamespace:
        """Ids of the ASCII characters; the rest is dropped and counted."""
        ids = [ord(c) for c in text if 0 < ord(c) < 128]
        return SimpleNamespace(ids=ids, dropped_chars=len(text) - len(ids))


class UniformModel(nn.Module):
    """Gives each of `vocab_size` tokens the same logit, at every position."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(*ids_BT.shape, self.vocab_size, device=ids_BT.device)


class PairModel(nn.Module):
    """Logits that follow from the token before alone: a row of a fixed table (V, V)."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.logits_VV = 3 * torch.randn(
            vocab_size, vocab_size, generator=torch.Generator().manual_seed(54)
        )

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits_VV.to(ids_BT.device)[ids_BT]


def known_text(tokenizer: Any) -> str:
    """A text in which the tokenizer knows every character: English prose as far as possible,
    else its own entries.
    """
    kept = {c for c in set(KNOWN) if not bits_per_byte.n_dropped(tokenizer.encode(c))}
    if kept:
        return "".join(c for c in KNOWN if c in kept)
    return tokenizer.decode([i for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id])


def _evaluation_parts(
    cfg: RunConfig, model: Transformer, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    evaluated = _probe_model(cfg, tokenizer.vocab_size, PROBE_DROPOUT, device)
    probe, uniform, pairs = (
        ProbeTokenizer(),
        UniformModel(ProbeTokenizer.vocab_size),
        PairModel(ProbeTokenizer.vocab_size),
    )
    seq_len = min(cfg.model.max_seq_len, 48)
    rows = _held_out_rows(tokenizer.vocab_size, seq_len)

    def score(judged: nn.Module, judge: Any, text: str) -> bits_per_byte.TextEvaluation:
        return bits_per_byte.evaluate_text(
            judged, judge, [text], seq_len=seq_len, stride=max(1, seq_len // 3), device=device
        )

    return {
        "evaluate_known": lambda text: score(model, tokenizer, text),
        "known_text": known_text(tokenizer),
        "evaluate_with_unknown": lambda text: score(uniform, probe, text),
        "evaluate_uniform": lambda text: score(uniform, probe, text),
        "uniform_vocab_size": probe.vocab_size,
        "evaluate_pairs": lambda text: score(pairs, probe, text),
        "pair_logits": pairs.logits_VV,
        "unknown_char": "Ω",
        "evaluated_model": evaluated,
        "evaluate_rows": lambda batch_size: _evaluate_rows(
            evaluated, tokenizer, rows, batch_size, device
        ),
        "evaluated_rows": rows,
        "token_bytes": tokenizer.token_bytes,
        "make_stop_rule": lambda: stopping.make_stop_rule(cfg.stop),
        "stop_declared": cfg.stop.model_dump(),
        "expected_gain_nats": getattr(cfg.stop, "expected_gain_nats", None),
    }


def _held_out_rows(vocab_size: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, labels and document ids of six fixed rows; most labels of the last row are masked,
    and row r has r + 1 documents.
    """
    ids = _random_ids((6, seq_len + 1), vocab_size, seed=52)
    labels = ids[:, 1:].clone()
    labels[-1, max(1, seq_len // 3) :] = IGNORE
    documents = torch.arange(seq_len) * torch.arange(1, 7)[:, None] // seq_len
    return ids[:, :-1], labels, documents


def _evaluate_rows(
    model: Transformer,
    tokenizer: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    batch_size: int,
    device: torch.device,
) -> bits_per_byte.Evaluation:
    """The stack's own score of rows, in batches of that size."""
    names = ("input_ids", "labels", "document_ids")
    cuts = range(0, len(rows[0]), batch_size)
    batches = [
        SimpleNamespace(**{n: part[c : c + batch_size] for n, part in zip(names, rows)})
        for c in cuts
    ]
    return bits_per_byte.evaluate_batches(model, batches, tokenizer.token_bytes, device=device)
