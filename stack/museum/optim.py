"""Plants in the optimizer and in clipping that are more than changed text."""

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt


# Patches a class of torch.
def bias_correction_stuck():
    original = torch.optim.AdamW.step

    def stuck(self, closure=None):
        for parameter in (
            p for group in self.param_groups for p in group["params"] if p in self.state
        ):
            self.state[parameter]["step"].zero_()
        return original(self, closure)

    with swap(torch.optim.AdamW, "step", stuck):
        yield


# Counts from the first gradient that clipping would have changed.
def no_clipping():
    def gone(grads, norm, max_norm):
        if norm > max_norm:
            touch()

    with swap(opt, "clip_gradients", gone, counted=False):
        yield


# Patches a class of torch.
def untouched_decays():
    original = torch.optim.AdamW.step

    def shrinking(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and not p.grad.any()):
                p.data.mul_(1 - 0.1 * group["lr"])
        return original(self, closure)

    with swap(torch.optim.AdamW, "step", shrinking):
        yield


# A whole second algorithm in place of torch's.
def eps_inside_the_root():
    @torch.no_grad()
    def second_copy(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                state["step"] += 1
                t = int(state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                root = (state["exp_avg_sq"] / (1 - b2**t) + group["eps"]).sqrt()
                p.sub_(group["lr"] * state["exp_avg"] / (1 - b1**t) / root)

    with swap(torch.optim.AdamW, "step", second_copy):
        yield
