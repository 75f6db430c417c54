"""Gates of the tokenizer: text survives, and the tokenizer is the one the shards were made with."""

from types import SimpleNamespace

from contracts.gate import Verdict, decide, decides, failed


@decides("tokenizer.round-trip")
def round_trip(limits: SimpleNamespace, *, tokenizer, hard_texts, held_out_texts) -> Verdict:
    """decode(encode(x)) is x for hard and for held-out texts, lengths in bytes add up, and text never becomes a control id."""
    texts = [*hard_texts, *held_out_texts]
    checked = 0
    for text, batched in zip(texts, tokenizer.encode_batch(texts), strict=True):
        encoding = tokenizer.encode(text)
        if list(batched.ids) != list(encoding.ids):
            return failed("a text gives other ids in a batch, as shards are written, than alone, as prompts are read", checked=checked)
        if tokenizer.eos_id in encoding.ids:
            return failed("a literal in the text became the end-of-text id", checked=checked)
        back = tokenizer.decode(encoding.ids)
        if encoding.dropped_chars == 0 and back != text:
            at = next((i for i, (a, b) in enumerate(zip(back, text)) if a != b), min(len(back), len(text)))
            return failed(f"text does not survive: {text[at : at + 12]!r} comes back as {back[at : at + 12]!r}", checked=checked)
        if encoding.dropped_chars and back != "".join(c for c in text if not tokenizer.encode(c).dropped_chars):
            return failed("what is left after dropping unknown characters is not the rest of the text", checked=checked)
        if encoding.dropped_chars != len(text) - len(back):
            return failed(f"{encoding.dropped_chars} dropped characters reported, {len(text) - len(back)} missing", checked=checked)
        n_bytes, declared = len(back.encode("utf-8")), int(tokenizer.token_bytes[encoding.ids].sum()) if encoding.ids else 0
        if n_bytes != declared:
            return failed(f"the ids stand for {declared} bytes, the text has {n_bytes}", checked=checked)
        checked += 1
    others = [i for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id]
    short = [i for i in others if tokenizer.token_bytes[i] < 1 or not tokenizer.decode([i])]
    return decide(
        not short and checked >= limits.texts_min and int(tokenizer.token_bytes[tokenizer.eos_id]) == 0,
        f"{len(short)} id(s) stand for no text, {checked} text(s) were checked",
        checked=checked,
        empty_ids=len(short),
    )


@decides("tokenizer.pinning")
def pinning(limits: SimpleNamespace, *, tokenizer, splits, manifest) -> Verdict:
    """The loaded tokenizer is the one in the manifest and in every shard's header."""
    pins = [p for stream in splits.values() for p in stream.tokenizer_sha256]
    wrong = sum(p != tokenizer.sha256 for p in pins)
    ok = not wrong and len(pins) >= limits.pins_min and manifest["tokenizer"]["sha256"] == tokenizer.sha256
    ok = ok and manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    return decide(ok, f"{wrong} of {len(pins)} shard(s) were encoded with another tokenizer", pins=len(pins), wrong=wrong)
