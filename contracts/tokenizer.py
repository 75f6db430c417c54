"""Gates of the tokenizer: text survives, merges are right, and the tokenizer is that of the data
and the model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

from stackproof.contracts.events import IdsRead
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide, decides, failed, not_run
from stackproof.contracts.scope import over_all_shards
from stackproof.contracts.subject import NotOffered, Subject

WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
# Bytes that stand for themselves in a file.
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# Texts that tokenizers are known to change.
HARD_TEXTS = (
    "hello ! how are you ?  two  spaces, a\ttab, a\r\nline end and \u00a0 no-break space",
    "naïve café — “quotes”, 漢字, עברית, emoji 👩‍👩‍👧 and a combining e\u0301",
    "<|endoftext|> is text here, and so is <|endoftext|><|endoftext|>",
    "def f(x):\n    return x**2  # 1e-5, 0x1F, ::, ->, ...\n",
    "it's they'll we've I'M   \n\n  \t end  ",
    "",
    " ",
    "\x00\x01\x7f",
)


@decides("tokenizer.round-trip")
def round_trip(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """decode(encode(x)) is x for hard and for held-out texts, lengths in bytes add up, and text
    never becomes a control id.
    """
    tokenizer = subject.tokenizer.tokenizer
    texts = [
        *HARD_TEXTS,
        *(t for i in tokenizer.control_ids if (t := tokenizer.literal(i))),
        *subject.corpus.held_out_texts,
    ]
    checked = 0
    for text, batched in zip(texts, tokenizer.encode_batch(texts), strict=True):
        encoding = tokenizer.encode(text)
        if list(batched.ids) != list(encoding.ids):
            return failed(
                "a text has other ids in a batch, as in shards, than alone, as in prompts",
                checked=checked,
            )
        if not tokenizer.control_ids.isdisjoint(encoding.ids):
            return failed("a literal in the text became a control id", checked=checked)
        back = tokenizer.decode(encoding.ids)
        if encoding.dropped_chars == 0 and back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(back, text)) if a != b), min(len(back), len(text))
            )
            return failed(
                f"text does not survive: {text[at : at + 12]!r} comes back as "
                f"{back[at : at + 12]!r}",
                checked=checked,
            )
        if encoding.dropped_chars and back != "".join(
            c for c in text if not tokenizer.encode(c).dropped_chars
        ):
            return failed(
                "decoding does not give the text without its unknown characters",
                checked=checked,
            )
        if encoding.dropped_chars != len(text) - len(back):
            return failed(
                f"{encoding.dropped_chars} dropped characters reported, {len(text) - len(back)} "
                "missing",
                checked=checked,
            )
        n_bytes, declared = (
            len(back.encode("utf-8")),
            int(tokenizer.token_bytes[encoding.ids].sum()) if encoding.ids else 0,
        )
        if n_bytes != declared:
            return failed(
                f"the ids stand for {declared} bytes, the text has {n_bytes}", checked=checked
            )
        checked += 1
    others = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.control_ids]
    short = [i for i in others if tokenizer.token_bytes[i] < 1 or not tokenizer.decode([i])]
    return decide(
        not short
        and checked >= limits.texts_min
        and not tokenizer.token_bytes[list(tokenizer.control_ids)].any(),
        f"{len(short)} id(s) stand for no text, {checked} text(s) were checked",
        checked=checked,
        empty_ids=len(short),
    )


def bpe_merges(texts: Iterable[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first merges of byte-level BPE, with every pair counted again in Python's integers: the
    oracle of the gate and of tests.

    Words are split as GPT-2 splits ASCII text. Of equally frequent pairs the one of the lower ids
    wins; bytes are numbered in the order of their printable stand-ins, merges as they are made.
    """
    words = Counter(w for text in texts for w in WORDS.findall(text))
    order = {
        bytes([b]): i
        for i, b in enumerate([*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)])
    }
    split = {w: [bytes([b]) for b in w.encode()] for w in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        pairs: Counter = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]]))
        merges.append(best)
        order.setdefault(best[0] + best[1], len(order))
        split = {w: _merged(p, best) if best[0] in p else p for w, p in split.items()}
    return merges


def _merged(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
            continue
        out.append(piece)
    return out


@decides("tokenizer.merges")
def merges(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Training gives the merges that counting gives, also where one pair occurs more often than a
    short counter holds.
    """
    sample, size = [], 0
    for text in subject.corpus.held_out_texts:
        ascii_text = text.encode("ascii", "ignore").decode()
        sample.append(ascii_text[: int(limits.sample_chars_max) - size])
        size += len(sample[-1])
        if size >= limits.sample_chars_max:
            break
    texts = [*sample, " qz" * int(limits.frequent_pairs_min)]
    n = int(limits.merges_min)
    wanted, made = bpe_merges(texts, n), subject.tokenizer.trained_merges(texts, n)[:n]
    wrong = next((i for i, (a, b) in enumerate(zip(wanted, made)) if a != b), None)
    return decide(
        wrong is None and len(made) == len(wanted),
        f"merge {wrong} is {made[wrong]!r}, counting gives {wanted[wrong]!r}"
        if wrong is not None
        else f"{len(made)} of {len(wanted)} merges",
        merges=len(made),
        sample_chars=size,
    )


@decides("tokenizer.own-ids")
class OwnIds(RuntimeCheck):
    """The ids of a run are those that the tokenizer of its trainer gives for their text."""

    events = (IdsRead,)

    def __init__(self, limits):
        super().__init__(limits)
        self.judged = False

    def observe(self, event: IdsRead) -> Verdict | None:
        if event.n_tokens < self.limits.tokens_min:
            few = f"{event.n_tokens} ids of {event.phase} are too few to judge"
            return None if self.judged else not_run(few)
        self.judged = True
        frac = event.n_same / max(1, event.n_tokens)
        return decide(
            frac >= self.limits.same_frac_min,
            f"step {event.step}, {event.phase}: of {event.n_tokens} ids, {event.n_same} come again "
            "when they are decoded and encoded: they are of another tokenizer",
            same_frac=frac,
            phase=event.phase,
        )


@decides("tokenizer.identity")
@over_all_shards
def identity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The tokenizer is the one that the shards and the model were made with. Each is compared where
    the trainer offers it; `judged` names those that were.
    """
    faults, measured, judged, missing = [], {}, [], []
    for other, compare in (("shards", _compare_shards), ("model", _compare_model)):
        try:
            found, numbers = compare(limits, subject)
        except NotOffered as e:
            missing.append(str(e))
            continue
        judged.append(other)
        faults += found
        measured |= numbers
    if not judged:
        return not_run("; ".join(missing))
    return decide(not faults, "; ".join(faults), judged=" and ".join(judged), **measured)


def _compare_shards(limits: SimpleNamespace, subject: Subject) -> tuple[list[str], dict[str, int]]:
    """Faults and measurements: manifest and shards name the tokenizer's hash, the manifest its
    size.
    """
    splits, declared = subject.corpus.splits, subject.corpus.manifest["tokenizer"]
    sha256, n_ids = subject.tokenizer.sha256, subject.tokenizer.n_ids
    pins = [pin for stream in splits.values() for pin in stream.tokenizer_sha256]
    wrong = sum(pin != sha256 for pin in pins)
    faults = []
    if wrong:
        faults.append(f"{wrong} of {len(pins)} shard(s) were encoded with another tokenizer")
    if len(pins) < limits.pins_min:
        faults.append(f"{len(pins)} shard(s) name a tokenizer")
    if declared["sha256"] != sha256:
        faults.append("the manifest names another tokenizer")
    if declared["vocab_size"] != n_ids:
        faults.append(f"the tokenizer has {n_ids} ids, the manifest {declared['vocab_size']}")
    return faults, {"pins": len(pins), "wrong": wrong}


def _compare_model(limits: SimpleNamespace, subject: Subject) -> tuple[list[str], dict[str, int]]:
    """Faults and measurements: every id has an embedding row, few rows have no id, and special ids
    are those of the model.
    """
    n_ids, special_ids = subject.tokenizer.n_ids, subject.tokenizer.special_ids
    n_rows = len(subject.model.embedding.weight)
    unused = n_rows - n_ids
    differing = [
        f"{name} is {ours} in the tokenizer, {theirs} in the model"
        for name, (ours, theirs) in special_ids.items()
        if ours is not None and theirs is not None and ours not in _as_tuple(theirs)
    ]
    outside = [
        f"{name} {ours}"
        for name, (ours, _) in special_ids.items()
        if ours is not None and not 0 <= ours < n_rows
    ]
    faults = []
    if unused < 0:
        faults.append(
            f"{-unused} of the tokenizer's {n_ids} ids have no row among the embedding's {n_rows}"
        )
    if unused > max(limits.unused_rows_max, limits.unused_frac_max * n_rows):
        faults.append(
            f"{unused} of {n_rows} embedding rows stand for no id: the model was made for another "
            "tokenizer"
        )
    if differing:
        faults.append(f"special ids differ: {'; '.join(differing)}")
    if outside:
        faults.append(f"special ids outside the embedding: {', '.join(outside)}")
    return faults, {
        "tokenizer_size": n_ids,
        "embedding_rows": n_rows,
        "differing_special_ids": len(differing),
    }


def _as_tuple(ids: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
