"""Inputs of the gates of the model.

B batch, T tokens, D d_model, V vocab
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.config import RunConfig
from stackproof.contracts.declared import contextual_weights
from stackproof.model.transformer import Transformer
from stackproof.spec.formulas import parameter_count


def model_ingredients(
    cfg: RunConfig, model: Transformer, tokenizer: Any, *, loss_batch: Any = None
) -> dict[str, Any]:
    """Ingredients of every preflight gate of the model that the model, the tokenizer and the
    configuration can give.

    `model` is at step 0. `loss_batch` is a batch of real data with input_ids and labels; without
    one, random tokens are used.
    """
    m, vocab_size = cfg.model, tokenizer.vocab_size
    ids = _random_ids((4, min(m.max_seq_len, 128)), vocab_size, seed=31)
    return {
        "model": model,
        "vocab_size": vocab_size,
        "max_seq_len": m.max_seq_len,
        "eos_id": tokenizer.eos_id,
        "declared_parameter_count": parameter_count(m.model_dump(), vocab_size),
        "declared_architecture": m.model_dump(),
        "rotary_tables": model.positions.tables(0, m.max_seq_len),
        "embedding": model.embed,
        "packed_logits": lambda ids_BT, document_ids_BT: model(
            ids_BT, document_ids_BT=document_ids_BT
        ),
        "embedding_weight": model.embed.weight,
        "head_weight": model.head_weight,
        "loss_batch": (ids[:, :-1], ids[:, 1:])
        if loss_batch is None
        else (loss_batch.input_ids, loss_batch.labels),
        "attention_layers": [_attend(model, layer.attention) for layer in model.layers],
        "weights": dict(model.state_dict()),
        "overfit_batch": overfit_batch(vocab_size, tokenizer.eos_id, min(m.max_seq_len, 24)),
        "overfit_lr": overfit_lr(m.d_model),
    }


def _random_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _attend(model: Transformer, attention: nn.Module) -> Any:
    def attend(x_BTD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        ids_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        return attention(x_BTD, model.forward_context(ids_BT, None, document_ids_BT))

    return attend


def overfit_batch(vocab_size: int, eos_id: int, seq_len: int) -> SimpleNamespace:
    """Two rows over a handful of tokens, the end-of-text token among them,
    so that one token has many successors.

    Each row begins with its own token; the rest can only be told apart by what came before. In
    particular the last token is an end of text in both rows, followed by another in the first only.
    input_ids and labels (2, T) int64, T ≥ 2.
    """
    others = [i for i in range(min(vocab_size, 9)) if i != eos_id]
    kinds = torch.tensor([eos_id, *others[2:]] if len(others) > 2 else [eos_id, *others])
    draw = torch.Generator().manual_seed(41)
    rows = kinds[torch.randint(0, len(kinds), (2, seq_len + 1), generator=draw)]
    rows[:, 0] = torch.tensor([others[0], others[min(1, len(others) - 1)]])
    rows[:, -2] = eos_id
    rows[:, -1] = torch.tensor([eos_id, others[0]])
    return SimpleNamespace(
        input_ids=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        sample_ids=(0, 1),
        epoch=0,
        cursor_before=0,
        cursor_after=2,
    )


def overfit_lr(d_model: int) -> float:
    """Learning rate at which one batch is learned by heart: inverse to the width, at most 1e-2
    (measured for widths 16 to 512).
    """
    return min(1e-2, 0.2 / d_model)


def talkative(model: Transformer) -> dict[str, Tensor]:
    return contextual_weights(model.cfg.model_dump(), model.vocab_size)
