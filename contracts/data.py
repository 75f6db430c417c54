"""Gates of the data: a run reads what was declared, in a shuffled order, and no held-out text."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run, passed
from stackproof.contracts.scope import over_all_shards
from stackproof.contracts.subject import (
    Curriculum,
    DataLoader,
    DrawnBatch,
    Subject,
    TokenStream,
    offers,
)

JUDGED_WINDOWS = 509  # prime, so that no world size or batch divides it
# ranks and rows; one row alone hides a stride that forgets the rows
WORLDS = ((1, 1), (2, 3), (3, 2), (8, 1))
RUN_BATCHES = 64  # of the run's own data loader
PIECE_TOKENS = 4 * 2**20  # read at a time, so that memory stays bounded
CANARY_TOKENS = 2**20  # training tokens of the copy in which the canary is hidden
SPAN_BYTES, MIN_SPAN = 60, 16  # about a dozen English words


def _judged_rows(loader: DataLoader) -> int:
    """Of a large corpus the first rows are judged."""
    return min(loader.n_rows, JUDGED_WINDOWS)


def _ids(fresh, n: int) -> list[int]:
    """Window numbers of the next `n` rows that a data loader delivers."""
    drawn: list[int] = []
    while len(drawn) < n:
        drawn += fresh.next_batch().sample_ids
    return drawn[:n]


@decides("data.order")
def order(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Order is a pure function of seed, epoch and index: repeatable, enterable anywhere, shuffled,
    and new in every epoch.
    """
    loader, n = subject.data_loader, _judged_rows(subject.data_loader)
    twice = [_ids(loader.fresh(rows=3, n_rows=n), 2 * n) for _ in range(2)]
    if twice[0] != twice[1]:
        return failed("the same seed gives two orders")
    middle = n // 2
    entered = _ids(loader.fresh(rows=1, n_rows=n, cursor=middle), n)
    if entered != twice[0][middle : middle + n]:
        return failed("entering in the middle gives another order than arriving there")
    first, second = np.array(twice[0][:n]), np.array(twice[0][n : 2 * n])
    other_seed = np.array(_ids(loader.fresh(rows=1, n_rows=n, seed=987654321), n))
    repeated = float((first == second).mean()), float((first == other_seed).mean())
    ranks = np.arange(n)
    trend = abs(float(np.corrcoef(ranks, first)[0, 1])) if n > 2 else 0.0
    neighbours = float((np.abs(np.diff(first)) == 1).mean()) if n > 2 else 0.0
    # For a uniform permutation the correlation has standard deviation 1/√(n−1), fixed points and
    # neighbours about 1/n and 2/n. Below windows_min those bands mean nothing; then only an order
    # that is wholly the same is red, where chance cannot explain it.
    if n < limits.windows_min:
        ok = n < limits.distinct_windows_min or max(repeated) < 1
    else:
        ok = (
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
def coverage(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Over all ranks of several world sizes every window is delivered exactly once per epoch,
    with the right tokens.

    Judged on drawn batches, at the end of the pipeline: the first epoch from its start, and the
    second one by data loaders that resume shortly before it begins, so that batches cross the
    end of an epoch. The data loader of a run, with its mixture, delivers the windows of its order.
    """
    loader, n = subject.data_loader, _judged_rows(subject.data_loader)
    for world_size, rows in WORLDS:
        for epoch, cursor in ((0, 0), (1, max(0, n - 5))):
            ids, wrong_tokens, wrong_epoch = _delivered(loader, n, epoch, cursor, rows, world_size)
            twice, missing = len(ids) - len(set(ids)), n - len(set(ids))
            if twice or missing:
                return failed(
                    f"{world_size} rank(s) of {rows} row(s), epoch {epoch}: {twice} window(s) "
                    f"delivered twice, {missing} never",
                    world_size=world_size,
                    rows=rows,
                    twice=twice,
                    missing=missing,
                )
            if wrong_tokens or wrong_epoch:
                return failed(
                    f"{wrong_tokens} row(s) are not the declared window with its next tokens as "
                    f"labels, {wrong_epoch} not of their epoch",
                    wrong_rows=wrong_tokens,
                    wrong_epoch=wrong_epoch,
                )
    wrong = _run_faults(loader, subject.curriculum) if offers(loader.of_run) else 0
    if wrong:
        return failed(
            f"{wrong} rows of the run are not the windows of its order with their next tokens as "
            "labels",
            wrong_rows=wrong,
        )
    return passed(
        "",
        windows=n,
        twice=0,
        missing=0,
        worlds=len(WORLDS),
        largest_world=max(w for w, _ in WORLDS),
    )


def _run_faults(loader: DataLoader, curriculum: Curriculum) -> int:
    """Rows of the first batches of a run that are not those of its order: other windows, sources or
    epochs, or other tokens than its windows hold.
    """
    own, order, wrong, first = loader.of_run(), curriculum.sampler_order(), 0, 0
    for _ in range(RUN_BATCHES):
        batch = own.next_batch()
        stop = first + len(batch.input_ids)
        order.decide(first, stop)
        draws = order.at(np.arange(first, stop))
        for got, wanted in (
            (batch.sample_ids, draws.windows),
            (batch.sources, draws.sources),
            (batch.epochs, draws.epochs),
        ):
            wrong += int((np.array(got) != wanted).sum())
        wrong += int(_wrong_tokens(batch, own.stream, loader.seq_len).sum())
        first = stop
    return wrong


def _wrong_tokens(batch: DrawnBatch, stream: TokenStream, seq_len: int) -> np.ndarray:
    """Rows with other tokens or labels than their windows in the stream, bool (R,). The windows are
    read in reverse order, where each has other neighbours than in the batch.
    """
    truth = stream.rows(np.array(batch.sample_ids)[::-1], seq_len)
    wrong = (batch.input_ids.numpy() != truth.input_ids[::-1]).any(1)
    return wrong | (batch.labels.numpy() != truth.labels[::-1]).any(1) | _not_shifted(batch)


def _delivered(
    loader: DataLoader, n: int, epoch: int, cursor: int, rows: int, world_size: int
) -> tuple[list[int], int, int]:
    """What all ranks deliver of one epoch: window numbers, number of rows with other tokens than
    declared, number of batches with a wrong epoch number.

    Positions are counted here and not read from the data loader, so that a position that does not
    advance gives a verdict and not an endless loop.
    """
    ids, wrong_tokens, wrong_epoch = [], 0, 0
    for rank in range(world_size):
        fresh = loader.fresh(rows=rows, rank=rank, world_size=world_size, n_rows=n, cursor=cursor)
        for first in range(cursor + rank * rows, (epoch + 1) * n + rank * rows, rows * world_size):
            batch = fresh.next_batch()
            places = range(first, first + rows)
            ids += [i for place, i in zip(places, batch.sample_ids) if place // n == epoch]
            wrong_epoch += batch.epoch != places[-1] // n
            if epoch == 0 and rank == world_size - 1:
                wrong_tokens += int(_wrong_tokens(batch, fresh.stream, loader.seq_len).sum())
    return ids, wrong_tokens, wrong_epoch


def _not_shifted(batch) -> np.ndarray:
    """Rows in which a label is not the next input, by the batch alone; bool (R,). Borders between
    documents that are kept apart do not count.
    """
    labels, following = batch.labels.numpy()[:, :-1], batch.input_ids.numpy()[:, 1:]
    within = np.ones_like(labels, bool)
    if batch.document_ids is not None:
        ids = batch.document_ids.numpy()
        within = (ids[:, 1:] == ids[:, :-1]) & (labels != -100)
    return ((labels != following) & within).any(1)


@decides("data.exhaustion")
def exhaustion(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """At the end of the corpus `error` raises and delivers nothing; `wrap` continues with
    real windows of the next epoch.
    """
    loader, n = subject.data_loader, _judged_rows(subject.data_loader)
    strict = loader.fresh(rows=1, n_rows=n, cursor=n, on_exhausted="error")
    try:
        strict.next_batch()
    except Exception as e:
        raised = type(e).__name__
    else:
        return failed("a corpus that is exhausted still delivers a batch")
    if strict.cursor != n:
        return failed("a refused draw moved the position", cursor=strict.cursor)
    if _delivers(loader.fresh(rows=2, n_rows=n, cursor=n - 1, on_exhausted="error")):
        return failed("a batch of two windows is delivered although one is left")
    last = loader.fresh(rows=1, n_rows=n, cursor=n - 1, on_exhausted="error").next_batch()
    wrapping = loader.fresh(rows=1, n_rows=n, cursor=n - 1)
    batches = [wrapping.next_batch() for _ in range(3)]
    truth = wrapping.stream.rows(
        np.array([i for b in batches for i in b.sample_ids]), batches[0].input_ids.shape[1]
    )
    real = all(bool((b.input_ids.numpy()[0] == t).all()) for b, t in zip(batches, truth.input_ids))
    epochs = [b.epoch for b in batches]
    ok = raised == "StreamExhausted" and last.epoch == 0 and epochs == [0, 1, 1] and real
    return decide(
        ok,
        f"the end of the corpus gives {raised} and epochs {epochs}",
        raised=raised,
        wrapped_windows_are_real=real,
    )


def _delivers(fresh) -> bool:
    try:
        fresh.next_batch()
    except Exception:
        return False
    return True


@decides("data.integrity")
@over_all_shards
def integrity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Ids fit their vocabulary, documents begin and end where they should,
    and tokens and bytes add up to the manifest.
    """
    splits, tokenizer = subject.corpus.splits, subject.tokenizer.tokenizer
    for name, stream in splits.items():
        declared = subject.corpus.manifest["splits"][name]
        n_read = min(stream.n_tokens, int(limits.tokens_read_max))
        highest, ends, n_bytes = _census(stream, n_read, tokenizer)
        if highest >= tokenizer.vocab_size:
            return failed(
                f"{name}: token id {highest} is outside the vocabulary of {tokenizer.vocab_size}",
                split=name,
            )
        if sum(s["tokens"] for s in declared["shards"]) != declared["tokens"]:
            return failed(f"{name}: the shards do not add up to the declared tokens", split=name)
        expected_ends = declared["documents"] + len(stream.paths)
        if n_read == declared["tokens"] and (ends != expected_ends or n_bytes != declared["bytes"]):
            return failed(
                f"{name}: {ends} ends of text for {declared['documents']} documents, {n_bytes} "
                f"bytes for {declared['bytes']}",
                split=name,
                ends=ends,
                bytes=n_bytes,
            )
        if int(stream.token_range(0, 1)[0]) != tokenizer.eos_id:
            return failed(
                f"{name}: the stream does not begin with an end of text, so its first token is "
                "never predicted",
                split=name,
            )
        astray = _starts_astray(stream, n_read, tokenizer.eos_id)
        if astray or len(stream.document_starts) != stream.n_documents:
            return failed(
                f"{name}: {astray} document(s) do not begin after an end of text",
                split=name,
                astray=astray,
            )
    return passed("", splits=len(splits), vocabulary=tokenizer.vocab_size)


def _census(stream, n_tokens: int, tokenizer) -> tuple[int, int, int]:
    """(highest id, ends of text, bytes of text) of the first tokens of a stream,
    read in pieces of bounded size.
    """
    highest = ends = n_bytes = 0
    for start in range(0, n_tokens, PIECE_TOKENS):
        tokens = stream.token_range(start, min(start + PIECE_TOKENS, n_tokens))
        highest = max(highest, int(tokens.max()))
        if highest >= tokenizer.vocab_size:
            return highest, 0, 0
        ends += int((tokens == tokenizer.eos_id).sum())
        n_bytes += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))
    return highest, ends, n_bytes


def _starts_astray(stream, n_tokens: int, eos_id: int) -> int:
    """How many of the declared document starts within the first tokens do
    not follow an end of text.
    """
    starts, astray = stream.document_starts, 0
    for low in range(0, n_tokens, PIECE_TOKENS):
        high = min(low + PIECE_TOKENS, n_tokens)
        before = starts[(starts > low) & (starts <= high)] - 1
        astray += int((stream.token_range(low, high)[before - low] != eos_id).sum())
    return astray


def span_of(mean_token_bytes: float) -> int:
    """Tokens of a compared run: the power of two that covers SPAN_BYTES on average, so that
    tokenizers compare alike.
    """
    return max(MIN_SPAN, 1 << max(0, math.ceil(math.log2(SPAN_BYTES / mean_token_bytes))))


def span_hashes(tokens: np.ndarray, span: int) -> np.ndarray:
    """64-bit hash of every run of `span` tokens (a power of two), built by doubling:
    log2(span) passes over the tokens.
    """
    value = tokens.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        length = 1
        while length < span:
            value = (value[:-length] * np.uint64(0x9E3779B97F4A7C15)) ^ (
                value[length:] + np.uint64(length)
            )
            value ^= value >> np.uint64(29)
            length *= 2
    return value


def _contained(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are in a sorted array; a binary search is a hundred times faster here
    than numpy's hashing `isin`.
    """
    if not len(ordered):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def _run_hashes(stream, n_tokens: int, span: int) -> Iterator[np.ndarray]:
    """Hashes of all runs of the first tokens of a stream, in pieces of bounded size."""
    for start in range(0, n_tokens - span + 1, PIECE_TOKENS):
        yield span_hashes(
            stream.token_range(start, min(start + PIECE_TOKENS + span - 1, n_tokens)), span
        )


def _finds_canary(held_out, train, places: np.ndarray, found: np.ndarray, span: int) -> bool:
    """Whether a held-out run that the training tokens do not hold is found once it is
    spliced into a copy of them.
    """
    absent = np.flatnonzero(~found)
    if not absent.size:  # the scanner works: it found every run already
        return bool(found.size)
    at = int(places[absent[absent.size // 2]])
    passage = held_out.token_range(at, at + span)
    copy = train.token_range(0, min(train.n_tokens, CANARY_TOKENS))
    spliced = np.concatenate([copy[: len(copy) // 2], passage, copy[len(copy) // 2 :]])
    return bool(_contained(span_hashes(passage, span), np.sort(span_hashes(spliced, span))).all())


@decides("data.leakage")
@over_all_shards
def leakage(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """No held-out document is in the training split, and few runs of held-out tokens are. First the
    scanner must find a hidden passage.
    """
    train, held_out = subject.corpus.splits["train"], subject.corpus.splits["validation"]
    shared = np.intersect1d(train.document_hashes, held_out.document_hashes).size
    budget = int(limits.tokens_read_max)
    n_held, n_train = min(held_out.n_tokens, budget), min(train.n_tokens, budget)
    if not held_out.n_bytes:
        return not_run("the held-out split holds no text that the tokenizer can spell")
    span = span_of(held_out.n_bytes / held_out.n_tokens)
    if min(n_held, n_train) < span:
        return not_run(f"a split is shorter than one run of {span} tokens")
    held = np.concatenate(list(_run_hashes(held_out, n_held, span)))
    places = np.argsort(held)  # sorted values are looked up several times as fast
    held, found = held[places], np.zeros(len(held), bool)
    for seen in map(np.sort, _run_hashes(train, n_train, span)):
        for start in range(0, len(held), PIECE_TOKENS):
            found[start : start + PIECE_TOKENS] |= _contained(
                held[start : start + PIECE_TOKENS], seen
            )
    if not _finds_canary(held_out, train, places, found, span):
        return failed(
            "the scanner does not find a held-out passage hidden in the training tokens, so its "
            "zeros mean nothing",
            canary_found=False,
        )
    overlap = float(found.mean())
    ok = shared <= limits.shared_documents_max and overlap <= limits.run_overlap_max
    return decide(
        bool(ok),
        f"{shared} held-out document(s) and {overlap:.1%} of the held-out runs of {span} tokens "
        "are in the training split",
        shared_documents=int(shared),
        run_overlap=overlap,
        span_tokens=span,
        canary_found=True,
        train_tokens_read=n_train,
    )


@decides("data.corpus-budget")
def corpus_budget(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The corpus is large enough for the model and is not repeated too often."""
    declared, unique = subject.declared, subject.corpus.manifest["splits"]["train"]["tokens"]
    n_params, planned_tokens = declared.n_parameters, declared.max_steps * declared.tokens_per_step
    per_parameter, epochs = unique / n_params, planned_tokens / unique
    ok = per_parameter >= limits.unique_tokens_per_parameter_min and epochs <= limits.epochs_max
    return decide(
        ok,
        f"{unique:,} unique tokens for {n_params:,} parameters ({per_parameter:.3g} each), read "
        f"{epochs:.1f} times",
        unique_tokens_per_parameter=per_parameter,
        epochs=epochs,
        chinchilla_ratio=planned_tokens / (20 * n_params),
    )
