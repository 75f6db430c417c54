"""Plants in the model: weights, masks, scales, positions and branches that are wrong in silence."""

import torch
import torch.nn.functional as F
from torch import nn

from stackproof.kernels import attention, dispatch
from stackproof.model import build, feed_forward, norm, positions, transformer
from stackproof.museum.plant import swap, touch
from stackproof.train import losses


def head_init_wrong():
    original = build.initialise

    def forgetful(model, cfg, generator):
        original(model, cfg, generator)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("attention.out.weight", "ffn.down.weight")):
                    parameter.normal_(0.0, cfg.init_std, generator=generator)

    with swap(build, "initialise", forgetful):
        yield


def init_std_too_big():
    original = build.initialise

    def wide(model, cfg, generator):
        original(model, cfg, generator)
        with torch.no_grad():
            model.layers[0].attention.q.weight.mul_(1.1)
            model.embed.weight.mul_(1.1)

    with swap(build, "initialise", wide):
        yield


def norm_garbage_buffer():
    def left_as_found(self):
        if not self.cos.is_meta:
            self.cos.fill_(1e-3)
            self.sin.fill_(1e-3)

    with swap(positions.Rotary, "reset", left_as_found):
        yield


def causal_mask_off_by_one():
    def leaky(q_BNTH, k_BKSH, v_BKSH, *, scale=None, chunks=False):
        length = q_BNTH.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=q_BNTH.device).tril(1)
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, attn_mask=allowed, enable_gqa=True
        )

    with swap(attention, "whole", leaky):
        yield


def rows_mixed():
    def over_rows(self, x_BTD):
        return x_BTD * torch.rsqrt(x_BTD.pow(2).mean((0, 2), keepdim=True) + self.eps) * self.weight

    with swap(norm.RMSNorm, "forward", over_rows):
        yield


def document_mask_lost():
    def causal_only(start_BT):
        rows, length = start_BT.shape
        return (
            torch.ones(length, length, dtype=torch.bool, device=start_BT.device)
            .tril()
            .expand(rows, 1, length, length)
        )

    with swap(attention, "document_mask", causal_only):
        yield


def document_mask_off_by_one():
    original = attention.document_mask

    def one_pair_more(start_BT):
        index_T = torch.arange(start_BT.shape[1], device=start_BT.device)
        previous_TT = index_T == index_T[:, None] - 1
        return original(start_BT) | ((start_BT == index_T)[:, :, None] & previous_TT)[:, None]

    with swap(attention, "document_mask", one_pair_more):
        yield


def positions_restart_late():
    original = positions.Rotary.at

    def late(self, position_BT):
        return original(self, F.pad(position_BT[:, :-1] + 1, (1, 0)))

    with swap(positions.Rotary, "at", late):
        yield


def _scaled(wrong):
    def whole(q_BNTH, k_BKSH, v_BKSH, *, scale=None, chunks=False):
        h = q_BNTH.shape[3]
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=True, scale=wrong(h)
        )

    return whole


def missing_scale():
    with swap(attention, "whole", _scaled(lambda h: 1.0)):
        yield


def double_scale():
    with swap(attention, "whole", _scaled(lambda h: 1.0 / h)):
        yield


def rope_bf16_table():
    def coarse(width, max_seq_len, theta, scaling=None, device="cpu"):
        frequency_J = theta ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        )
        position_T = torch.arange(max_seq_len, device=device).to(torch.bfloat16).double()
        angle_TJ = position_T[:, None] * frequency_J
        return angle_TJ.cos().float(), angle_TJ.sin().float()

    with swap(positions, "rotary_tables", coarse):
        yield


def gqa_head_order():
    def tiled(q_BNTH, k_BKSH, v_BKSH, *, scale=None):
        groups, (n_new, n_all) = (
            q_BNTH.shape[1] // k_BKSH.shape[1],
            (q_BNTH.shape[2], k_BKSH.shape[2]),
        )
        allowed = torch.ones(n_new, n_all, dtype=torch.bool, device=q_BNTH.device).tril(
            n_all - n_new
        )
        k_BNSH, v_BNSH = k_BKSH.repeat(1, groups, 1, 1), v_BKSH.repeat(1, groups, 1, 1)
        return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=allowed)

    with swap(attention, "continued", tiled):
        yield


class _Doubled(torch.autograd.Function):
    """2·x. Its backward doubles the gradient where it lies."""

    @staticmethod
    def forward(ctx, x_BTD):
        return 2 * x_BTD

    @staticmethod
    def backward(ctx, grad_BTD):
        return grad_BTD.mul_(2)


def shared_gradient_clobbered():
    def forward(self, x_BTD, context):
        x_BTD = x_BTD + _Doubled.apply(
            self.dropout(self.attention(self.attention_norm(x_BTD), context)) / 2
        )
        return x_BTD + _Doubled.apply(self.dropout(self.ffn(self.ffn_norm(x_BTD), context)) / 2)

    with swap(transformer.Block, "forward", forward):
        yield


def attention_branch_lost():
    def without_attention(self, x_BTD, context):
        lost = self.attention(self.attention_norm(x_BTD), context)
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD), context)) + 0 * lost

    with swap(transformer.Block, "forward", without_attention):
        yield


def labels_of_the_past():
    original = losses.linear_cross_entropy_sum

    def unshifted(x_BTD, head_VD, labels_BT):
        return original(x_BTD[:, 1:], head_VD, labels_BT[:, :-1])

    with swap(losses, "linear_cross_entropy_sum", unshifted):
        yield


class _Unscaled(nn.Dropout):
    def forward(self, x_BTD):
        touch()
        return x_BTD * (torch.rand_like(x_BTD) >= self.p) if self.training else x_BTD


def dropout_unscaled():
    with swap(transformer.nn, "Dropout", _Unscaled):
        yield


def dropout_on_one_branch():
    def forward(self, x_BTD, context):
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), context))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD), context)

    with swap(transformer.Block, "forward", forward):
        yield


def dropout_same_masks():
    original = transformer.Transformer.hidden_states

    def seeded(self, *inputs):
        if self.training:
            torch.manual_seed(0)
        return original(self, *inputs)

    with swap(transformer.Transformer, "hidden_states", seeded):
        yield


def ffn_channels_apart():
    def one_apart(self, x_BTD, context=None):
        return self.down(
            dispatch.swiglu(
                self.gate(x_BTD), self.up(x_BTD).roll(1, -1) if self.layer == 1 else self.up(x_BTD)
            )
        )

    original = transformer.Block.__init__

    def numbered(self, cfg, layer):
        original(self, cfg, layer)
        self.ffn.layer = layer

    with (
        swap(transformer.Block, "__init__", numbered),
        swap(feed_forward.SwiGLU, "forward", one_apart),
    ):
        yield
