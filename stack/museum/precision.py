"""Plants in half precision: sums that are taken in the type of the products."""

import torch

from stackproof.kernels import cross_entropy
from stackproof.model import norm
from stackproof.museum.plant import swap
from stackproof.train import state
from stackproof.train import step as steps


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


def loss_in_half():
    def as_multiplied(x_CD, weight_VD):
        return x_CD @ weight_VD.T

    with swap(cross_entropy, "_logits", as_multiplied):
        yield


def unscale_left_out():
    original = steps.accumulate

    def still_scaled(state, batches):
        with swap(torch.amp.GradScaler, "unscale_", lambda self, optimizer: None):
            return original(state, batches)

    with swap(steps, "accumulate", still_scaled):
        yield


def half_undeclared():
    with swap(
        state,
        "declared_autocast",
        lambda cfg, device: torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        yield
