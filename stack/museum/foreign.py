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


def labels_all_masked():
    original = script.collate

    def masked(rows):
        batch = original(rows)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    with swap(script, "collate", masked):
        yield


def stop_never_learned():
    original = script.collate

    def masked(rows):
        batch = original(rows)
        return batch | {
            "labels": batch["labels"].masked_fill(batch["input_ids"] == script.EOS, -100)
        }

    with swap(script, "collate", masked):
        yield


def padding_labelled():
    original = script.collate

    def cloned(rows):
        batch = original(rows)
        return batch | {"labels": batch["input_ids"].clone()}

    with swap(script, "collate", cloned):
        yield


def left_padding_unmasked():
    original = script.collate

    def left(rows):
        batch = original(rows)
        turned = {
            name: torch.stack(
                [r.roll(int((m == 0).sum())) for r, m in zip(batch[name], batch["attention_mask"])]
            )
            for name in batch
        }
        return turned | {
            "attention_mask": torch.ones_like(batch["attention_mask"]),
            "position_ids": batch["position_ids"],
        }

    with swap(script, "collate", left):
        yield


def places_all_zero():
    original = script.collate

    def unplaced(rows):
        batch = original(rows)
        return batch | {"position_ids": torch.zeros_like(batch["position_ids"])}

    with swap(script, "collate", unplaced):
        yield


def order_repeats():
    original = script.order_of

    def of_the_first(epoch):
        return original(0)

    with swap(script, "order_of", of_the_first):
        yield


def held_out_trained():
    def drawn_before():
        return script.texts(script.ROWS, seed=4)[:9]

    with swap(script, "held_out", drawn_before):
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


def too_large():
    original = script.make_tokenizer

    def larger():
        made = original()
        type(made).__len__ = lambda self: script.VOCAB + 2
        return made

    with swap(script, "make_tokenizer", larger):
        yield
