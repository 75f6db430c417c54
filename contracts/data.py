"""Gates of the data: what was consumed is what was declared, and nothing held out is trained on."""

import math
from collections import deque
from types import SimpleNamespace

import numpy as np

from contracts.events import BatchDrawn, Event, Started
from contracts.gate import Verdict, decide, decides, failed, passed

JUDGED_WINDOWS = 509  # prime, so that no world size or batch divides it
SPAN_BYTES, MIN_SPAN = 60, 16  # about a dozen English words


def _ids(reader, n_rows: int) -> list[int]:
    """Window numbers of the next `n_rows` rows a reader really delivers."""
    drawn: list[int] = []
    while len(drawn) < n_rows:
        drawn += reader.draw().sample_ids
    return drawn[:n_rows]


@decides("data.order")
def order(limits: SimpleNamespace, *, make_reader) -> Verdict:
    """Order is a pure function of seed, epoch and index: repeatable, enterable anywhere, shuffled, and new every epoch."""
    n = make_reader(rows=1, n_windows=JUDGED_WINDOWS).n_windows
    twice = [_ids(make_reader(rows=3, n_windows=n), 2 * n) for _ in range(2)]
    if twice[0] != twice[1]:
        return failed("the same seed gives two orders")
    middle = n // 2
    if _ids(make_reader(rows=1, n_windows=n, cursor=middle), n) != twice[0][middle : middle + n]:
        return failed("entering in the middle gives another order than arriving there")
    first, second = np.array(twice[0][:n]), np.array(twice[0][n : 2 * n])
    other_seed = np.array(_ids(make_reader(rows=1, n_windows=n, seed=987654321), n))
    repeated = float((first == second).mean()), float((first == other_seed).mean())
    ranks = np.arange(n)
    trend = abs(float(np.corrcoef(ranks, first)[0, 1])) if n > 2 else 0.0
    neighbours = float((np.abs(np.diff(first)) == 1).mean()) if n > 2 else 0.0
    # For a uniform permutation the correlation has standard deviation 1/√(n−1), fixed points and neighbours about 1/n and 2/n.
    small = n < limits.windows_min
    ok = small or (
        max(repeated) <= limits.repeated_positions_max
        and trend <= limits.trend_sigmas_max / np.sqrt(n - 1)
        and neighbours <= limits.neighbours_max
    )
    return decide(
        bool(ok),
        "the order repeats between epochs or seeds, or is hardly shuffled",
        windows=n,
        repeated_between_epochs=repeated[0],
        repeated_between_seeds=repeated[1],
        trend=trend,
        neighbours=neighbours,
    )


@decides("data.coverage")
def coverage(limits: SimpleNamespace, *, make_reader, seq_len: int) -> Verdict:
    """Over all ranks of several world sizes every window is delivered exactly once per epoch, with the right tokens."""
    n = make_reader(rows=1, n_windows=JUDGED_WINDOWS).n_windows
    for world_size in (1, 2, 3, 8):
        per_rank = _epoch(make_reader, n, world_size)
        delivered = [i for ids in per_rank for i in ids]
        twice, missing = len(delivered) - len(set(delivered)), n - len(set(delivered))
        if twice or missing:
            return failed(
                f"{world_size} rank(s): {twice} window(s) delivered twice, {missing} never",
                world_size=world_size,
                twice=twice,
                missing=missing,
            )
    reader = make_reader(rows=2)
    batch = reader.draw()
    truth = reader.stream.windows(np.array(batch.sample_ids), seq_len)
    shifted = bool((batch.labels.numpy() == truth[:, 1:]).all()) and bool((batch.input_ids.numpy() == truth[:, :-1]).all())
    return decide(shifted, "labels are not the next tokens of the declared windows", windows=n, twice=0, missing=0)


def _epoch(make_reader, n: int, world_size: int) -> list[list[int]]:
    """Window numbers each rank delivers within the first epoch, taken from drawn batches."""
    per_rank = []
    for rank in range(world_size):
        reader = make_reader(rows=1, rank=rank, world_size=world_size, n_windows=n)
        ids = [reader.draw().sample_ids[0] for _ in range(-(-n // world_size))]
        per_rank.append([i for k, i in enumerate(ids) if k * world_size + rank < n])
    return per_rank


@decides("data.exhaustion")
def exhaustion(limits: SimpleNamespace, *, make_reader) -> Verdict:
    """At the corpus' end `error` raises and delivers nothing; `wrap` goes on with real windows of the next epoch."""
    n = make_reader(rows=1, n_windows=JUDGED_WINDOWS).n_windows
    strict = make_reader(rows=1, n_windows=n, cursor=n, on_exhausted="error")
    try:
        strict.draw()
    except Exception as e:
        raised = type(e).__name__
    else:
        return failed("a corpus that is exhausted still delivers a batch")
    if strict.cursor != n:
        return failed("a refused draw moved the position", cursor=strict.cursor)
    last = make_reader(rows=1, n_windows=n, cursor=n - 1, on_exhausted="error").draw()
    wrapping = make_reader(rows=1, n_windows=n, cursor=n - 1)
    batches = [wrapping.draw() for _ in range(3)]
    truth = wrapping.stream.windows(np.array([i for b in batches for i in b.sample_ids]), batches[0].input_ids.shape[1])
    real = all(bool((b.input_ids.numpy()[0] == t[:-1]).all()) for b, t in zip(batches, truth))
    epochs = [b.epoch for b in batches]
    ok = raised == "StreamExhausted" and last.epoch == 0 and epochs == [0, 1, 1] and real
    return decide(ok, f"the end of the corpus gives {raised} and epochs {epochs}", raised=raised, wrapped_windows_are_real=real)


@decides("data.integrity")
def integrity(limits: SimpleNamespace, *, splits, manifest, tokenizer) -> Verdict:
    """Ids fit their vocabulary, documents end where they should, and tokens and bytes add up to the manifest."""
    sizes = tokenizer.token_bytes
    for name, stream in splits.items():
        declared = manifest["splits"][name]
        tokens = stream.token_range(0, min(stream.n_tokens, int(limits.tokens_read_max)))
        complete = len(tokens) == stream.n_tokens
        if int(tokens.max()) >= tokenizer.vocab_size:
            return failed(f"{name}: token id {int(tokens.max())} is outside the vocabulary of {tokenizer.vocab_size}", split=name)
        if sum(s["tokens"] for s in declared["shards"]) != declared["tokens"]:
            return failed(f"{name}: the shards do not add up to the declared tokens", split=name)
        ends = int((tokens == tokenizer.eos_id).sum())
        n_bytes = int(sizes[tokens].sum())
        expected_ends = declared["documents"] + len(declared["shards"])
        if complete and (ends != expected_ends or n_bytes != declared["bytes"]):
            return failed(
                f"{name}: {ends} ends of text for {declared['documents']} documents, {n_bytes} bytes for {declared['bytes']}",
                split=name,
                ends=ends,
                bytes=n_bytes,
            )
        if int(tokens[0]) != tokenizer.eos_id:
            return failed(f"{name}: the stream does not begin with an end of text, so its first token is never predicted", split=name)
    return passed("", splits=len(splits), vocabulary=tokenizer.vocab_size)


def span_of(mean_token_bytes: float) -> int:
    """Tokens of a compared run: the power of two that covers SPAN_BYTES on average, so that tokenizers compare alike."""
    return max(MIN_SPAN, 1 << math.ceil(math.log2(SPAN_BYTES / mean_token_bytes)))


def _span_hashes(tokens: np.ndarray, span: int) -> np.ndarray:
    """64-bit hash of every run of `span` tokens (a power of two), built by doubling: log2(span) passes over the tokens."""
    value = tokens.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        length = 1
        while length < span:
            value = (value[:-length] * np.uint64(0x9E3779B97F4A7C15)) ^ (value[length:] + np.uint64(length))
            value ^= value >> np.uint64(29)
            length *= 2
    return value


def _contained(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are in a sorted array; a binary search is a hundred times faster here than numpy's hashing `isin`."""
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


@decides("data.leakage")
def leakage(limits: SimpleNamespace, *, splits, tokenizer) -> Verdict:
    """No held-out document is in the training split, few of its long runs are, and the scanner finds a canary first."""
    train, held_out = splits["train"], splits["validation"]
    shared = np.intersect1d(train.document_hashes, held_out.document_hashes).size
    budget = int(limits.tokens_read_max)
    held_tokens = held_out.token_range(0, min(held_out.n_tokens, budget))
    train_tokens = train.token_range(0, min(train.n_tokens, budget))
    span = span_of(held_out.n_bytes / held_out.n_tokens)
    held = _span_hashes(held_tokens, span)
    canary = np.random.default_rng(0).integers(0, tokenizer.vocab_size, span + 1)
    spliced = np.concatenate([train_tokens[: len(train_tokens) // 2], canary, train_tokens[len(train_tokens) // 2 :]])
    seen = np.sort(_span_hashes(spliced, span))
    if not _contained(_span_hashes(canary, span), seen).all():
        return failed("the scanner does not find a canary planted in the training tokens, so its zeros mean nothing", canary_found=False)
    overlap = float(_contained(held, seen).mean()) if held.size else 0.0
    ok = shared <= limits.shared_documents_max and overlap <= limits.run_overlap_max
    return decide(
        bool(ok),
        f"{shared} held-out document(s) and {overlap:.1%} of the held-out runs of {span} tokens are in the training split",
        shared_documents=int(shared),
        run_overlap=overlap,
        span_tokens=span,
        canary_found=True,
        train_tokens_read=len(train_tokens),
    )


@decides("data.corpus-budget")
def corpus_budget(limits: SimpleNamespace, *, splits, n_params: int, planned_tokens: int) -> Verdict:
    """The corpus is large enough for the model and is not repeated too often."""
    unique = splits["train"].n_tokens
    per_parameter, epochs = unique / n_params, planned_tokens / unique
    ok = per_parameter >= limits.unique_tokens_per_parameter_min and epochs <= limits.epochs_max
    return decide(
        ok,
        f"{unique:,} unique tokens for {n_params:,} parameters ({per_parameter:.3g} each), read {epochs:.1f} times",
        unique_tokens_per_parameter=per_parameter,
        epochs=epochs,
        chinchilla_ratio=planned_tokens / (20 * n_params),
    )


@decides("data.consumption")
class Consumption:
    """The position moves on without gap, each step draws what was declared, and no window repeats within its epoch."""

    events = (Started, BatchDrawn)

    def __init__(self, limits):
        self.limits, self.plan, self.cursor = limits, None, None
        self.recent: deque[tuple[int, int]] = deque(maxlen=int(limits.recent_windows_min))

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            if self.cursor is not None and self.cursor != event.plan["cursor"]:
                return failed(f"the run goes on at sample {event.plan['cursor']}, it had stopped at {self.cursor}", cursor=self.cursor)
            self.plan, self.cursor = event.plan, event.plan["cursor"]
            return None
        rows, n = self.plan["rows_per_step"], self.plan["n_windows"]
        if event.cursor_before != self.cursor or event.cursor_after != self.cursor + rows or len(event.sample_ids) != rows:
            return failed(
                f"step {event.step}: samples {event.cursor_before} … {event.cursor_after} were drawn, "
                f"{self.cursor} … {self.cursor + rows} declared",
                cursor=event.cursor_after,
            )
        if event.n_tokens != self.plan["tokens_per_step"]:
            return failed(
                f"step {event.step}: {event.n_tokens} tokens drawn, {self.plan['tokens_per_step']} declared", tokens=event.n_tokens
            )
        self.cursor = event.cursor_after
        keys = [((event.cursor_before + k) // n, i) for k, i in enumerate(event.sample_ids)]
        repeats = len(keys) - len(set(keys)) + len(set(keys) & set(self.recent))
        outside = sum(not 0 <= i < n for i in event.sample_ids)
        self.recent.extend(keys)
        return decide(
            not repeats and not outside,
            f"step {event.step}: {repeats} window(s) repeat within their epoch",
            repeats=repeats,
            outside=outside,
        )

    def state_dict(self) -> dict:
        return {"cursor": self.cursor, "recent": [list(k) for k in self.recent]}

    def load_state_dict(self, state: dict) -> None:
        self.cursor = state["cursor"]
        self.recent.extend((epoch, window) for epoch, window in state["recent"])
