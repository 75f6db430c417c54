"""Plants in a training script that is not ours; see `stackproof.museum.script`."""

import torch
from torch.nn import functional as F

from stackproof.museum import script
from stackproof.museum.plant import swap, touch


def labels_unshifted():
    def unshifted(logits, batch, n):
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / n

    with swap(script, "loss_of", unshifted):
        yield


def labels_shifted_twice():
    original = script.collate

    def shifted(rows):
        batch = original(rows)
        return batch | {"labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    with swap(script, "collate", shifted):
        yield


def padding_learned():
    original = script.loss_of

    def padded(logits, batch, n):
        return original(logits, batch | {"labels": batch["input_ids"]}, n)

    with swap(script, "loss_of", padded):
        yield


def mean_of_means():
    def mean(logits, batch, n):
        return (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            / script.MICRO
        )

    with swap(script, "loss_of", mean):
        yield


def mask_missing():
    def all_visible(ids, mask):
        return torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool)

    with swap(script, "visible", all_visible):
        yield


def padding_seen():
    original = script.visible

    def unmasked(ids, mask):
        return original(ids, None)

    with swap(script, "visible", unmasked):
        yield


def head_untied():
    original = script.Small

    def loose():
        touch()
        model = original()
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
        return model

    with swap(script, "Small", loose):
        yield


def logits_scaled():
    original = script.logits

    def scaled(head, x):
        return original(head, x) * 12

    with swap(script, "logits", scaled):
        yield
