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
from stackproof.museum.plant import swap
from stackproof.train import loop, start
from stackproof.train import step as steps

TENSORS = ("input_ids", "labels", "document_ids")


def oov_flattered():
    def all_of_it(texts, result, dropped_chars):
        return sum(len(t) for t in texts), sum(len(t.encode()) for t in texts)

    with swap(bits_per_byte, "kept_symbols", all_of_it):
        yield


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


def padding_has_bytes():
    def all_labels(labels, token_bytes):
        return int(token_bytes[labels.abs().cpu().numpy()].sum())

    with swap(bits_per_byte, "label_bytes", all_labels):
        yield


def half_precision_score():
    original = bits_per_byte.token_nats
    with swap(
        bits_per_byte,
        "token_nats",
        lambda logits_BTV, labels_BT: original(logits_BTV.bfloat16(), labels_BT),
    ):
        yield


def dropout_active():
    def constant(self, x_BTD, context):
        x_BTD = x_BTD + F.dropout(self.attention(self.attention_norm(x_BTD), context), 0.1)
        return x_BTD + F.dropout(self.ffn(self.ffn_norm(x_BTD), context), 0.1)

    with swap(transformer.Block, "forward", constant):
        yield


def train_mode_lost():
    original = bits_per_byte.evaluate_batches

    def forgetful(model, batches, token_bytes, **options):
        result = original(model, batches, token_bytes, **options)
        model.eval()
        return result

    with swap(bits_per_byte, "evaluate_batches", forgetful):
        yield


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


def noise_stop():
    original = stopping.StopRule.update

    def hasty(self, batch_nats):
        self.patience = 2
        return original(self, batch_nats)

    with swap(stopping.StopRule, "update", hasty):
        yield


def stop_one_round_late():
    original = stopping.StopRule.update

    def late(self, batch_nats):
        decision = original(self, batch_nats)
        return dataclasses.replace(decision, stop=decision.stop and decision.wait > self.patience)

    with swap(stopping.StopRule, "update", late):
        yield


def diverging():
    original = loop.held_out_loss
    factor = 1.0

    def growing(trainer):
        nonlocal factor
        result = original(trainer)
        loss = result.loss_nats * factor
        factor *= 3.0
        return dataclasses.replace(result, loss_nats=loss)

    with swap(loop, "held_out_loss", growing):
        yield


def drifting_batches():
    original = loop.evaluate

    def drifting(trainer):
        stop = original(trainer)
        trainer.held_out = [*trainer.held_out[1:], trainer.held_out[0]]
        return stop

    with swap(loop, "evaluate", drifting):
        yield


@contextmanager
def one_page_over_and_over():
    """Every step reads the first 64 tokens of each row of the first step, sixteen times over."""
    original_draw, original_step, page = loop.draw, steps.train_step, []

    def same(trainer):
        drawn = original_draw(trainer)
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
            before = state.step, state.tokens_seen, state.ema_loss_nats, state.min_ema_loss_nats
            original_step(state, batches)
            state.step, state.tokens_seen, state.ema_loss_nats, state.min_ema_loss_nats = before
        return original_step(state, batches)

    with swap(loop, "draw", same), swap(steps, "train_step", again):
        yield


def page_learned_by_heart():
    with one_page_over_and_over():
        yield


def scored_on_training():
    original = start.run_preflight

    def from_training(trainer, n_eval_batches):
        original(trainer, n_eval_batches)
        cfg, n = trainer.cfg, len(trainer.held_out)
        trainer.held_out = start.eval_batches(
            trainer.dataset.train, cfg.model.max_seq_len, cfg.eval.batch_size, n
        )

    with swap(start, "run_preflight", from_training):
        yield


def rows_repeated():
    original = start.eval_batches

    def first_only(stream, seq_len, batch_size, n_batches):
        return original(stream, seq_len, batch_size, n_batches)[:1] * n_batches

    with swap(start, "eval_batches", first_only):
        yield


def head_of_split():
    def first_ones(stream, seq_len, size, n_batches):
        return [
            reader.rows_batch(stream, size * i + np.arange(size), seq_len) for i in range(n_batches)
        ]

    with swap(start, "eval_batches", first_ones):
        yield


def best_from_zero():
    original = loop.held_out_loss

    def from_zero(trainer):
        trainer.state.best = trainer.state.best or {"step": 0, "val_loss_nats": 0.0}
        return original(trainer)

    with swap(loop, "held_out_loss", from_zero):
        yield


def inputs_shifted():
    original = bits_per_byte.windows

    def late(ids, **shape):
        rows = original(ids, **shape)
        return dataclasses.replace(rows, input_ids=rows.input_ids.roll(-1, 1))

    with swap(bits_per_byte, "windows", late):
        yield


def documents_run_together():
    with swap(bits_per_byte, "model_inputs", lambda batch, device: (batch.input_ids.to(device),)):
        yield


def noise_counts_as_gain():
    original = stopping.StopRule._compare

    def any_gain(self, batch_nats):
        return original(SimpleNamespace(**vars(self) | {"z": 0.0}), batch_nats)

    with swap(stopping.StopRule, "_compare", any_gain):
        yield


def error_too_small():
    original = bits_per_byte._combine

    def small(sums, n_bytes):
        return dataclasses.replace(
            result := original(sums, n_bytes), stderr_nats=result.stderr_nats / len(sums) ** 0.5
        )

    with swap(bits_per_byte, "_combine", small):
        yield
