"""Plants in the model: weights, masks, scales, positions and branches that are wrong in silence."""

import torch
import torch.nn.functional as F
from torch import nn

from stackproof.kernels import attention, dispatch
from stackproof.model import build, feedforward, norm, rotary, transformer
from stackproof.museum.plant import plant, swap, touch
from stackproof.train import losses


@plant(
    "model.head-init-wrong",
    gate="model.init-law",
    title="Output projections forget the depth",
    story=(
        "The projections that write into the residual stream are meant to shrink with the number "
        "of layers. A refactoring renames them, the rule no longer matches, and they fall back to "
        "the common spread. The first loss is the same; deep models train worse."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47458",),
)
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


@plant(
    "model.init-std-too-big",
    gate="model.init-law",
    title="Weights one tenth too wide",
    story=(
        "Someone tunes the initial spread of one kind of matrix in the code and leaves the "
        "configuration as it was. The record now states a number nobody used. No loss curve shows "
        "it."
    ),
    sources=("https://github.com/karpathy/nanochat/blob/master/nanochat/gpt.py",),
)
def init_std_too_big():
    original = build.initialise

    def wide(model, cfg, generator):
        original(model, cfg, generator)
        with torch.no_grad():
            model.layers[0].attention.q.weight.mul_(1.1)
            model.embed.weight.mul_(1.1)

    with swap(build, "initialise", wide):
        yield


@plant(
    "model.norm-garbage-buffer",
    gate="model.init-law",
    title="Rotary tables nobody filled",
    story=(
        "A model built on the meta device gets real memory, but its rotary tables are no "
        "parameters and no checkpoint holds them. They keep whatever lay there. Losses differ "
        "from run to run and everyone blames the seed."
    ),
    sources=(
        "https://github.com/Lightning-AI/litgpt/issues/887",
        "https://github.com/allenai/OLMo-core/issues/341",
    ),
)
def norm_garbage_buffer():
    def left_as_found(self):
        if not self.cos.is_meta:
            self.cos.fill_(1e-3)
            self.sin.fill_(1e-3)

    with swap(rotary.Rotary, "reset", left_as_found):
        yield


@plant(
    "model.logits-scaled",
    gate="model.initial-loss",
    title="Logits eight times too large",
    story=(
        "A temperature that belongs to sampling is applied inside the model. The untrained model "
        "is confidently wrong, and the first hundred updates go into unlearning it."
    ),
    sources=("founding note: tinygpt validation",),
)
def logits_scaled():
    original = transformer.Transformer.logits

    def hot(self, x_BTD):
        return original(self, x_BTD) * 8

    with swap(transformer.Transformer, "logits", hot):
        yield


@plant(
    "model.causal-mask-off-by-one",
    gate="model.causality",
    title="Causal mask off by one",
    story=(
        "The triangle of allowed pairs starts one diagonal too high, so every position sees the "
        "token it must predict. The first loss is as it should be, then it falls towards zero as "
        "never before. Samples are noise."
    ),
    sources=(
        "https://github.com/rasbt/LLMs-from-scratch/issues/1062",
        "https://github.com/facebookresearch/xformers/issues/103",
    ),
)
def causal_mask_off_by_one():
    def leaky(q_BNTH, k_BKSH, v_BKSH, *, scale=None, chunks=False):
        length = q_BNTH.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=q_BNTH.device).tril(1)
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, attn_mask=allowed, enable_gqa=True
        )

    with swap(attention, "whole", leaky):
        yield


@plant(
    "model.rows-mixed",
    gate="model.causality",
    title="A norm over the batch",
    story=(
        "The mean square is taken over rows as well as features. Each text now depends on the "
        "strangers it shares a batch with. Training works, and scores change with the batch size."
    ),
    sources=("https://github.com/yaodongyu/TRADES/issues/3",),
)
def rows_mixed():
    def over_rows(self, x_BTD):
        return x_BTD * torch.rsqrt(x_BTD.pow(2).mean((0, 2), keepdim=True) + self.eps) * self.weight

    with swap(norm.RMSNorm, "forward", over_rows):
        yield


@plant(
    "model.document-mask-lost",
    gate="model.document-isolation",
    title="Packed documents see each other",
    story=(
        "Several documents share a row, and the mask that should keep them apart is dropped on "
        "the way to the kernel, which falls back to the causal one. Every document reads its "
        "predecessors. The loss looks as usual, even a little lower where neighbours are alike."
    ),
    sources=(
        "https://github.com/huggingface/nanoVLM/pull/204",
        "https://github.com/huggingface/trl/issues/784",
    ),
)
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


@plant(
    "model.document-mask-off-by-one",
    gate="model.document-isolation",
    title="Document mask off by one",
    story=(
        "The border between documents is drawn one query late: the first token of a document "
        "still sees the last token of the one before. It is one pair in thousands. Through it "
        "every document starts from a stranger's last word."
    ),
    sources=(
        "https://github.com/OpenEvaByte/evabyte/issues/10",
        "https://github.com/pytorch/torchtitan/issues/3130",
    ),
)
def document_mask_off_by_one():
    original = attention.document_mask

    def one_pair_more(start_BT):
        index_T = torch.arange(start_BT.shape[1], device=start_BT.device)
        previous_TT = index_T == index_T[:, None] - 1
        return original(start_BT) | ((start_BT == index_T)[:, :, None] & previous_TT)[:, None]

    with swap(attention, "document_mask", one_pair_more):
        yield


@plant(
    "model.positions-restart-late",
    gate="model.document-isolation",
    title="Positions restart one token late",
    story=(
        "The counter of positions is set back after the first token of a document instead of "
        "before it. That token keeps the position at which it follows the last document, so all "
        "others take it for far away. No mask is wrong, and no loss curve shows it."
    ),
    sources=(
        "https://github.com/swiss-ai/Megatron-LM/pull/40",
        "https://github.com/hiyouga/LlamaFactory/pull/7754",
    ),
)
def positions_restart_late():
    original = rotary.Rotary.at

    def late(self, position_BT):
        return original(self, F.pad(position_BT[:, :-1] + 1, (1, 0)))

    with swap(rotary.Rotary, "at", late):
        yield


def _scaled(wrong):
    def whole(q_BNTH, k_BKSH, v_BKSH, *, scale=None, chunks=False):
        h = q_BNTH.shape[3]
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=True, scale=wrong(h)
        )

    return whole


@plant(
    "model.missing-scale",
    gate="model.reference-differential",
    title="Scores without their scale",
    story=(
        "The division by the root of the head width is lost. At step 0 scores are tiny and the "
        "loss is the same to three digits. Thousands of steps later attention freezes on single "
        "tokens and the run diverges."
    ),
    sources=("founding note: nanolm", "https://github.com/mlc-ai/mlc-llm/issues/3426"),
)
def missing_scale():
    with swap(attention, "whole", _scaled(lambda h: 1.0)):
        yield


@plant(
    "model.double-scale",
    gate="model.reference-differential",
    title="Scores scaled twice",
    story=(
        "Queries are scaled when they are made, and the kernel scales the scores again. Attention "
        "stays almost uniform. The model learns, slowly, and looks merely small."
    ),
    sources=("founding note: nanolm", "https://github.com/FrancescoSaverioZuppichini/ViT/issues/2"),
)
def double_scale():
    with swap(attention, "whole", _scaled(lambda h: 1.0 / h)):
        yield


@plant(
    "model.rope-bf16-table",
    gate="model.reference-differential",
    title="Positions in half precision",
    story=(
        "Positions are cast to bfloat16 before they meet the frequencies. Up to 256 every "
        "position is distinct, so short tests pass. Beyond it neighbours collide and long texts "
        "lose their order."
    ),
    sources=(
        "https://github.com/huggingface/transformers/issues/29285",
        "https://github.com/EleutherAI/gpt-neox/issues/1016",
    ),
)
def rope_bf16_table():
    def coarse(width, max_seq_len, theta, scaling=None, device="cpu"):
        frequency_J = theta ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        )
        position_T = torch.arange(max_seq_len, device=device).to(torch.bfloat16).double()
        angle_TJ = position_T[:, None] * frequency_J
        return angle_TJ.cos().float(), angle_TJ.sin().float()

    with swap(rotary, "rotary_tables", coarse):
        yield


@plant(
    "model.gqa-head-order",
    gate="sampling.cache-parity",
    title="Head groups in another order when decoding",
    story=(
        "Training repeats each key head for its neighbours in turn; the decoding path tiles the "
        "whole set instead. Each path is right by itself. Together they make a well-trained model "
        "babble."
    ),
    sources=(
        "https://github.com/onnx/onnx/issues/7274",
        "https://github.com/apple/axlearn/issues/842",
    ),
)
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


@plant(
    "model.shared-gradient-clobbered",
    gate="model.gradient",
    title="A backward writes into a gradient that others share",
    story=(
        "Branches are kept at half their size and doubled when they are added. The hand-written "
        "backward of the doubling saves memory and works in place. Tested alone it is right. In a "
        "block the same memory is the gradient of the residual stream, so every layer passes down "
        "twice what it should. The forward is right to the last bit, and the loss still falls."
    ),
    sources=(
        "https://github.com/linkedin/Liger-Kernel/issues/1305",
        "https://github.com/pytorch/pytorch/issues/81417",
    ),
)
def shared_gradient_clobbered():
    def residual(self, x_BTD, reading):
        x_BTD = x_BTD + _Doubled.apply(
            self.dropout(self.attention(self.attention_norm(x_BTD), reading)) / 2
        )
        return x_BTD + _Doubled.apply(self.dropout(self.ffn(self.ffn_norm(x_BTD), reading)) / 2)

    with swap(transformer.Block, "residual", residual):
        yield


@plant(
    "model.attention-branch-lost",
    gate="model.overfit-one-batch",
    title="Attention adds nothing",
    story=(
        "After a merge, the block computes attention and throws its output away. The model is a "
        "table of which token follows which. Its loss falls nicely to that of a bigram and stays "
        "there."
    ),
    sources=("https://github.com/theislab/CellFlow/pull/296",),
)
def attention_branch_lost():
    def without_attention(self, x_BTD, reading):
        lost = self.attention(self.attention_norm(x_BTD), reading)
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD), reading)) + 0 * lost

    with swap(transformer.Block, "residual", without_attention):
        yield


@plant(
    "model.labels-of-the-past",
    gate="model.overfit-one-batch",
    title="Labels that are the input",
    story=(
        "The shift between input and labels is undone on the way to the loss, so the model learns "
        "to repeat the token it was just given. Its loss is near zero within minutes. It has "
        "learned nothing."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
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


@plant(
    "model.dropout-unscaled",
    gate="model.dropout-law",
    title="Dropout that forgets its factor",
    story=(
        "Dropout is written by hand: a random mask, a product. The division by the share that is "
        "kept is forgotten. In training every branch is a tenth weaker than in evaluation, so the "
        "held-out loss measures a model that was never trained."
    ),
    sources=("https://arxiv.org/abs/1207.0580",),
)
def dropout_unscaled():
    with swap(transformer.nn, "Dropout", _Unscaled):
        yield


@plant(
    "model.dropout-on-one-branch",
    gate="model.dropout-law",
    title="Dropout on one of two branches",
    story=(
        "Dropout is applied in the block where it used to be, and a second branch is added below "
        "without it. The record states a rate that half of the model never had. The curves of "
        "both look alike."
    ),
    sources=("https://arxiv.org/abs/1207.0580",),
)
def dropout_on_one_branch():
    def residual(self, x_BTD, reading):
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), reading))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD), reading)

    with swap(transformer.Block, "residual", residual):
        yield


@plant(
    "model.dropout-same-masks",
    gate="model.dropout-law",
    title="The same masks at every step",
    story=(
        "To make a run reproducible, the generator is seeded at the start of every step, with the "
        "same number. Dropout then removes the same features in every step: no noise any more, "
        "but a smaller model, while evaluation uses the whole one."
    ),
    sources=("https://arxiv.org/abs/1207.0580",),
)
def dropout_same_masks():
    original = transformer.Transformer.features

    def seeded(self, *inputs):
        if self.training:
            torch.manual_seed(0)
        return original(self, *inputs)

    with swap(transformer.Transformer, "features", seeded):
        yield


@plant(
    "model.ffn-channels-apart",
    gate="model.reference-differential",
    title="One feed-forward multiplies neighbours",
    story=(
        "In one layer the two factors of the feed-forward come out of one product, and the second "
        "is cut one channel too late. Every channel is multiplied with its neighbour. A model "
        "trained so has learned to live with it; one trained elsewhere and read here falls apart "
        "in that layer, seventeen times as loud as its neighbours."
    ),
    sources=("founding note: ship-two-001",),
)
def ffn_channels_apart():
    def one_apart(self, x_BTD, reading=None):
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
        swap(feedforward.SwiGLU, "forward", one_apart),
    ):
        yield
