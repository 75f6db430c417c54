"""Plants in the loss and in gradient accumulation."""

import math

import torch
import torch.nn.functional as F

from stackproof.museum.plant import plant, swap
from stackproof.train import losses
from stackproof.train import step as steps


@plant(
    "loss.padding-counted",
    gate="loss.golden",
    title="Padding counted in the loss",
    story=(
        "The mask is lost on the way to the loss, so padded positions are scored as if they were "
        "text. The loss falls as padding grows, which looks like progress. Runs that pack every "
        "row full never notice."
    ),
    sources=("https://github.com/QwenAudio/CosyVoice/issues/1449",),
)
def padding_counted():
    def unmasked(x_BTD, head_VD, labels_BT):
        return F.cross_entropy(
            (x_BTD @ head_VD.T).flatten(0, 1), labels_BT.clamp(min=0).flatten(), reduction="sum"
        )

    with swap(losses, "linear_cross_entropy_sum", unmasked):
        yield


@plant(
    "loss.labels-shifted-twice",
    gate="loss.golden",
    title="Labels shifted twice",
    story=(
        "The data set already pairs each token with its successor, and the loss shifts once more. "
        "The model learns to skip a token: the loss still falls, only to a higher plateau, and "
        "samples leave letters out."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def labels_shifted_twice():
    original = losses.linear_cross_entropy_sum

    def shifted(x_BTD, head_VD, labels_BT):
        return original(x_BTD[:, :-1], head_VD, labels_BT[:, 1:])

    with swap(losses, "linear_cross_entropy_sum", shifted):
        yield


@plant(
    "loss.bits-instead-of-nats",
    gate="loss.golden",
    title="Bits reported as nats",
    story=(
        "A base-two logarithm slips into the loss. Curves keep their shape and every comparison "
        "within the project holds, but each figure quoted to others is off by 44 percent and "
        "perplexity no longer follows from it."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/261",),
)
def bits_instead_of_nats():
    original = losses.linear_cross_entropy_sum

    def in_bits(x_BTD, head_VD, labels_BT):
        return original(x_BTD, head_VD, labels_BT) / math.log(2)

    with swap(losses, "linear_cross_entropy_sum", in_bits):
        yield


@plant(
    "loss.mean-of-means",
    gate="loss.partition-equivalence",
    title="Mean of micro-batch means",
    story=(
        "Each micro-batch is averaged over its own tokens and the averages are averaged again. "
        "Short micro-batches weigh too much. With equal token counts the two are identical, so "
        "uniform packing hides it for years."
    ),
    sources=(
        "https://github.com/huggingface/transformers/issues/34191",
        "https://github.com/huggingface/transformers/issues/34242",
    ),
)
def mean_of_means():
    def accumulate(state, batches):
        state.optimizer.zero_grad(set_to_none=True)
        means = [
            float(
                steps.backward(
                    state, b, losses.count_valid(b.labels) * len(batches), b.input_ids.numel()
                )
            )
            / losses.count_valid(b.labels)
            for b in batches
        ]
        return sum(means) / len(means), sum(losses.count_valid(b.labels) for b in batches)

    with swap(steps, "accumulate", accumulate):
        yield


@plant(
    "loss.undivided-accumulation",
    gate="loss.partition-equivalence",
    title="Accumulated loss not divided",
    story=(
        "Every micro-batch is divided by its own count only, so N micro-batches give N times the "
        "gradient. AdamW does not care about scale, so the curves agree to the seventh digit, "
        "while clipping and decay quietly change their meaning."
    ),
    sources=(
        "https://github.com/karpathy/nanoGPT/issues/206",
        "https://github.com/karpathy/nanoGPT/issues/207",
    ),
)
def undivided_accumulation():
    original = steps.backward

    def undivided(state, batch, n_valid, n_tokens):
        return original(state, batch, losses.count_valid(batch.labels), n_tokens)

    with swap(steps, "backward", undivided):
        yield


@plant(
    "loss.stale-gradients",
    gate="loss.partition-equivalence",
    title="Gradients of the last step are still there",
    story=(
        "The call that clears gradients is missing. Each update carries all earlier ones with it. "
        "The norm grows with the step count, AdamW normalises most of it away, and the loss still "
        "goes down."
    ),
    sources=("https://github.com/pytorch/torchtitan/issues/3575",),
)
def stale_gradients():
    original = steps.accumulate

    def without_zero_grad(state, batches):
        state.optimizer.zero_grad = lambda set_to_none=True: None
        try:
            return original(state, batches)
        finally:
            del state.optimizer.zero_grad

    with swap(steps, "accumulate", without_zero_grad):
        yield


@plant(
    "loss.rows-leak",
    gate="loss.partition-equivalence",
    title="Targets leak across rows",
    story=(
        "Rows are flattened before the shift, so the last position of one row is trained on the "
        "first token of the next. The effect is one in a sequence length; nothing in the curve "
        "shows it. Reordering the rows does."
    ),
    sources=("https://github.com/huggingface/transformers/issues/47394",),
)
def rows_leak():
    original = losses.linear_cross_entropy_sum

    def leaking(x_BTD, head_VD, labels_BT):
        labels = labels_BT.clone()
        if len(labels) > 1:
            labels[:, -1] = torch.roll(labels_BT, 1, dims=0)[:, -1]
            labels[0, -1] = labels_BT[0, -1]
        return original(x_BTD, head_VD, labels)

    with swap(losses, "linear_cross_entropy_sum", leaking):
        yield


@plant(
    "loss.nan-micro-batch-skipped",
    gate="loss.nan-visible",
    title="A micro-batch that is not a number is skipped",
    story=(
        "The loss of one micro-batch is NaN, and the loop goes on with the next, as robust code "
        "does. Its gradient is dropped, its labels are still counted in the mean. The step "
        "reports a loss that is a little low and moves a little less. Nobody sees the bad rows."
    ),
    sources=(
        "https://github.com/karpathy/nanoGPT/issues/227",
        "https://github.com/dome272/Wuerstchen/issues/27",
    ),
)
def nan_micro_batch_skipped():
    original = steps.backward

    def skipping(state, *arguments):
        held = {p: None if p.grad is None else p.grad.clone() for p in state.model.parameters()}
        nats = original(state, *arguments)
        if bool(nats.isfinite()):
            return nats
        for parameter, gradient in held.items():
            parameter.grad = gradient
        return torch.zeros_like(nats)

    with swap(steps, "backward", skipping):
        yield


@plant(
    "loss.nan-made-zero",
    gate="loss.nan-visible",
    title="Numbers that are not are made zero",
    story=(
        "A nan_to_num stands before the loss, left from a night of debugging. Whatever breaks in "
        "the model, the loss is finite and training goes on, on zeros where features should be."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/227",),
)
def nan_made_zero():
    original = losses.linear_cross_entropy_sum

    def cleaned(x_BTD, head_VD, labels_BT):
        return original(x_BTD.nan_to_num(), head_VD, labels_BT)

    with swap(losses, "linear_cross_entropy_sum", cleaned):
        yield


@plant(
    "loss.z-term-reported",
    gate="loss.golden",
    title="The reported loss has another term in it",
    story=(
        "A small multiple of the squared log normaliser is added to keep logits from growing. One "
        "branch returns it together with the cross-entropy and calls the sum cross-entropy. The "
        "figure is a little high, by an amount that depends on the branch that ran."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/261",),
)
def z_term_reported():
    original = losses.dispatch.linear_cross_entropy

    def together(x_RD, weight_VD, labels_R, **options):
        nats, z = original(x_RD, weight_VD, labels_R, **options | {"z_loss": 1e-4})
        return nats + z, z

    with swap(losses.dispatch, "linear_cross_entropy", together):
        yield


@plant(
    "loss.end-of-text-masked",
    gate="model.overfit-one-batch",
    title="The end of text is taken for padding",
    story=(
        "Padding has no id of its own and borrows that of the end of text. Whoever masks padding "
        "masks every end as well. The loss is fine, even a little lower, and the model has never "
        "been told to stop."
    ),
    sources=(
        "https://github.com/huggingface/transformers/issues/23530",
        "https://github.com/huggingface/trl/issues/976",
    ),
)
def end_of_text_masked():
    original, end = losses.linear_cross_entropy_sum, 0

    def unended(x_BTD, head_VD, labels_BT):
        return original(
            x_BTD, head_VD, labels_BT.masked_fill(labels_BT == end, losses.IGNORE_INDEX)
        )

    with swap(losses, "linear_cross_entropy_sum", unended):
        yield


@plant(
    "loss.end-of-rows-unread",
    gate="loss.own-batch",
    title="The end of long rows is not in the loss",
    story=(
        "Labels are laid out for rows of a length that was enough when it was written, and what "
        "stands beyond it is masked. Counts are taken from the labels before that, so the "
        "reported loss is too low by the share that is missing. Short rows, of tests, are whole."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/206",),
)
def end_of_rows_unread():
    original = losses.linear_cross_entropy_sum

    def first_part(x_BTD, head_VD, labels_BT):
        labels_BT = labels_BT.clone()
        labels_BT[:, 128:] = losses.IGNORE_INDEX
        return original(x_BTD, head_VD, labels_BT)

    with swap(losses, "linear_cross_entropy_sum", first_part):
        yield
