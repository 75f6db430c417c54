"""A plant in the model that is more than changed text."""

import torch

from stackproof.model import transformer
from stackproof.model.dropout import ATTENTION, FEED_FORWARD
from stackproof.museum.plant import swap


class _Doubled(torch.autograd.Function):
    """2·x. Its backward doubles the gradient where it lies."""

    @staticmethod
    def forward(ctx, x_BTD):
        return 2 * x_BTD

    @staticmethod
    def backward(ctx, grad_BTD):
        return grad_BTD.mul_(2)


# Needs an operation with a hand-written backward, and both branches through it.
def shared_gradient_clobbered():
    def forward(self, x_BTD, context):
        a_BTD = self.attention(self.attention_norm(x_BTD), context)
        x_BTD = x_BTD + _Doubled.apply(self.dropout(a_BTD, ATTENTION, context.places) / 2)
        f_BTD = self.ffn(self.ffn_norm(x_BTD), context)
        return x_BTD + _Doubled.apply(self.dropout(f_BTD, FEED_FORWARD, context.places) / 2)

    with swap(transformer.Block, "forward", forward):
        yield
