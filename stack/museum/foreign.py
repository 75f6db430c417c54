"""Plants in a training script that is not ours; see `stackproof.museum.script`."""

import torch
from torch.nn import functional as F

from stackproof.museum import script
from stackproof.museum.plant import plant, swap, touch


@plant(
    "loss.foreign-labels-unshifted",
    gate="loss.next-token",
    title="The loss compares each logit with its own token",
    story=(
        "A loss written beside the model forgets that somebody has to shift. The model learns to "
        "copy its input: the loss falls to zero within minutes, faster than any run before, and "
        "the text it writes repeats one token."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def labels_unshifted():
    def unshifted(logits, batch, n):
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / n

    with swap(script, "loss_of", unshifted):
        yield


@plant(
    "loss.foreign-labels-shifted-twice",
    gate="loss.next-token",
    title="Labels are shifted by the collator and again by the loss",
    story=(
        "The collator was written for a model that does not shift, and the model was changed for "
        "one that does. Every token is taught the one after the next. The loss falls, only not as "
        "far, and nothing says why."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def labels_shifted_twice():
    original = script.collate

    def shifted(rows):
        batch = original(rows)
        return batch | {"labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    with swap(script, "collate", shifted):
        yield


@plant(
    "loss.foreign-padding-learned",
    gate="loss.token-weights",
    title="Padding counts in the loss",
    story=(
        "The label of padding is the padding token itself, and the loss ignores nothing. Short "
        "rows in a batch with one long row teach little but padding, and the mean loss looks "
        "better the more padding there is."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def padding_learned():
    original = script.loss_of

    def padded(logits, batch, n):
        return original(logits, batch | {"labels": batch["input_ids"]}, n)

    with swap(script, "loss_of", padded):
        yield


@plant(
    "loss.foreign-mean-of-means",
    gate="loss.token-weights",
    title="Each micro-batch is averaged by itself",
    story=(
        "Accumulation adds up the means of micro-batches and divides by their number. Where rows "
        "are ragged a token of a short micro-batch weighs more than one of a long one. It stood "
        "in widely used trainers for years."
    ),
    sources=("https://github.com/huggingface/transformers/issues/34191",),
)
def mean_of_means():
    def mean(logits, batch, n):
        return (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            / script.MICRO
        )

    with swap(script, "loss_of", mean):
        yield


@plant(
    "data.foreign-labels-all-masked",
    gate="data.learnable-batch",
    title="A batch has no label left",
    story=(
        "A prompt is longer than the row, so truncation cuts off the whole answer, and everything "
        "before it is masked. The batch costs a forward and a backward pass, and its mean loss is "
        "zero divided by zero."
    ),
    sources=("https://github.com/huggingface/trl/pull/6320",),
)
def labels_all_masked():
    original = script.collate

    def masked(rows):
        batch = original(rows)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    with swap(script, "collate", masked):
        yield


@plant(
    "data.foreign-stop-never-learned",
    gate="data.learnable-batch",
    title="The stop token is masked as if it were padding",
    story=(
        "Padding is given the id of the stop token, as many guides advise, and the collator masks "
        "every label with that id. The model is never taught to stop; fine-tuned, it answers and "
        "then goes on for ever."
    ),
    sources=("https://github.com/huggingface/trl/pull/6320",),
)
def stop_never_learned():
    original = script.collate

    def masked(rows):
        batch = original(rows)
        return batch | {
            "labels": batch["labels"].masked_fill(batch["input_ids"] == script.EOS, -100)
        }

    with swap(script, "collate", masked):
        yield


@plant(
    "data.foreign-padding-labelled",
    gate="data.learnable-batch",
    title="Labels are a copy of the padded ids",
    story=(
        "The collator pads and then clones ids into labels. The mask is right and attention "
        "ignores the padding, so the forward pass is fine; only the loss learns to predict "
        "padding after padding, the easiest token there is."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def padding_labelled():
    original = script.collate

    def cloned(rows):
        batch = original(rows)
        return batch | {"labels": batch["input_ids"].clone()}

    with swap(script, "collate", cloned):
        yield


@plant(
    "data.foreign-left-padding-unmasked",
    gate="data.learnable-batch",
    title="Left padding that the mask takes for text",
    story=(
        "Padding is looked for at the end of a row, and this tokenizer pads at the beginning. The "
        "mask comes out all ones: every token sees the padding and stands too far right. No label "
        "is on padding, so the loss looks normal."
    ),
    sources=(
        "https://github.com/NVIDIA-NeMo/Automodel/pull/3704",
        "https://github.com/huggingface/transformers/issues/33095",
    ),
)
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


@plant(
    "data.foreign-places-all-zero",
    gate="data.learnable-batch",
    title="Every token stands at position 0",
    story=(
        "The collator makes the position ids from a mask that is not there yet, and each comes "
        "out as 0. The model has become a bag of words: it still learns which words are frequent "
        "and near, and the loss falls to where such a model ends."
    ),
    sources=("https://github.com/huggingface/transformers/issues/33095",),
)
def places_all_zero():
    original = script.collate

    def unplaced(rows):
        batch = original(rows)
        return batch | {"position_ids": torch.zeros_like(batch["position_ids"])}

    with swap(script, "collate", unplaced):
        yield


@plant(
    "data.foreign-order-repeats",
    gate="data.fresh-rows",
    title="Every epoch has the order of the first",
    story=(
        "The sampler is seeded once and never told the epoch. Each epoch brings the same rows in "
        "the same order, so that the same rows always share a batch and the last ones seen are "
        "always the same. The curve looks as ever; it generalises a little worse."
    ),
    sources=("https://github.com/pytorch/pytorch/issues/31771",),
)
def order_repeats():
    original = script.order_of

    def of_the_first(epoch):
        return original(0)

    with swap(script, "order_of", of_the_first):
        yield


@plant(
    "data.foreign-held-out-trained",
    gate="data.fresh-rows",
    title="Held-out rows are in the training split as well",
    story=(
        "The split is taken after rows were repeated to balance the sources, or from a list that "
        "was sorted in the meantime. The held-out loss goes down with the training loss, and the "
        "better the model knows the rows by heart, the better it looks."
    ),
    sources=(
        "https://github.com/openai/parameter-golf/issues/2127",
        "https://github.com/marin-community/marin/pull/2700",
    ),
)
def held_out_trained():
    def drawn_before():
        return script.texts(script.ROWS, seed=4)[:9]

    with swap(script, "held_out", drawn_before):
        yield


@plant(
    "model.foreign-mask-missing",
    gate="model.future-blind",
    title="Attention has lost its causal mask",
    story=(
        "A mask of padding is handed to the attention, which then takes it for the whole mask. "
        "Every token sees the one it is to predict. The loss falls to almost nothing, and "
        "generation, where there is no future, is noise."
    ),
    sources=("https://github.com/rasbt/LLMs-from-scratch/issues/1062",),
)
def mask_missing():
    def all_visible(ids, mask):
        return torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool)

    with swap(script, "visible", all_visible):
        yield


@plant(
    "model.foreign-padding-seen",
    gate="model.padding-blind",
    title="The mask of padding is accepted and not used",
    story=(
        "The model takes an attention mask and does not pass it on. With padding on the right "
        "nothing shows, because no token looks ahead. With padding on the left, as generation in "
        "batches needs it, every row reads the padding."
    ),
    sources=("https://github.com/huggingface/transformers/issues/29285",),
)
def padding_seen():
    original = script.visible

    def unmasked(ids, mask):
        return original(ids, None)

    with swap(script, "visible", unmasked):
        yield


@plant(
    "model.foreign-head-untied",
    gate="model.tied-head",
    title="The head is a copy of the embedding",
    story=(
        "A function that moves or casts weights makes a new tensor for the head. The "
        "configuration still says that both are one. They drift apart during training, and one of "
        "them is thrown away at the next load."
    ),
    sources=("https://github.com/huggingface/transformers/issues/42612",),
)
def head_untied():
    original = script.Small

    def loose():
        touch()
        model = original()
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
        return model

    with swap(script, "Small", loose):
        yield


@plant(
    "model.foreign-logits-scaled",
    gate="model.first-loss",
    title="Logits are far too large",
    story=(
        "A scale that belonged into the attention is applied to the logits, or an initial spread "
        "is a hundred times too large. The first loss stands several nats above guessing, and the "
        "first thousand steps only mend that."
    ),
    sources=("https://github.com/rasbt/LLMs-from-scratch/issues/1062",),
)
def logits_scaled():
    original = script.logits

    def scaled(head, x):
        return original(head, x) * 12

    with swap(script, "logits", scaled):
        yield


@plant(
    "tokenizer.foreign-too-large",
    gate="tokenizer.fits-model",
    title="The tokenizer has more ids than the embedding has rows",
    story=(
        "Special tokens were added to the tokenizer, and nobody resized the embedding. As long as "
        "no text contains them all is well; the first that does is an index beyond the table, an "
        "assertion on a GPU a hundred calls later."
    ),
    sources=("https://github.com/Lightning-AI/litgpt/issues/1734",),
)
def too_large():
    original = script.make_tokenizer

    def larger():
        made = original()
        type(made).__len__ = lambda self: script.VOCAB + 2
        return made

    with swap(script, "make_tokenizer", larger):
        yield
