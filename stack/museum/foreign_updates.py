"""Plants in a training script that is not ours, where it updates, evaluates and saves;
see `stackproof.museum.script`.
"""

import torch

from stackproof.museum import script
from stackproof.museum.plant import swap


def parameter_missing():
    def forgetful(model):
        return torch.optim.AdamW(
            [p for n, p in model.named_parameters() if p.requires_grad and "qkv" not in n], lr=1e-3
        )

    with swap(script, "make_optimizer", forgetful):
        yield


def decay_on_norms():
    def one_group(model):
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
        )

    with swap(script, "make_optimizer", one_group):
        yield


def stale_gradients():
    def kept(model):
        return None

    with swap(script, "after_update", kept):
        yield


def gradient_zeroed():
    original = script.before_update

    def wiped(model):
        original(model)
        model.qkv.weight.grad.zero_()

    with swap(script, "before_update", wiped):
        yield


def frozen_moves():
    original = script.before_update

    def decayed(model):
        original(model)
        model.place.weight.data.mul_(0.999)

    with swap(script, "before_update", decayed):
        yield


def branch_detached():
    def cut(x):
        return x.detach()

    with swap(script, "mixed", cut):
        yield


def uphill():
    class Written(torch.optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=group["lr"])

    def climbing(model):
        return Written(
            [p for p in model.parameters() if p.requires_grad], {"lr": 1e-3, "weight_decay": 0.0}
        )

    with swap(script, "make_optimizer", climbing):
        yield


def never_steps():
    original = script.update

    def once(optimizer):
        if not optimizer.state:
            original(optimizer)

    with (
        swap(script, "update", once),
        swap(script, "STEPS", 40),
        swap(script, "after_update", lambda model: None),
    ):
        yield


def evaluation_writes():
    original = script.evaluate

    def rounded(model, batch):
        model.qkv.weight.data = model.qkv.weight.data.half().float()
        return original(model, batch)

    with swap(script, "evaluate", rounded):
        yield


def per_micro_step():
    def tick(scheduler):
        scheduler.optimizer._opt_called = True
        scheduler.step()

    with swap(script, "micro_step_done", tick):
        yield


def rate_zero():
    def zero(update):
        return 0.0

    with swap(script, "rate_at", zero):
        yield


def tensor_changed():
    original = script.saved

    def rounded(model, optimizer):
        kept = original(model, optimizer)
        kept["model"]["qkv.weight"] = kept["model"]["qkv.weight"].bfloat16().float()
        return kept

    with swap(script, "saved", rounded):
        yield


def moments_lost():
    original = script.loaded

    def without_moments(kept, model, optimizer):
        original(kept, model, optimizer)
        optimizer.state.clear()

    with swap(script, "loaded", without_moments):
        yield
