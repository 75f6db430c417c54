"""Peers' models in a shape, and their updates as their own users write them.
Weights are random and float32; half precision is autocast.
"""

from collections.abc import Callable, Iterator
from itertools import cycle

import nanogpt
import torch
from shapes import SEED, Shape
from torch import Tensor, nn

MAX_GRAD_NORM = 1.0
LR = 1e-4
BATCHES_HELD = 8


def huggingface_model(shape: Shape, max_seq_len: int | None = None) -> nn.Module:
    """Llama of the transformers library, as it comes from its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=max_seq_len or shape.seq_len,
            tie_word_embeddings=shape.tied_head,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def litgpt_model(shape: Shape) -> nn.Module:
    """litgpt's GPT set up as a Llama."""
    from litgpt import GPT, Config

    torch.manual_seed(SEED)
    model = GPT(
        Config(
            name="benchmark",
            block_size=shape.seq_len,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_query_groups=shape.n_kv_heads,
            n_embd=shape.d_model,
            intermediate_size=shape.d_ff,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    model.apply(_small)
    if shape.tied_head:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def _small(module: nn.Module) -> None:
    """litgpt leaves initialisation to its scripts; of their law only the size matters here."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def nanogpt_model(shape: Shape) -> nanogpt.NanoGPT:
    """The plain model of this folder; it has no grouped heads and a
    feed-forward of four times the width.
    """
    torch.manual_seed(SEED)
    return nanogpt.NanoGPT(
        shape.n_layers, shape.d_model, shape.n_heads, shape.seq_len, shape.vocab_size
    )


def huggingface_loss(model: nn.Module, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Labels given; the library shifts them itself, so the last position of a row is not scored."""
    forward = torch.compile(model) if compiled else model
    return lambda ids_BT, labels_BT: forward(input_ids=ids_BT, labels=ids_BT).loss


def litgpt_loss(model: nn.Module, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """As its pretraining script: the model compiled, its cross-entropy over
    chunks of the logits beside it.
    """
    from litgpt.utils import chunked_cross_entropy

    forward = torch.compile(model) if compiled else model
    return lambda ids_BT, labels_BT: chunked_cross_entropy(forward(ids_BT), labels_BT)


def nanogpt_loss(model: nanogpt.NanoGPT, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss is part of what is compiled, as there."""

    def both(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return nanogpt.loss(model(ids_BT), labels_BT)

    return torch.compile(both) if compiled else both


class WithLoss(nn.Module):
    """Our model with its loss, the mean over all labels of the batch: one forward, as DDP and FSDP2
    expect it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        from stackproof.kernels import dispatch

        x_BTD, _ = self.model.hidden_states(ids_BT)
        head_VD, labels_R = self.model.head_weight, labels_BT.flatten()
        nats, _ = dispatch.linear_cross_entropy(x_BTD.flatten(0, 1), head_VD, labels_R)
        return nats / labels_R.numel()


def random_batches(
    shape: Shape, device: str, n_rows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ids and the ids after them, the same few batches over and over, held on the device."""
    generator = torch.Generator().manual_seed(SEED)
    size = n_rows or shape.rows, shape.seq_len + 1
    rows = [torch.randint(shape.vocab_size, size, generator=generator) for _ in range(BATCHES_HELD)]
    return cycle(
        (row[:, :-1].contiguous().to(device), row[:, 1:].contiguous().to(device)) for row in rows
    )


def update(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    shape: Shape,
    device: str,
    n_rows: int | None = None,
) -> Callable[[], None]:
    """One optimizer step: clear, forward, backward, clip, fused AdamW. `n_rows` are those of a
    rank; all of the shape without it.
    """
    optimizer, batches = nanogpt.make_optimizer(model, lr=LR), random_batches(shape, device, n_rows)
    dtype = getattr(torch, shape.dtype)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    return step


def matrix_parameters(model: nn.Module) -> int:
    """Entries of all matrices that are multiplied by: a tied embedding counts as the head, one that
    is only looked up does not.
    """
    if isinstance(model, nanogpt.NanoGPT):
        return model.matrix_parameters()
    multiplied = [m.weight for m in model.modules() if isinstance(m, nn.Linear)] + [
        getattr(model, "head_weight", None)
    ]
    return sum({id(p): p.numel() for p in multiplied if p is not None}.values())
