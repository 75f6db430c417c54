"""A GPT-2 style decoder and its update, written from the published architecture as nanoGPT
configures it: no biases, tied head.

B batch, T tokens, C features, N heads, H head width, V vocabulary. Sources: GPT-2 report, sec.
2.3; nanoGPT's README and configuration.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention from one fused projection, then a feed-forward of four times the width;
    LayerNorm before both.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(d_model, bias=False) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.mixed = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BNTH, k_BNTH, v_BNTH = (
            part.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_BTC)).split(C, dim=2)
        )
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        x_BTC = x_BTC + self.mixed(y_BNTH.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.down(F.gelu(self.up(self.norm_2(x_BTC))))


class NanoGPT(nn.Module):
    """Learned positions, `n_layers` blocks, a final norm, and the embedding again as the head."""

    def __init__(self, n_layers: int, d_model: int, n_heads: int, seq_len: int, vocab_size: int):
        super().__init__()
        self.seq_len = seq_len
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(seq_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for name, parameter in self.named_parameters():
            branch_end = name.endswith(("mixed.weight", "down.weight"))
            if parameter.ndim == 2:
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * n_layers) if branch_end else 0.02
                )

    def features(self, ids_BT: Tensor) -> Tensor:
        """The normalised stream, (B, T, C)."""
        x_BTC = self.tokens(ids_BT) + self.positions(
            torch.arange(ids_BT.shape[1], device=ids_BT.device)
        )
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.norm(x_BTC)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits, (B, T, V)."""
        return F.linear(self.features(ids_BT), self.tokens.weight)

    def next_logits(self, ids_BT: Tensor) -> Tensor:
        """Logits after the last position only, (B, V): what its sampling computes."""
        return F.linear(self.features(ids_BT[:, -self.seq_len :])[:, -1], self.tokens.weight)

    def matrix_parameters(self) -> int:
        """Entries of all matrices that are multiplied by: the head once, positions not."""
        return (
            sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.positions.weight.numel()
        )


def loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy over whole logits, nats per token."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-1)


def make_optimizer(
    model: nn.Module, *, lr: float, beta2: float = 0.95, weight_decay: float = 0.1
) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


@torch.no_grad()
def generate(model: NanoGPT, ids: list[int], n_new: int) -> list[int]:
    """`n_new` most likely tokens, one after the other, the whole context read anew for each."""
    ids_BT = torch.tensor([ids])
    for _ in range(n_new):
        ids_BT = torch.cat((ids_BT, model.next_logits(ids_BT).argmax(-1, keepdim=True)), dim=1)
    return ids_BT[0, len(ids) :].tolist()
