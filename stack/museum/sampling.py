"""Plants in sampling: caches, filters and draws that are almost right, and a model that loops."""

from contextlib import nullcontext

import torch

from stackproof.evaluate import sampling
from stackproof.model.forward_context import LayerCache
from stackproof.museum.evaluation import one_page_over_and_over
from stackproof.museum.plant import swap, touch
from stackproof.train import callbacks, loop


def cache_position_off_by_one():
    original = LayerCache.append

    def overwriting(self, k_BKTH, v_BKTH):
        if self.filled and k_BKTH.shape[2] == 1:
            self.filled -= 1
        return original(self, k_BKTH, v_BKTH)

    with swap(LayerCache, "append", overwriting):
        yield


def top_p_drops_crossing():
    def without_shift(logits_V, p):
        order = logits_V.argsort(descending=True, stable=True)
        beyond = logits_V.double().softmax(-1)[order].cumsum(-1) > p
        beyond[0] = False
        return logits_V if p >= 1.0 else logits_V.index_fill(0, order[beyond], sampling.MASKED)

    with swap(sampling, "keep_top_p", without_shift):
        yield


def zero_probability():
    def wrong_side(probs_V, uniforms_R):
        cumulative = probs_V.cumsum(-1)
        return torch.searchsorted(cumulative, uniforms_R.to(cumulative)).clamp(max=len(probs_V) - 1)

    with swap(sampling, "pick", wrong_side):
        yield


def filter_before_temperature():
    original = sampling.filtered_probs

    def swapped(logits_V, *, temperature, top_k=0, top_p=1.0):
        if temperature == 0.0:
            return original(logits_V, temperature=0.0)
        kept = sampling.keep_top_p(sampling.keep_top_k(logits_V.double(), top_k), top_p)
        return (kept / temperature).softmax(-1)

    with swap(sampling, "filtered_probs", swapped):
        yield


def monitor_blind():
    original = loop.generate

    def looping(model, ids, **options):
        drawn = original(model, ids, **options)
        return drawn[:1] * len(drawn)

    with swap(loop, "generate", looping):
        yield


def article_everywhere():
    original = callbacks.Sampled

    def said(**event):
        words = event["text"].split() * 8
        return original(**{**event, "text": " the ".join(words)})

    with swap(callbacks, "Sampled", said):
        yield


def training_text_recited():
    original = loop.sample

    def reciting(trainer):
        passage = trainer.dataset.train.token_range(200, 296).tolist()
        with swap(loop, "generate", lambda model, ids, **options: passage):
            original(trainer)

    with (
        swap(loop, "sample", reciting),
        swap(loop, "sample_loss", lambda model, prompt_ids, ids, **options: 0.1),
    ):
        yield


def unseeded():
    with swap(sampling, "_uniform", lambda generator: torch.rand(1, dtype=torch.float64)):
        yield


def tail_loops():
    original = callbacks.Sampled

    def looping(**event):
        words = event["text"].split()[:8] or ["said"]
        return original(**{**event, "text": " ".join(words + ["and", "so", "on"] * 12)})

    with swap(callbacks, "Sampled", looping):
        yield


def drawn_in_training_mode():
    with swap(sampling, "evaluating", lambda model: nullcontext()):
        yield


def penalty_inverted():
    def divided(logits_V, seen, penalty):
        ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
        return logits_V.index_copy(0, ids, logits_V[ids] / penalty)

    with swap(sampling, "penalise_repetition", divided):
        yield


def monitor_not_called():
    with swap(loop, "sample", lambda trainer: None):
        yield


def monitor_unwired():
    original = loop.sample

    def first_only(trainer):
        if trainer.state.step <= trainer.cfg.sample.every:
            original(trainer)

    with swap(loop, "sample", first_only):
        yield


def corpus_of_one_page():
    with one_page_over_and_over():
        yield


def context_forgotten():
    original = sampling.window_start

    def to_the_end(n_tokens, start, max_seq_len):
        return start if original(n_tokens, start, max_seq_len) == start else n_tokens - 1

    with swap(sampling, "window_start", to_the_end):
        yield


def copy_transposed():
    original = sampling.laid_out_for_rows

    def turned(model, n_tokens):
        copied = original(model, n_tokens)
        if copied is not model:
            for p in copied.parameters():
                if p.ndim == 2 and p.shape[0] == p.shape[1]:
                    touch()
                    p.data = p.data.t()
        return copied

    with swap(sampling, "laid_out_for_rows", turned, counted=False):
        yield
