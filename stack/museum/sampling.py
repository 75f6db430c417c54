"""Plants in sampling: caches, filters and draws that are almost right, and a model that loops."""

from contextlib import nullcontext

import torch

from stackproof.evaluate import sampling
from stackproof.model.cache import LayerCache
from stackproof.museum.evaluation import one_page_over_and_over
from stackproof.museum.plant import plant, swap, touch
from stackproof.train import run


@plant(
    "sampling.cache-position-off-by-one",
    gate="sampling.cache-parity",
    title="Cache position off by one",
    story=(
        "The write index lags one place behind, so each new token overwrites the keys and values "
        "of the one before it. Nothing crashes and the lengths look plausible. Text with the "
        "cache on is garbled, and only then."
    ),
    sources=(
        "https://github.com/lucidrains/x-transformers/issues/219",
        "https://github.com/Lightning-AI/litgpt/issues/298",
    ),
)
def cache_position_off_by_one():
    original = LayerCache.append

    def overwriting(self, k_BKTH, v_BKTH):
        if self.filled and k_BKTH.shape[2] == 1:
            self.filled -= 1
        return original(self, k_BKTH, v_BKTH)

    with swap(LayerCache, "append", overwriting):
        yield


@plant(
    "sampling.top-p-drops-crossing",
    gate="sampling.distribution",
    title="Top-p drops the token that crosses",
    story=(
        "The mask compares the running sum with p without the shift by one, so the token that "
        "reaches p is thrown out. With p of 0.6 a set of mass 0.5 is kept. Texts are a little "
        "duller than asked for."
    ),
    sources=(
        "https://github.com/fishaudio/fish-speech/issues/1171",
        "https://github.com/Biohub/esm/issues/360",
    ),
)
def top_p_drops_crossing():
    def without_shift(logits_V, p):
        order = logits_V.argsort(descending=True, stable=True)
        beyond = logits_V.double().softmax(-1)[order].cumsum(-1) > p
        beyond[0] = False
        return logits_V if p >= 1.0 else logits_V.index_fill(0, order[beyond], sampling.MASKED)

    with swap(sampling, "keep_top_p", without_shift):
        yield


@plant(
    "sampling.zero-probability",
    gate="sampling.distribution",
    title="An impossible token, once in ten million",
    story=(
        "The cumulative distribution is searched with the wrong side of the inequality, and a "
        "uniform number of exactly zero gives the first token whatever its probability. A masked "
        "control token appears in a text, and nobody can reproduce it."
    ),
    sources=(
        "https://github.com/pytorch/pytorch/issues/48841",
        "https://github.com/pytorch/pytorch/issues/50034",
    ),
)
def zero_probability():
    def wrong_side(probs_V, uniforms_R):
        cumulative = probs_V.cumsum(-1)
        return torch.searchsorted(cumulative, uniforms_R.to(cumulative)).clamp(max=len(probs_V) - 1)

    with swap(sampling, "pick", wrong_side):
        yield


@plant(
    "sampling.filter-before-temperature",
    gate="sampling.distribution",
    title="Top-p before temperature",
    story=(
        "The nucleus is chosen from the unsharpened distribution and the temperature applied to "
        "what is left. At low temperature too many tokens stay in. Settings copied from a paper "
        "do not reproduce it."
    ),
    sources=("https://github.com/Blaizzy/mlx-audio/issues/732",),
)
def filter_before_temperature():
    original = sampling.filtered_probs

    def swapped(logits_V, *, temperature, top_k=0, top_p=1.0):
        if temperature == 0.0:
            return original(logits_V, temperature=0.0)
        kept = sampling.keep_top_p(sampling.keep_top_k(logits_V.double(), top_k), top_p)
        return (kept / temperature).softmax(-1)

    with swap(sampling, "filtered_probs", swapped):
        yield


@plant(
    "sampling.monitor-blind",
    gate="sampling.coherence",
    title="The model loops and nobody reads",
    story=(
        "Generation falls into repeating one token. The monitor that should see it hangs on an "
        "older runner that no longer runs. The loss looks fine, and garbage is produced for ten "
        "days."
    ),
    sources=("founding note: ANDREA-120M",),
)
def monitor_blind():
    original = run.generate

    def looping(model, ids, **options):
        drawn = original(model, ids, **options)
        return drawn[:1] * len(drawn)

    with swap(run, "generate", looping):
        yield


@plant(
    "sampling.article-everywhere",
    gate="sampling.dominance",
    title="One article between all words",
    story=(
        "A defect in the data teaches the model that a fifth of all words is one article. Every "
        "second word of a sample is fine, so scores of diversity are fine, and the loss is what "
        "it always was."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def article_everywhere():
    original = run.Sampled

    def said(**event):
        words = event["text"].split() * 8
        return original(**{**event, "text": " the ".join(words)})

    with swap(run, "Sampled", said):
        yield


@plant(
    "sampling.training-text-recited",
    gate="sampling.memorised",
    title="The model recites its corpus",
    story=(
        "A sample stands out by its low loss and reads well, which is taken for progress. It is a "
        "passage of the training text, word for word, and the held-out loss has been rising since."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def training_text_recited():
    original = run.Run.sample

    def reciting(self):
        passage = self.dataset.train.token_range(200, 296).tolist()
        with swap(run, "generate", lambda model, ids, **options: passage):
            original(self)

    with (
        swap(run.Run, "sample", reciting),
        swap(run.Run, "own_loss", lambda self, prompt_ids, ids: 0.1),
    ):
        yield


@plant(
    "sampling.unseeded",
    gate="sampling.generation",
    title="Chance that nobody gave",
    story=(
        "The generator that is handed in is not handed on, and numbers come from the global "
        "state. The text looks as good as ever. The sample in the record cannot be drawn again, "
        "and drawing it has moved the dropout masks of the steps that follow."
    ),
    sources=("https://arxiv.org/abs/1904.09751",),
)
def unseeded():
    with swap(sampling, "_uniform", lambda generator: torch.rand(1, dtype=torch.float64)):
        yield


@plant(
    "sampling.tail-loops",
    gate="sampling.loops",
    title="The end of every sample goes round in a loop",
    story=(
        "Samples begin well and end in the same three words, over and over. Their first half "
        "keeps the score up, and whoever reads the first line of the log sees a sentence."
    ),
    sources=("founding note: ANDREA-120M", "https://arxiv.org/abs/1904.09751"),
)
def tail_loops():
    original = run.Sampled

    def looping(**event):
        words = event["text"].split()[:8] or ["said"]
        return original(**{**event, "text": " ".join(words + ["and", "so", "on"] * 12)})

    with swap(run, "Sampled", looping):
        yield


@plant(
    "sampling.drawn-in-training-mode",
    gate="sampling.generation",
    title="Samples from a model in training mode",
    story=(
        "Samples are drawn in the middle of training, and nobody switches the model over. Dropout "
        "is on. The text is worse than the model, and two samples with one seed differ."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/240",),
)
def drawn_in_training_mode():
    with swap(sampling, "evaluating", lambda model: nullcontext()):
        yield


@plant(
    "sampling.penalty-inverted",
    gate="sampling.generation",
    title="A penalty that rewards",
    story=(
        "The penalty divides every logit of a token that was seen. That makes a positive one "
        "smaller and a negative one larger: unlikely tokens become likelier each time they come "
        "up."
    ),
    sources=("https://arxiv.org/abs/1909.05858",),
)
def penalty_inverted():
    def divided(logits_V, seen, penalty):
        ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
        return logits_V.index_copy(0, ids, logits_V[ids] / penalty)

    with swap(sampling, "penalise_repetition", divided):
        yield


@plant(
    "sampling.monitor-not-called",
    gate="sampling.coherence",
    title="The monitor is never called",
    story=(
        "Samples were read by the old runner. The new one trains faster and has no line for it. "
        "The gate is installed, its page is green because it never said otherwise, and the model "
        "writes garbage from step eighty thousand on."
    ),
    sources=("founding note: ANDREA-120M",),
)
def monitor_not_called():
    with swap(run.Run, "sample", lambda self: None):
        yield


@plant(
    "sampling.monitor-unwired",
    gate="runtime.cadence",
    title="The sample monitor hangs on another runner",
    story=(
        "Samples are audited in a script that this run does not use. The gate that would have "
        "read them is installed, the first sample was drawn by hand, and none follows. Ten days "
        "later somebody looks."
    ),
    sources=("founding note: ANDREA-120M",),
)
def monitor_unwired():
    original = run.Run.sample

    def first_only(self):
        if self.state.step <= self.cfg.sample.every:
            original(self)

    with swap(run.Run, "sample", first_only):
        yield


@plant(
    "sampling.corpus-of-one-page",
    gate="sampling.recitation",
    title="The corpus is one page",
    story=(
        "A glob matches one file of thousands, and the run reads its page hundreds of times. "
        "Training loss falls as never before, it reads well, and the model can only say that page."
    ),
    sources=("founding note: tinygpt validation", "https://arxiv.org/abs/2012.07805"),
)
def corpus_of_one_page():
    with one_page_over_and_over():
        yield


@plant(
    "sampling.context-forgotten",
    gate="sampling.generation",
    title="A full context is forgotten",
    story=(
        "When prompt and new tokens exceed the context, the window should move on by half of "
        "itself, and moves on to the last token. Everything is well up to that length. From there "
        "on the text has nothing to do with what was said before."
    ),
    sources=("https://github.com/Lightning-AI/litgpt/issues/298",),
)
def context_forgotten():
    original = sampling.window_start

    def to_the_end(n_tokens, start, max_seq_len):
        return start if original(n_tokens, start, max_seq_len) == start else n_tokens - 1

    with swap(sampling, "window_start", to_the_end):
        yield


@plant(
    "sampling.copy-transposed",
    gate="sampling.generation",
    title="The copy for long texts has square matrices turned",
    story=(
        "For many tokens the weights are copied into another layout, and square matrices come out "
        "transposed; others would not fit and be noticed. Short samples, of tests, are drawn "
        "without the copy and are right."
    ),
    sources=("https://github.com/Lightning-AI/litgpt/issues/298",),
)
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
