"""A pre-norm decoder. B batch, T tokens, D d_model, V vocab, S keys, J rotated pairs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.config import AuxiliaryLoss, BiasBalance, MixtureOfExperts, ModelConfig
from stackproof.kernels import dispatch
from stackproof.model import moe
from stackproof.model.cache import KVCache
from stackproof.model.init import Embedding, Linear
from stackproof.model.positions import make_positions
from stackproof.model.reading import ExpertLoad, Reading, Report
from stackproof.model.recompute import run_block
from stackproof.model.variants import make_attention, make_depth, make_feedforward, make_norm
from stackproof.spec.errors import UsageError


class Block(nn.Module):
    """Attention, then feed-forward, each normalised at its input and added to the residual stream;
    `depth` says for which tokens.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(cfg)
        self.attention = make_attention(cfg, layer)
        self.ffn_norm = make_norm(cfg)
        self.ffn = make_feedforward(cfg, cfg.ffn)
        self.depth = make_depth(cfg, layer)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """One step of the residual stream, same shape."""
        return self.depth(self.residual, x_BTD, reading)

    def residual(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """Both branches, for the tokens given."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), reading))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD), reading))


class Transformer(nn.Module):
    """Token ids to next-token logits.
    A tied head multiplies by the embedding itself, so no weight has two names.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size, self.recompute = cfg, vocab_size, False
        self.embed = Embedding(vocab_size, cfg.d_model)
        self.positions = make_positions(cfg)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.final_norm = make_norm(cfg)
        if not cfg.tied_head:
            self.head = Linear(cfg.d_model, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix that turns features into logits: the embedding itself if tied."""
        return self.embed.weight if self.cfg.tied_head else self.head.weight

    @property
    def balance_weight(self) -> float:
        """Factor of the experts' balance term in the loss; 0 where balance is kept another
        way or there are no experts.
        """
        match self.cfg.ffn:
            case MixtureOfExperts(balance=AuxiliaryLoss(weight=weight)):
                return weight
        return 0.0

    def after_update(self, loads: Sequence[Sequence[ExpertLoad]]) -> None:
        """What follows an update besides the optimizer: selection biases move against the loads
        of all its micro-batches.
        """
        match self.cfg.ffn:
            case MixtureOfExperts(balance=BiasBalance(rate=rate)):
                moe.update_selection_bias(self, moe.totals(loads), rate)

    def forward(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 (float64 for a float64 model).
        With a cache, the ids continue the positions it holds.

        `document_ids_BT` (B, T) int64 packs several documents into a row: each change of the id
        begins one, and every document is read as if it stood alone, from position 0. Source:
        arXiv:2404.10830.
        Raises UsageError if the positions exceed max_seq_len, or for document ids of
        another shape or beside a cache.
        """
        return self.logits(self.features(input_ids_BT, cache, document_ids_BT)[0])

    def features(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, Report]:
        """What the head multiplies, (B, T, D), and what the blocks report.
        Arguments and errors as in `forward`.
        """
        reading = self.reading(input_ids_BT, cache, document_ids_BT)
        x_BTD = self.positions.added(self.embed(input_ids_BT), reading.position_BT)
        for block in self.layers:
            x_BTD = run_block(block, x_BTD, reading, recompute=self.recompute)
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        return self.final_norm(x_BTD), Report(tuple(reading.loads), tuple(reading.kept_fracs))

    def reading(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Reading:
        """Positions, and what keeps documents apart in every block."""
        start = 0 if cache is None else cache.length
        stop, device = start + input_ids_BT.shape[1], input_ids_BT.device
        if stop > self.cfg.max_seq_len:
            raise UsageError(
                "the input exceeds the context",
                value=f"{stop} tokens",
                allowed=f"max_seq_len = {self.cfg.max_seq_len}",
            )
        window, index_1T = self.cfg.attention.window, torch.arange(start, stop, device=device)[None]
        if document_ids_BT is None:
            narrow = window is not None and stop > window and dispatch.takes_masks(device)
            mask = dispatch.window_mask(start, stop, window, device) if narrow else None
            return Reading(
                index_1T,
                None,
                mask,
                window,
                self.positions.tables(start, stop),
                stop - start,
                cache=cache,
            )
        _refuse_unfit(input_ids_BT, cache, document_ids_BT)
        start_BT = document_starts(document_ids_BT)
        first_BT = start_BT if window is None else start_BT.maximum(index_1T - window + 1)
        position_BT = index_1T - start_BT
        mask = dispatch.document_mask(first_BT) if dispatch.takes_masks(device) else None
        return Reading(
            position_BT, start_BT, mask, window, self.positions.at(position_BT), stop - start
        )

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Output head on the normalised stream, (B, T, V), float32 or wider."""
        logits_BTV = (
            dispatch.linear(x_BTD, self.embed.weight) if self.cfg.tied_head else self.head(x_BTD)
        )
        return logits_BTV if logits_BTV.dtype.itemsize >= 4 else logits_BTV.float()


def _refuse_unfit(input_ids_BT: Tensor, cache: KVCache | None, document_ids_BT: Tensor) -> None:
    if cache is not None:
        raise UsageError(
            "a cache continues one document per row",
            value="cache and document_ids",
            next_step="generate without document_ids",
        )
    if document_ids_BT.shape != input_ids_BT.shape:
        raise UsageError(
            "document_ids do not fit the input",
            value=f"shape {tuple(document_ids_BT.shape)}",
            allowed=f"{tuple(input_ids_BT.shape)}",
        )


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Index of the first token of each token's own document, (B, T) int64; each change of the id
    along a row begins a document.
    """
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    begins_BT = F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)
    return (index_T * begins_BT).cummax(1).values
