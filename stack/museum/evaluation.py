"""Plants in evaluation: scores that flatter, change by themselves or end a run for nothing."""

import dataclasses
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch.nn.functional as F

from stackproof.data import reader
from stackproof.evaluate import bits_per_byte, stopping
from stackproof.model import transformer
from stackproof.museum.plant import plant, swap
from stackproof.train import loop, run, session
from stackproof.train import step as steps

TENSORS = ("input_ids", "labels", "document_ids")


@plant(
    "evaluation.oov-flattered",
    gate="evaluation.byte-conservation",
    title="Unknown characters make the score better",
    story=(
        "Characters outside the vocabulary are dropped before the model sees them, but still "
        "counted when the score is divided by the length of the text. The stranger the text, the "
        "better the figure."
    ),
    sources=("founding note: the twenty-second training run",),
)
def oov_flattered():
    def all_of_it(texts, result, dropped_chars):
        return sum(len(t) for t in texts), sum(len(t.encode()) for t in texts)

    with swap(bits_per_byte, "kept_symbols", all_of_it):
        yield


@plant(
    "evaluation.bytes-scored-twice",
    gate="evaluation.byte-conservation",
    title="Overlapping windows count twice",
    story=(
        "Windows overlap to give context, and the overlap is scored again in each. Easy, "
        "well-conditioned bytes weigh more than the rest. The sum no longer belongs to any text."
    ),
    sources=("https://github.com/huggingface/transformers/issues/30975",),
)
def bytes_scored_twice():
    original = bits_per_byte.windows

    def unmasked(ids, *, seq_len, stride, pad_id):
        rows = original(ids, seq_len=seq_len, stride=stride, pad_id=pad_id)
        labels = rows.labels.clone()
        for w in range(1, len(labels)):
            overlap = seq_len - stride
            labels[w, :overlap] = rows.input_ids[w, 1 : overlap + 1]
        return bits_per_byte.Window(rows.input_ids, labels)

    with swap(bits_per_byte, "windows", unmasked):
        yield


@plant(
    "evaluation.padding-has-bytes",
    gate="evaluation.invariance",
    title="Padding counts as text",
    story=(
        "Nats are summed over the labels that are scored, bytes over all of them. Rows that end "
        "in padding bring bytes that cost nothing, and the more padding, the better the model "
        "looks."
    ),
    sources=("https://github.com/huggingface/transformers/issues/30975",),
)
def padding_has_bytes():
    def all_labels(labels, token_bytes):
        return int(token_bytes[labels.abs().cpu().numpy()].sum())

    with swap(bits_per_byte, "label_bytes", all_labels):
        yield


@plant(
    "evaluation.half-precision-score",
    gate="evaluation.invariance",
    title="A score from rounded logits",
    story=(
        "The evaluation runs in half precision from end to end, the loss included. Every score is "
        "off in the third digit, which is where models are compared."
    ),
    sources=("https://github.com/facebookresearch/ParlAI/issues/623",),
)
def half_precision_score():
    original = bits_per_byte.token_nats
    with swap(
        bits_per_byte,
        "token_nats",
        lambda logits_BTV, labels_BT: original(logits_BTV.bfloat16(), labels_BT),
    ):
        yield


@plant(
    "evaluation.dropout-active",
    gate="evaluation.invariance",
    title="Dropout in evaluation",
    story=(
        "The block calls functional dropout with a constant rate, which does not know about "
        "evaluation mode. Scores are worse than they should be and differ at each call. A "
        "configuration without dropout hides it."
    ),
    sources=(
        "https://github.com/karpathy/nanoGPT/issues/240",
        "https://github.com/ipolharvard/ethos-ares/issues/20",
    ),
)
def dropout_active():
    def constant(self, x_BTD, reading):
        x_BTD = x_BTD + F.dropout(self.attention(self.attention_norm(x_BTD), reading), 0.1)
        return x_BTD + F.dropout(self.ffn(self.ffn_norm(x_BTD), reading), 0.1)

    with swap(transformer.Block, "residual", constant):
        yield


@plant(
    "evaluation.train-mode-lost",
    gate="evaluation.invariance",
    title="Training goes on in evaluation mode",
    story=(
        "After the first evaluation nobody calls train() again. From then on there is no dropout, "
        "training loss drops at once, and the model begins to memorise. The curve looks like a "
        "breakthrough."
    ),
    sources=(
        "https://github.com/NVIDIA/Megatron-LM/issues/411",
        "https://github.com/fartashf/vsepp/issues/4",
    ),
)
def train_mode_lost():
    original = bits_per_byte.evaluate_batches

    def forgetful(model, batches, token_bytes, **options):
        result = original(model, batches, token_bytes, **options)
        model.eval()
        return result

    with swap(bits_per_byte, "evaluate_batches", forgetful):
        yield


@plant(
    "evaluation.mean-of-means",
    gate="evaluation.invariance",
    title="A mean of batch means",
    story=(
        "Each batch is averaged, then the averages are. A ragged last batch with three tokens "
        "weighs as much as a full one, so the score depends on the batch size. Batches of equal "
        "size hide it."
    ),
    sources=(
        "https://github.com/facebookresearch/ParlAI/issues/623",
        "https://github.com/keras-team/keras-hub/issues/2958",
    ),
)
def mean_of_means():
    original = bits_per_byte.evaluate_batches

    def averaged(model, batches, token_bytes, **options):
        result = original(model, batches, token_bytes, **options)
        mean = math.fsum(result.batch_nats) / len(result.batch_nats)
        return dataclasses.replace(
            result, loss_nats=mean, bits_per_byte=result.bits_per_byte * mean / result.loss_nats
        )

    with swap(bits_per_byte, "evaluate_batches", averaged):
        yield


@plant(
    "evaluation.noise-stop",
    gate="evaluation.stop-rule",
    title="Stopped by noise",
    story=(
        "The rule waits two evaluations only, in a noise band wider than the gain of one. Two bad "
        "draws in a row come soon. The run ends at epoch 5 of 24 with most of its learning ahead."
    ),
    sources=("founding note: ship-two-001",),
)
def noise_stop():
    original = stopping.StopRule.update

    def hasty(self, batch_nats):
        self.patience = 2
        return original(self, batch_nats)

    with swap(stopping.StopRule, "update", hasty):
        yield


@plant(
    "evaluation.stop-one-round-late",
    gate="evaluation.stop-rule",
    title="Patience counts one round too many",
    story=(
        "The waiting counter is compared before it is raised, so each stop comes one evaluation "
        "late. Every run pays for a round that was declared unneeded, and declared patience "
        "cannot be compared with anyone else's."
    ),
    sources=("https://github.com/keras-team/keras/pull/8100",),
)
def stop_one_round_late():
    original = stopping.StopRule.update

    def late(self, batch_nats):
        decision = original(self, batch_nats)
        return dataclasses.replace(decision, stop=decision.stop and decision.wait > self.patience)

    with swap(stopping.StopRule, "update", late):
        yield


@plant(
    "evaluation.diverging",
    gate="evaluation.divergence",
    title="Held-out loss more than doubles",
    story=(
        "Training pushes the weights out of the region where the model works, between two "
        "evaluations. Training loss is noisy enough to excuse it for a while. Held-out loss has "
        "more than doubled and the run goes on."
    ),
    sources=("founding note: ship-two-001",),
)
def diverging():
    original = run.Run.measure
    factor = 1.0

    def growing(self):
        nonlocal factor
        result = original(self)
        loss = result.loss_nats * factor
        factor *= 3.0
        return dataclasses.replace(result, loss_nats=loss)

    with swap(run.Run, "measure", growing):
        yield


@plant(
    "evaluation.drifting-batches",
    gate="evaluation.same-batches",
    title="Other held-out data at each evaluation",
    story=(
        "The iterator over held-out data is kept between evaluations instead of being started "
        "afresh. Each evaluation scores other text, so a gain may be an easier page. Curves are "
        "noisier and nobody knows why."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/652",),
)
def drifting_batches():
    original = run.Run.evaluate

    def drifting(self):
        decision = original(self)
        self.held_out = [*self.held_out[1:], self.held_out[0]]
        return decision

    with swap(run.Run, "evaluate", drifting):
        yield


@contextmanager
def one_page_over_and_over():
    """Every step reads the first 64 tokens of each row of the first step, sixteen times over."""
    original_draw, original_step, page = loop.draw, steps.train_step, []

    def same(run):
        drawn = original_draw(run)
        page.extend(
            []
            if page
            else [
                dataclasses.replace(b, **{k: getattr(b, k)[:, :64] for k in TENSORS}) for b in drawn
            ]
        )
        return page

    def again(state, batches):
        for _ in range(15):
            before = state.step, state.tokens_seen
            original_step(state, batches)
            state.step, state.tokens_seen = before
        return original_step(state, batches)

    with swap(loop, "draw", same), swap(steps, "train_step", again):
        yield


@plant(
    "evaluation.page-learned-by-heart",
    gate="evaluation.overfit-onset",
    title="A page is learned by heart",
    story=(
        "The corpus is far too small for the model, or one file of it is read again and again. "
        "Training loss falls on, and held-out loss has turned. Averaged curves and a patient stop "
        "rule hide the turn for half of the run."
    ),
    sources=("founding note: ship-two-001",),
)
def page_learned_by_heart():
    with one_page_over_and_over():
        yield


@plant(
    "evaluation.scored-on-training",
    gate="evaluation.held-out",
    title="Held-out batches from the wrong split",
    story=(
        "One argument is the wrong stream. The held-out loss is taken on text the model is "
        "trained on, falls as the training loss falls, and no curve will ever show that the model "
        "learns by heart."
    ),
    sources=("https://arxiv.org/abs/2012.07805",),
)
def scored_on_training():
    original = session._check_before_step_one

    def from_training(run, n_eval_batches):
        n = original(run, n_eval_batches)
        run.held_out = session.eval_batches(
            run.dataset.train, run.cfg.model.max_seq_len, run.cfg.eval.batch_size, n
        )
        return n

    with swap(session, "_check_before_step_one", from_training):
        yield


@plant(
    "evaluation.rows-repeated",
    gate="evaluation.held-out",
    title="The same held-out batch, again and again",
    story=(
        "The loader of the held-out split begins anew for every batch. Sixteen batches are scored "
        "and each is the first. The standard error comes out as zero, and decisions stand on a "
        "sixteenth of the text they claim."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/652",),
)
def rows_repeated():
    original = session.eval_batches

    def first_only(stream, seq_len, batch_size, n_batches):
        return original(stream, seq_len, batch_size, n_batches)[:1] * n_batches

    with swap(session, "eval_batches", first_only):
        yield


@plant(
    "evaluation.head-of-split",
    gate="evaluation.held-out",
    title="Only the head of the held-out split is scored",
    story=(
        "Held-out batches are taken from the beginning of the split. It holds the sources one "
        "after another, so the first is scored and the others never are. The loss is that of one "
        "kind of text."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/652",),
)
def head_of_split():
    def first_ones(stream, seq_len, size, n_batches):
        return [
            reader.rows_batch(stream, size * i + np.arange(size), seq_len) for i in range(n_batches)
        ]

    with swap(session, "eval_batches", first_ones):
        yield


@plant(
    "evaluation.best-from-zero",
    gate="evaluation.held-out",
    title="Nothing is better than zero",
    story=(
        "The best held-out loss is set to zero where it should begin at infinity. No evaluation "
        "is ever better, so the pointer to the best checkpoint stays where it was put first. What "
        "is released as the best is the worst."
    ),
    sources=("founding note: ship-two-001",),
)
def best_from_zero():
    original = run.Run.measure

    def from_zero(self):
        self.state.best = self.state.best or {"step": 0, "val_loss_nats": 0.0}
        return original(self)

    with swap(run.Run, "measure", from_zero):
        yield


@plant(
    "evaluation.inputs-shifted",
    gate="evaluation.byte-conservation",
    title="Windows begin one token late",
    story=(
        "The windows over a text are cut one place off, so that the token to be guessed is given. "
        "Every label is scored once, bytes add up, and a model that guesses costs what guessing "
        "costs. Only for a model that reads is the score absurdly good."
    ),
    sources=("https://github.com/NVIDIA/Megatron-LM/issues/411",),
)
def inputs_shifted():
    original = bits_per_byte.windows

    def late(ids, **shape):
        rows = original(ids, **shape)
        return dataclasses.replace(rows, input_ids=rows.input_ids.roll(-1, 1))

    with swap(bits_per_byte, "windows", late):
        yield


@plant(
    "evaluation.documents-run-together",
    gate="evaluation.invariance",
    title="Packed documents are kept apart in training only",
    story=(
        "Training passes the ids of documents to the model, evaluation does not. Held-out rows "
        "are read as one long text, and each document is scored after a stranger's. The loss is a "
        "little too high at every evaluation, in the same way, so no curve shows it."
    ),
    sources=("https://github.com/huggingface/nanoVLM/pull/204",),
)
def documents_run_together():
    with swap(bits_per_byte, "_inputs", lambda batch, device: (batch.input_ids.to(device),)):
        yield


@plant(
    "evaluation.noise-counts-as-gain",
    gate="evaluation.stop-rule",
    title="Noise counts as a gain",
    story=(
        "The rule that should ask for a gain of two standard errors asks for any. On a curve "
        "without noise it stops when it should. On a real plateau a round is lower than the best "
        "by chance now and then, and patience begins anew."
    ),
    sources=("founding note: ship-two-001",),
)
def noise_counts_as_gain():
    original = stopping.StopRule._compare

    def any_gain(self, batch_nats):
        return original(SimpleNamespace(**vars(self) | {"z": 0.0}), batch_nats)

    with swap(stopping.StopRule, "_compare", any_gain):
        yield


@plant(
    "evaluation.error-too-small",
    gate="evaluation.invariance",
    title="The standard error is divided by the number, not by its root",
    story=(
        "Beside each loss stands a standard error that is too small by the root of the number of "
        "batches. Differences of nothing are many standard errors wide, and whoever compares two "
        "models by them finds a winner every time."
    ),
    sources=("founding note: ship-two-001",),
)
def error_too_small():
    original = bits_per_byte._combine

    def small(sums, n_bytes):
        return dataclasses.replace(
            result := original(sums, n_bytes), stderr_nats=result.stderr_nats / len(sums) ** 0.5
        )

    with swap(bits_per_byte, "_combine", small):
        yield
