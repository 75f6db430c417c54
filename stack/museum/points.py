"""Plants that show in what the points of a model hold, long before they show in its loss."""

import torch

from stackproof.model import reading
from stackproof.museum.plant import plant, swap
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


@plant(
    "model.queries-grow",
    gate="model.attention-logits",
    title="Queries grow without bound",
    story=(
        "Nothing holds the size of queries and keys: no norm, no decay on their weights. Their "
        "product grows with every step. The loss goes on falling until softmax has become a "
        "choice of one key; then it jumps, and the run is lost far behind the cause."
    ),
    sources=("https://arxiv.org/abs/2410.16682",),
)
def queries_grow():
    def grow(model):
        for layer in model.layers:
            layer.attention.q.weight.mul_(1.4)

    with _after_each_update(grow):
        yield


@plant(
    "model.scores-sharpened",
    gate="model.attention-entropy",
    title="Scores are multiplied where they should be divided",
    story=(
        "The scale of attention is the square root of the width of a head, not one over it. Every "
        "query chooses one key, no gradient says that another would be better, and the model "
        "learns what can be learned from one token of the past."
    ),
    sources=("https://arxiv.org/abs/2505.24333",),
)
def scores_sharpened():
    original = reading.Reading.visible

    def sharp(self):
        return original(self) | {"scale": 64.0}

    with swap(reading.Reading, "visible", sharp):
        yield


@plant(
    "model.branch-dies",
    gate="model.live-points",
    title="A branch dies and the rest learns around it",
    story=(
        "A feed-forward is switched off by a weight that reached zero and gets no gradient any "
        "more. The loss hardly shows it, the other layers take over what they can, and a part of "
        "the model is paid for and never used."
    ),
    sources=("founding note: ship-two-001",),
)
def branch_dies():
    def die(model):
        model.layers[-1].ffn.up.weight.zero_()

    with _after_each_update(die):
        yield


@plant(
    "model.branch-explodes",
    gate="model.live-points",
    title="A branch explodes behind a norm",
    story=(
        "The stream into the last norm may have any size: the norm makes it small again, and the "
        "loss looks as ever. In single precision nothing happens. The day the model is run in "
        "half precision, the stream is infinite and the text is noise."
    ),
    sources=("founding note: nanolm",),
)
def branch_explodes():
    def explode(model):
        model.layers[0].ffn.down.weight.mul_(3.0)

    with _after_each_update(explode):
        yield
