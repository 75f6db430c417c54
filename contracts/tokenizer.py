"""Gates of the tokenizer: text survives, and the tokenizer is the one the shards were made with."""

import re
from collections import Counter
from types import SimpleNamespace

from stackproof.contracts.gate import Verdict, decide, decides, failed

WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
# bytes that stand for themselves in a file
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@decides("tokenizer.round-trip")
def round_trip(limits: SimpleNamespace, *, tokenizer, hard_texts, held_out_texts) -> Verdict:
    """decode(encode(x)) is x for hard and for held-out texts, lengths in bytes add up, and text
    never becomes a control id.
    """
    texts = [
        *hard_texts,
        *(t for i in tokenizer.control_ids if (t := tokenizer.literal(i))),
        *held_out_texts,
    ]
    checked = 0
    for text, batched in zip(texts, tokenizer.encode_batch(texts), strict=True):
        encoding = tokenizer.encode(text)
        if list(batched.ids) != list(encoding.ids):
            return failed(
                "a text gives other ids in a batch, as shards are written, than alone, as prompts "
                "are read",
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
                "what is left after dropping unknown characters is not the rest of the text",
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


def bpe_merges(texts, n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first merges of byte-level BPE by counting every pair anew, with Python's integers: the
    oracle of the gate and of tests.

    Words are cut as GPT-2 cuts ASCII text. Of equally frequent pairs the one of the lower ids wins,
    bytes being numbered in the order of their printable stand-ins and merges as they are made.
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
def merges(limits: SimpleNamespace, *, trained_merges, held_out_texts) -> Verdict:
    """The trainer makes the merges that counting gives, also where one pair occurs more often
    than a short counter holds.
    """
    sample, size = [], 0
    for text in held_out_texts:
        ascii_text = text.encode("ascii", "ignore").decode()
        sample.append(ascii_text[: int(limits.sample_chars_max) - size])
        size += len(sample[-1])
        if size >= limits.sample_chars_max:
            break
    texts = [*sample, " qz" * int(limits.frequent_pairs_min)]
    n = int(limits.merges_min)
    wanted, made = bpe_merges(texts, n), trained_merges(texts, n)[:n]
    wrong = next((i for i, (a, b) in enumerate(zip(wanted, made)) if a != b), None)
    return decide(
        wrong is None and len(made) == len(wanted),
        f"merge {wrong} is {made[wrong]!r}, counting gives {wanted[wrong]!r}"
        if wrong is not None
        else f"{len(made)} of {len(wanted)} merges",
        merges=len(made),
        sample_chars=size,
    )


@decides("tokenizer.pinning")
def pinning(limits: SimpleNamespace, *, tokenizer, splits, manifest) -> Verdict:
    """The loaded tokenizer is the one in the manifest and in every shard's header."""
    pins = [p for stream in splits.values() for p in stream.tokenizer_sha256]
    wrong = sum(p != tokenizer.sha256 for p in pins)
    ok = (
        not wrong
        and len(pins) >= limits.pins_min
        and manifest["tokenizer"]["sha256"] == tokenizer.sha256
    )
    ok = ok and manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    return decide(
        ok,
        f"{wrong} of {len(pins)} shard(s) were encoded with another tokenizer",
        pins=len(pins),
        wrong=wrong,
    )
