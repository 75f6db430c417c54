"""A pre-norm decoder in the manner of Llama. B batch, T tokens, D d_model, V vocab, J = head_dim/2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec.errors import UsageError
from stack.config import ModelConfig
from stack.kernels import dispatch
from stack.model.attention import Attention
from stack.model.cache import KVCache
from stack.model.feedforward import SwiGLU
from stack.model.init import Embedding, Linear
from stack.model.norm import RMSNorm
from stack.model.recompute import run_block
from stack.model.rotary import Rotary


class Block(nn.Module):
    """Attention, then feed-forward, each normalised at its input and added to the residual stream."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = SwiGLU(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        """One step of the residual stream, same shape."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, mask_B1TT))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))


class Transformer(nn.Module):
    """Token ids to next-token logits. A tied head multiplies by the embedding itself, so no weight has two names."""

    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size, self.recompute = cfg, vocab_size, False
        self.embed = Embedding(vocab_size, cfg.d_model)
        self.rotary = Rotary(cfg.head_dim, cfg.max_seq_len, cfg.rope_theta)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        if not cfg.tied_head:
            self.head = Linear(cfg.d_model, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix that turns features into logits: the embedding itself if tied."""
        return self.embed.weight if self.cfg.tied_head else self.head.weight

    def forward(self, input_ids_BT: Tensor, cache: KVCache | None = None, document_ids_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) float32 (float64 for a float64 model). With a cache, the ids continue the positions it holds.

        `document_ids_BT` (B, T) int64 packs several documents into a row: each change of the id begins one, and every document
        is read as if it stood alone, from position 0. Source: arXiv:2404.10830.
        Raises UsageError if the positions exceed max_seq_len, or for document ids of another shape or beside a cache.
        """
        start = 0 if cache is None else cache.length
        stop = start + input_ids_BT.shape[1]
        if stop > self.cfg.max_seq_len:
            raise UsageError("the input exceeds the context", value=f"{stop} tokens", allowed=f"max_seq_len = {self.cfg.max_seq_len}")
        if document_ids_BT is None:
            rotary, mask = self.rotary(start, stop), ()
        else:
            rotary, *mask = self.packed(input_ids_BT, cache, document_ids_BT)
        x_BTD = self.embed(input_ids_BT)
        for layer in self.layers:
            x_BTD = run_block(layer, x_BTD, rotary, cache, *mask, recompute=self.recompute)
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        return self.logits(self.final_norm(x_BTD))

    def packed(self, input_ids_BT: Tensor, cache: KVCache | None, document_ids_BT: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What keeps documents apart in every layer: rotary tables (B, 1, T, J) that restart, and the mask (B, 1, T, T)."""
        if cache is not None:
            raise UsageError(
                "a cache continues one document per row", value="cache and document_ids", next_step="generate without document_ids"
            )
        if document_ids_BT.shape != input_ids_BT.shape:
            raise UsageError(
                "document_ids do not fit the input", value=f"shape {tuple(document_ids_BT.shape)}", allowed=f"{tuple(input_ids_BT.shape)}"
            )
        start_BT = document_starts(document_ids_BT)
        position_BT = torch.arange(start_BT.shape[1], device=start_BT.device) - start_BT
        return self.rotary.at(position_BT), dispatch.document_mask(start_BT)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Output head on the normalised stream, (B, T, V), float32 or wider."""
        logits_BTV = F.linear(x_BTD, self.embed.weight) if self.cfg.tied_head else self.head(x_BTD)
        return logits_BTV if logits_BTV.dtype.itemsize >= 4 else logits_BTV.float()


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Index of the first token of each token's own document, (B, T) int64; each change of the id along a row begins a document."""
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    begins_BT = F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)
    return (index_T * begins_BT).cummax(1).values
