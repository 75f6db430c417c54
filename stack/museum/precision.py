"""Plants in half precision: sums that are taken in the type of the products."""

import torch

from stackproof.kernels import cross_entropy
from stackproof.model import norm
from stackproof.museum.plant import plant, swap
from stackproof.train import state
from stackproof.train import step as steps


@plant(
    "precision.norm-in-half",
    gate="precision.shadow",
    title="The mean square is taken in half precision",
    story=(
        "The cast to float32 is dropped from the norm, and under autocast it computes as "
        "everything else does. A mean square of thousands of features is now known to two or "
        "three digits, and every row is scaled by a factor that is off by so much. In float32, "
        "where tests run, nothing changes. Deep layers drift from what the same weights compute "
        "elsewhere."
    ),
    sources=(
        "https://github.com/sgl-project/sglang/pull/27540",
        "https://github.com/meta-llama/llama/issues/1048",
        "https://github.com/pytorch/torchtitan/issues/2542",
    ),
)
def norm_in_half():
    def forward(self, x_BTD):
        kind = x_BTD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
        with torch.autocast(kind, enabled=False):
            half = x_BTD.to(dtype)
            return (
                half
                * torch.rsqrt(half.square().mean(-1, keepdim=True) + self.eps)
                * self.weight.to(dtype)
            ).to(x_BTD.dtype)

    with swap(norm.RMSNorm, "forward", forward):
        yield


@plant(
    "precision.loss-in-half",
    gate="precision.shadow",
    title="The loss is taken in half precision",
    story=(
        "Logits stay in the type of the product that made them, which saves half of the largest "
        "buffer. Log-sum-exp and the sum over tokens follow. The loss comes in steps of a "
        "sixteenth of a nat, and gradients of rare tokens round to nothing. A test in float32 "
        "sees no difference, and neither does a curve that is smoothed."
    ),
    sources=(
        "https://github.com/Modalities/modalities/pull/464",
        "https://github.com/google-deepmind/optax/issues/1020",
        "https://github.com/linkedin/Liger-Kernel/issues/950",
    ),
)
def loss_in_half():
    def as_multiplied(x_CD, weight_VD):
        return x_CD @ weight_VD.T

    with swap(cross_entropy, "_logits", as_multiplied):
        yield


@plant(
    "precision.unscale-left-out",
    gate="precision.loss-scale",
    title="The clip sees gradients that carry the loss scale",
    story=(
        "In half precision the loss is multiplied by some ten thousand, so that small gradients "
        "survive. The line that divides it out before the clip is lost. A fused optimizer divides "
        "by itself, so nothing crashes. But the clip has seen a norm ten thousand times too "
        "large, and what it left over is nearly nothing. AdamW hides even that, until its eps is "
        "larger than what is left."
    ),
    sources=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/9599",
        "https://github.com/NVIDIA/apex/issues/1512",
        "https://github.com/pytorch/examples/issues/1196",
    ),
)
def unscale_left_out():
    original = steps.accumulate

    def still_scaled(state, batches):
        with swap(torch.amp.GradScaler, "unscale_", lambda self, optimizer: None):
            return original(state, batches)

    with swap(steps, "accumulate", still_scaled):
        yield


@plant(
    "precision.half-undeclared",
    gate="precision.declared",
    title="Half precision that nobody asked for",
    story=(
        "A helper enters autocast whatever the configuration says, because every machine it was "
        "written on wanted it. A run that is the float32 reference of others is none. Its loss is "
        "right to three digits, so nobody looks."
    ),
    sources=("https://github.com/pytorch/ao/issues/1124",),
)
def half_undeclared():
    with swap(
        state,
        "declared_autocast",
        lambda cfg, device: torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        yield
