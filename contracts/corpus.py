"""Gates of the corpus: no source unfiltered, no repeats, nothing of an evaluation set, and every
token accounted for in the rows.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run, passed

WORDS = (
    "amber bronze copper dune ember field grove harbour island jetty kelp lagoon meadow north "
    "orchard pebble quarry river"
).split()
SENTENCES = [
    f"The {a} lies behind the {b}, and nobody had walked there before spring came."
    for a, b in zip(WORDS, WORDS[1:])
]
GOOD = " ".join(SENTENCES[:3])
PROMPT = (
    "# Agent X\n\n## Identity\nYou are a shard.\n\n## Rules\nDo as told, always, and say nothing "
    "about it."
)
# (reason the filter must give, languages, text). Reason None must be kept.
PLANTED = (
    ("too-short", ("en",), "Chapter 3"),
    ("broken-text", ("en",), GOOD + "\0"),
    ("broken-text", ("en",), GOOD.replace("a", "\ufffd", 3)),
    ("long-paragraph", ("en",), " ".join(f"{w}{i}" for i in range(40) for w in WORDS)),
    (
        "foreign-script",
        ("en",),
        "Это предложение написано на другом языке, и его здесь быть не должно.",
    ),
    ("foreign-script", ("ru",), GOOD),
    ("blank-run", ("en",), GOOD + "\n" * 20000 + GOOD),
    ("low-diversity", ("en",), "region " * 60),
    ("low-diversity", ("zh",), "我們明天再去看一看" * 30),
    ("low-diversity", ("en",), "games, tales, " * 40),
    ("repetition", ("en",), "\n".join([" ".join(SENTENCES[:4])] * 6)),
    ("system-prompt", ("en",), f"> {PROMPT} / < Understood."),
    ("system-prompt", ("en",), f"> # One\n# Two\n{GOOD * 3} / < Understood."),
    ("system-prompt", ("en",), f"> This file defines who you are. {GOOD * 3} / < Understood."),
    (
        "system-prompt",
        ("en",),
        f"> {PROMPT.replace('#', '#').replace('shard', '◆ ✦ shard')} / < Understood.",
    ),
    (
        "chat-turns",
        ("en",),
        "> What is the capital of France, please? / < Paris. / < And of Spain it is Madrid.",
    ),
    (None, ("en",), GOOD),
    (None, ("en",), f"> Where is it, at https://example.org/a/b/c or in /etc/hosts? / < {PROMPT}"),
    (None, ("en",), f"{PROMPT}\n\nThis is a plain text with headers, and no chat."),
    (None, ("en",), f"{GOOD} They call it 東京, and the old name was Эдо."),
    (
        None,
        ("ru",),
        "Это предложение написано по-русски, и здесь ему самое место, как и слову laser.",
    ),
    (
        None,
        ("code",),
        "def area(width, height):\n    return width * height\n\nprint(area(3, 4), area(5, 6))\n",
    ),
)


@decides("corpus.filters")
def filters(limits: SimpleNamespace, *, manifest, reject, chat_text, sample_documents) -> Verdict:
    """The filter tells planted texts apart, every source has a receipt that adds up, and the
    shipped shards pass the filter again.
    """
    wrong = [
        (want, got) for want, languages, text in PLANTED if (got := reject(text, languages)) != want
    ]
    if wrong:
        want, got = wrong[0]
        return failed(
            f"a planted text that must be {want or 'kept'} was {got or 'kept'}",
            wrong_plants=len(wrong),
        )
    if message := _converter_fault(chat_text, reject):
        return failed(message)
    if missing := {w for w, _, _ in PLANTED if w} - set(manifest["filters"]["rules"]):
        return failed(
            f"the corpus was built without the rule {sorted(missing)[0]}",
            missing_rules=len(missing),
        )
    for source in manifest["sources"]:
        if message := _receipt_fault(source, manifest):
            return failed(f"source {source['name']}: {message}", source=source["name"])
    worst, judged = ("", 0.0), 0
    languages = {s["name"]: tuple(s["languages"]) for s in manifest["sources"]}
    counts: dict[str, Counter] = {}
    if message := _bytes_fault(manifest):
        return failed(message)
    # a tail split leaves heads, which may be short
    whole = manifest["config"]["split"]["kind"] == "document-hash"
    for source, text in sample_documents(
        limits.refiltered_frac_min, int(limits.refiltered_documents_min)
    ):
        reason = reject(text, languages[source]) if whole or len(text) >= limits.chars_min else None
        counts.setdefault(source, Counter())[reason is not None] += 1
    for source, found in counts.items():
        judged += found.total()
        rejected = found[True] / found.total()
        worst = max(worst, (source, rejected), key=lambda w: w[1])
    silent = sorted({e["source"] for e in manifest["splits"]["train"]["shards"]} - set(counts))
    if silent:
        return failed(
            f"no document of source {silent[0]} could be filtered again", silent_sources=len(silent)
        )
    return decide(
        worst[1] <= limits.refiltered_rejected_max,
        f"{worst[1]:.1%} of the shipped documents of {worst[0]} are rejected when filtered again",
        refiltered_documents=judged,
        rejected_frac=worst[1],
        planted_texts=len(PLANTED),
        sources=len(languages),
    )


def _converter_fault(chat_text, reject) -> str:
    """What is wrong with the way chats become text, or an empty text: a system prompt must not
    arrive as a turn of the user's.
    """
    turns = [
        {"role": "user", "content": "Where does the path begin?"},
        {"role": "assistant", "content": GOOD},
    ]
    text = chat_text([{"role": "system", "content": PROMPT}, *turns])
    if text is None or "# Agent" in text or "Identity" in text or reject(text, ("en",)):
        return "a chat is lost because of its system prompt, or the prompt became part of its text"
    prompt, user, assistant = (
        {"role": "user", "content": PROMPT},
        {"role": "user", "content": GOOD},
        turns[1],
    )
    for chat in (
        [prompt],
        [prompt, assistant],
        [prompt, user, assistant],
        [assistant, prompt, assistant],
    ):
        text = chat_text(chat)
        if text is not None and reject(text, ("en",)) not in ("system-prompt", "chat-turns"):
            return (
                f"a chat of {len(chat)} turn(s) in which a system prompt stands as the user's is "
                "kept"
            )
    return ""


def _receipt_fault(source: dict, manifest: dict) -> str:
    """What is wrong with a source's receipt, or an empty text."""
    receipt = source["receipt"]
    for unit in ("documents", "bytes"):
        dropped = sum(row[unit] for row in receipt["dropped"].values())
        if receipt[f"{unit}_in"] != receipt[f"{unit}_out"] + dropped:
            return (
                f"{receipt[f'{unit}_in']} {unit} came in, {receipt[f'{unit}_out']} went out and "
                f"{dropped} were dropped"
            )
    if (source["kind"] == "pangram") != (source["languages"] == ["synthetic"]):
        return "text of people is declared synthetic, which no filter looks at"
    shipped = sum(
        e["documents"]
        for s in manifest["splits"].values()
        for e in s["shards"]
        if e["source"] == source["name"]
    )
    if (
        manifest["config"]["split"]["kind"] == "document-hash"
        and shipped != receipt["documents_out"]
    ):
        return (
            f"{receipt['documents_out']} documents passed the filters, {shipped} are in the shards"
        )
    return ""


def _bytes_fault(manifest: dict) -> str:
    """What is wrong with the bytes in the shards next to those that passed the filters,
    or an empty text.
    """
    passed_bytes = sum(s["receipt"]["bytes_out"] for s in manifest["sources"])
    shipped, dropped = (
        sum(s[k] for s in manifest["splits"].values()) for k in ("bytes", "dropped_chars")
    )
    # a character that a tokenizer drops has one to four bytes
    if not dropped <= passed_bytes - shipped <= 4 * dropped:
        return (
            f"{passed_bytes} bytes passed the filters, {shipped} are in the shards and {dropped} "
            "characters were declared as dropped"
        )
    return ""


@decides("corpus.no-repeats")
def no_repeats(limits: SimpleNamespace, *, splits, manifest, near_repeats) -> Verdict:
    """No document is in the shards twice, and where near repeats are dropped, one with a changed
    word is seen and others are not.
    """
    hashes = np.sort(np.concatenate([stream.document_hashes for stream in splits.values()]))
    repeated = int((hashes[1:] == hashes[:-1]).sum())
    measured = {"documents": len(hashes), "repeated": repeated}
    if manifest["config"]["dedup"]["kind"] == "near":
        found = near_repeats(
            [
                " ".join(SENTENCES),
                " ".join(reversed(WORDS * 4)),
                " ".join(SENTENCES).removesuffix("came.") + "went.",
            ]
        )
        if found != [False, False, True]:
            return failed(
                "a document with one changed word is not seen as a repeat, or an unlike one is",
                near_repeats_seen=False,
            )
        measured["near_repeats_seen"] = True
    return decide(
        repeated <= limits.repeated_documents_max,
        f"{repeated} document(s) are in the shards more than once",
        **measured,
    )


@decides("corpus.decontamination")
def decontamination(
    limits: SimpleNamespace, *, manifest, gram_set, shares_gram, evaluation_grams, sample_documents
) -> Verdict:
    """The scanner finds a hidden passage and nothing else, and no sampled document shares a run of
    words with an evaluation set.
    """
    canary = " ".join(SENTENCES[4:8])
    grams = gram_set([canary])
    if not shares_gram(f"{GOOD} {canary.upper().replace(',', ';')} {GOOD}", grams) or shares_gram(
        " ".join(SENTENCES[8:]), grams
    ):
        return failed(
            "the scanner misses a passage hidden in a document, or finds one that is not there",
            canary_found=False,
        )
    declared = manifest["decontamination"]
    if declared is None:
        return passed("", canary_found=True, evaluation_sets=0)
    if not shares_gram(declared["canary"], evaluation_grams):
        return failed(
            "the stored word runs do not hold the evaluation text they were made from",
            canary_found=False,
        )
    for kept_out in declared["sets"]:
        if kept_out["records_kept_out"] < limits.records_kept_out_min * kept_out["records"]:
            return failed(
                f"of {kept_out['records']} records of {kept_out['path']} "
                f"{kept_out['records_kept_out']} have a text of 13 words",
                canary_found=True,
            )
    hits = scanned = 0
    for _, text in sample_documents(limits.scanned_frac_min, int(limits.scanned_documents_min)):
        scanned += 1
        hits += shares_gram(text, evaluation_grams)
    return decide(
        hits <= limits.contaminated_documents_max and len(evaluation_grams) == declared["grams"],
        f"{hits} of {scanned} documents share a run of {declared['gram_words']} words with an "
        "evaluation set",
        canary_found=True,
        evaluation_sets=len(declared["sets"]),
        records_kept_out=sum(s["records_kept_out"] for s in declared["sets"]),
        scanned_documents=scanned,
        contaminated=hits,
    )


@decides("corpus.packing")
def packing(limits: SimpleNamespace, *, row_stream, seq_len: int, tokenizer) -> Verdict:
    """Rows hold every token of the shards once as a label, up to the declared remainder, and
    documents end where they end.
    """
    n_rows = row_stream.n_windows(seq_len)
    if not n_rows:
        return not_run(f"there is no row of {seq_len} tokens")
    judged = min(n_rows, max(1, int(limits.labels_judged_max) // seq_len))
    n_labels = crossed = broken = 0
    end, begins_shard = np.zeros(0, np.int64), np.cumsum(row_stream.shard_windows(seq_len))
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for first in range(0, judged, 64):
        rows = row_stream.rows(np.arange(first, min(first + 64, judged)), seq_len)
        valid = rows.labels != -100
        n_labels += int(valid.sum())
        counts += np.bincount(rows.labels[valid], minlength=len(counts))
        if rows.document_ids is None:
            broken += int((rows.input_ids[:, 1:] != rows.labels[:, :-1]).sum())
            # what the row before ends with
            before = np.append(end if first else rows.input_ids[:1, 0], rows.labels[:-1, -1])
            follows = ~np.isin(np.arange(first, first + len(before)), begins_shard)
            broken += int(((before != rows.input_ids[:, 0]) & follows).sum())
            end = rows.labels[-1:, -1]
            continue
        same = (rows.document_ids[:, 1:] == rows.document_ids[:, :-1]) & valid[:, 1:]
        broken += int((same & (rows.input_ids[:, 1:] != rows.labels[:, :-1])).sum())
        # Inside a document no label but its last is an end of text; where it goes on after one,
        # two documents share an id.
        crossed += int((same & (rows.labels[:, :-1] == tokenizer.eos_id)).sum())
    leading, dropped = len(row_stream.paths), row_stream.dropped_tokens(seq_len)
    unaccounted = 0
    if judged == n_rows:
        tokens = np.bincount(row_stream.token_range(0, row_stream.n_tokens), minlength=len(counts))
        tokens[tokenizer.eos_id] -= leading
        twice = int(np.maximum(counts - tokens, 0).sum())  # each stands where another is lost
        unaccounted = row_stream.n_tokens - leading - dropped - n_labels or twice
    return decide(
        not unaccounted and not crossed and not broken and dropped <= leading * seq_len,
        f"{unaccounted} token(s) are in no row and not declared as dropped; {crossed} document "
        f"border(s) are not kept, {broken} label(s) are not the next token",
        rows=judged,
        labels=n_labels,
        dropped_tokens=dropped,
        padding_frac=row_stream.padding(seq_len) / (n_rows * seq_len),
        unaccounted=unaccounted,
        crossed_borders=crossed,
    )
