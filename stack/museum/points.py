"""Plants that show in what the points of a model hold, long before they show in its loss."""

import torch

from stackproof.model import forward_context
from stackproof.museum.plant import swap
from stackproof.train import step as steps


def _after_each_update(change):
    """`train_step`, with `change(model)` after it."""
    original = steps.train_step

    def changed(state, batches, **kwargs):
        report = original(state, batches, **kwargs)
        with torch.no_grad():
            change(state.model)
        return report

    return swap(steps, "train_step", changed)


def queries_grow():
    def grow(model):
        for layer in model.layers:
            layer.attention.q.weight.mul_(1.4)

    with _after_each_update(grow):
        yield


def scores_sharpened():
    original = forward_context.ForwardContext.visible

    def sharp(self):
        return original(self) | {"scale": 64.0}

    with swap(forward_context.ForwardContext, "visible", sharp):
        yield


def branch_dies():
    def die(model):
        model.layers[-1].ffn.up.weight.zero_()

    with _after_each_update(die):
        yield


def branch_explodes():
    def explode(model):
        model.layers[0].ffn.down.weight.mul_(3.0)

    with _after_each_update(explode):
        yield
