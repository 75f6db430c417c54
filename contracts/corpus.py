"""Gates of the corpus: every source is filtered, no document repeats, no text of an evaluation set
is in it, and every token is in the rows.
"""

from collections import Counter
from pathlib import PurePath
from types import SimpleNamespace

import numpy as np

from stackproof.contracts.gate import Verdict, decide, decide_all, decides, failed, not_run, passed
from stackproof.contracts.scope import of_read_shards, over_all_shards
from stackproof.contracts.subject import Corpus, Subject

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
# (rule that must reject the text, languages, text); None: the filters must keep it
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
@over_all_shards
def filters(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The filters judge planted texts rightly, every source has a receipt that adds up, and the
    documents in the shards pass the filters again.
    """
    corpus, manifest = subject.corpus, subject.corpus.manifest
    wrong = [
        (want, got)
        for want, languages, text in PLANTED
        if (got := corpus.rejection(text, languages)) != want
    ]
    if wrong:
        want, got = wrong[0]
        return failed(
            f"a planted text that must be {want or 'kept'} was {got or 'kept'}",
            wrong_plants=len(wrong),
        )
    if message := _converter_fault(corpus):
        return failed(message)
    if missing := {w for w, _, _ in PLANTED if w} - set(manifest["filters"]["rules"]):
        return failed(
            f"the corpus was built without the rule {sorted(missing)[0]}",
            missing_rules=len(missing),
        )
    for source in manifest["sources"]:
        if message := _receipt_fault(source, manifest):
            return failed(f"source {source['name']}: {message}", source=source["name"])
    if message := _bytes_fault(manifest):
        return failed(message)
    counts = _filtered_again(corpus, limits)
    silent = sorted({e["source"] for e in manifest["splits"]["train"]["shards"]} - set(counts))
    if silent:
        return failed(
            f"no document of source {silent[0]} could be filtered again", silent_sources=len(silent)
        )
    rejected, worst = max((c[True] / c.total(), source) for source, c in counts.items())
    return decide(
        rejected <= limits.refiltered_rejected_max,
        f"{rejected:.1%} of the shipped documents of {worst} are rejected when filtered again",
        refiltered_documents=sum(c.total() for c in counts.values()),
        rejected_frac=rejected,
        planted_texts=len(PLANTED),
        sources=len(manifest["sources"]),
    )


def _filtered_again(corpus: Corpus, limits: SimpleNamespace) -> dict[str, Counter]:
    """How many sampled documents the filters reject (True) and keep (False), by source."""
    manifest = corpus.manifest
    languages = {s["name"]: tuple(s["languages"]) for s in manifest["sources"]}
    # A tail split leaves beginnings of documents, which may be too short.
    whole = manifest["config"]["split"]["kind"] == "document-hash"
    counts: dict[str, Counter] = {}
    for source, text in corpus.sample_documents(
        limits.refiltered_frac_min, int(limits.refiltered_documents_min)
    ):
        judged = whole or len(text) >= limits.chars_min
        rejected = judged and corpus.rejection(text, languages[source]) is not None
        counts.setdefault(source, Counter())[rejected] += 1
    return counts


def _converter_fault(corpus: Corpus) -> str:
    """The fault in the conversion of chats to text, or an empty text: a system prompt must not
    become a turn of the user.
    """
    turns = [
        {"role": "user", "content": "Where does the path begin?"},
        {"role": "assistant", "content": GOOD},
    ]
    text = corpus.chat_text([{"role": "system", "content": PROMPT}, *turns])
    if (
        text is None
        or "# Agent" in text
        or "Identity" in text
        or corpus.rejection(text, ("en",)) is not None
    ):
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
        text = corpus.chat_text(chat)
        if text is not None and corpus.rejection(text, ("en",)) not in (
            "system-prompt",
            "chat-turns",
        ):
            return f"a chat of {len(chat)} turn(s) with a system prompt as a user's turn is kept"
    return ""


def _receipt_fault(source: dict, manifest: dict) -> str:
    """The fault in the receipt of a source, or an empty text."""
    receipt = source["receipt"]
    for unit in ("documents", "bytes"):
        dropped = sum(row[unit] for row in receipt["dropped"].values())
        if receipt[f"{unit}_in"] != receipt[f"{unit}_out"] + dropped:
            return (
                f"{receipt[f'{unit}_in']} {unit} came in, {receipt[f'{unit}_out']} went out and "
                f"{dropped} were dropped"
            )
    passed_over = source.get("files_passed_over", {"number": 0, "example": ""})
    if (passed_over["number"] == 0) != (passed_over["example"] == ""):
        return (
            f"{passed_over['number']} files are stated as passed over, an example of them as "
            f"{passed_over['example']!r}"
        )
    if (source["kind"] == "pangram") != (source["languages"] == ["synthetic"]):
        return "text that people wrote is declared synthetic, which no filter judges"
    own = {
        split: [e for e in counts["shards"] if e["source"] == source["name"]]
        for split, counts in manifest["splits"].items()
    }
    tokens = {split: sum(e["tokens"] for e in shards) for split, shards in own.items()}
    if source["tokens"] != tokens:
        return f"its tokens by split are stated as {source['tokens']}, its shards have {tokens}"
    shipped = sum(e["documents"] for shards in own.values() for e in shards)
    if (
        manifest["config"]["split"]["kind"] == "document-hash"
        and shipped != receipt["documents_out"]
    ):
        return (
            f"{receipt['documents_out']} documents passed the filters, {shipped} are in the shards"
        )
    return ""


def _bytes_fault(manifest: dict) -> str:
    """The difference between the bytes that passed the filters and those in the shards, or an empty
    text.
    """
    passed_bytes = sum(s["receipt"]["bytes_out"] for s in manifest["sources"])
    shipped, dropped = (
        sum(s[k] for s in manifest["splits"].values()) for k in ("bytes", "dropped_chars")
    )
    # A character that the tokenizer drops has one to four bytes.
    if not dropped <= passed_bytes - shipped <= 4 * dropped:
        return (
            f"{passed_bytes} bytes passed the filters, {shipped} are in the shards and {dropped} "
            "characters were declared as dropped"
        )
    return ""


@decides("corpus.no-repeats")
@over_all_shards
def no_repeats(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """No document is in the shards twice; where near repeats are dropped, a document with one
    changed word is dropped and an unlike one is not.
    """
    corpus = subject.corpus
    hashes = np.sort(np.concatenate([stream.document_hashes for stream in corpus.splits.values()]))
    repeated = int((hashes[1:] == hashes[:-1]).sum())
    measured = {"documents": len(hashes), "repeated": repeated}
    if corpus.manifest["config"]["dedup"]["kind"] == "near":
        found = corpus.near_repeats(
            [
                " ".join(SENTENCES),
                " ".join(reversed(WORDS * 4)),
                " ".join(SENTENCES).removesuffix("came.") + "went.",
            ]
        )
        if found != [False, False, True]:
            return failed(
                "deduplication keeps a document with one changed word, or drops an unlike one",
                near_repeats_seen=False,
            )
        measured["near_repeats_seen"] = True
    return decide(
        repeated <= limits.repeated_documents_max,
        f"{repeated} document(s) are in the shards more than once",
        **measured,
    )


@decides("corpus.decontamination")
def decontamination(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The scanner finds a hidden passage and finds none in another text, and no sampled document
    shares an n-gram with an evaluation set.
    """
    corpus, declared = subject.corpus, subject.corpus.manifest["decontamination"]
    canary = " ".join(SENTENCES[4:8])
    scanner = corpus.contamination_scanner([canary])
    hidden = f"{GOOD} {canary.upper().replace(',', ';')} {GOOD}"
    if not scanner.finds(hidden) or scanner.finds(" ".join(SENTENCES[8:])):
        return failed(
            "the scanner misses a passage hidden in a document, or finds one that is not there",
            canary_found=False,
        )
    wanted = sorted(PurePath(path).name for path in corpus.manifest["config"]["decontaminate"])
    stated = sorted(kept_out["path"] for kept_out in (declared or {"sets": ()})["sets"])
    if stated != wanted:
        return failed(f"the evaluation sets are stated as {stated}, declared are {wanted}")
    if declared is None:
        return passed("", canary_found=True, evaluation_sets=0)
    scanner = corpus.contamination_scanner(None)
    if not scanner.finds(declared["canary"]):
        return failed(
            "the stored n-grams are not those of the evaluation text they were made from",
            canary_found=False,
        )
    for kept_out in declared["sets"]:
        if kept_out["records_kept_out"] < limits.records_kept_out_min * kept_out["records"]:
            return failed(
                f"of {kept_out['records']} records of {kept_out['path']} only "
                f"{kept_out['records_kept_out']} have a text of {declared['gram_words']} words",
                canary_found=True,
            )
    hits = scanned = 0
    for _, text in corpus.sample_documents(
        limits.scanned_frac_min, int(limits.scanned_documents_min)
    ):
        scanned += 1
        hits += scanner.finds(text)
    verdict = decide(
        hits <= limits.contaminated_documents_max and scanner.n_grams == declared["grams"],
        f"{hits} of {scanned} documents share {declared['gram_words']} words in a row with an "
        f"evaluation set, or the {scanner.n_grams} stored n-grams are not the {declared['grams']} "
        "declared",
        canary_found=True,
        evaluation_sets=len(declared["sets"]),
        records_kept_out=sum(s["records_kept_out"] for s in declared["sets"]),
        scanned_documents=scanned,
        contaminated=hits,
    )
    return of_read_shards(verdict, subject)


@decides("corpus.packing")
@over_all_shards
def packing(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Rows hold every token of the shards once as a label and no document runs into the next. Only
    what fills no row at the end of a shard is left out, and nothing where documents are kept apart.
    """
    row_stream, seq_len = subject.corpus.splits["train"], subject.data_loader.seq_len
    tokenizer = subject.tokenizer.tokenizer
    n_rows = row_stream.n_windows(seq_len)
    if not n_rows:
        return not_run(f"there is no row of {seq_len} tokens")
    judged = min(n_rows, max(1, int(limits.labels_judged_max) // seq_len))
    n_labels = crossed = broken = half_empty = 0
    padding = row_stream.padding(seq_len)
    end, begins_shard = np.zeros(0, np.int64), np.cumsum(row_stream.shard_windows(seq_len))
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for first in range(0, judged, 64):
        rows = row_stream.rows(np.arange(first, min(first + 64, judged)), seq_len)
        valid = rows.labels != -100
        n_labels += int(valid.sum())
        counts += np.bincount(rows.labels[valid], minlength=len(counts))
        if rows.document_ids is None:
            broken += int((rows.input_ids[:, 1:] != rows.labels[:, :-1]).sum())
            # the last label of the row before
            before = np.append(end if first else rows.input_ids[:1, 0], rows.labels[:-1, -1])
            follows = ~np.isin(np.arange(first, first + len(before)), begins_shard)
            broken += int(((before != rows.input_ids[:, 0]) & follows).sum())
            end = rows.labels[-1:, -1]
            continue
        broken += int(((rows.document_ids >= 0) != valid).sum())
        half_empty += int((2 * valid.sum(1) <= seq_len).sum())
        same = (rows.document_ids[:, 1:] == rows.document_ids[:, :-1]) & valid[:, 1:]
        broken += int((same & (rows.input_ids[:, 1:] != rows.labels[:, :-1])).sum())
        # Only the last label of a document may be an end of text; a label after it shows that two
        # documents share an id.
        crossed += int((same & (rows.labels[:, :-1] == tokenizer.eos_id)).sum())
    leading, dropped = len(row_stream.paths), row_stream.dropped_tokens(seq_len)
    kept_apart, unaccounted = rows.document_ids is not None, 0
    allowed = 0 if kept_apart else leading * (seq_len - 1)
    if judged == n_rows:
        if not kept_apart:
            allowed = sum((n - 1) % seq_len for n in row_stream.shard_tokens())
        tokens = np.bincount(row_stream.token_range(0, row_stream.n_tokens), minlength=len(counts))
        tokens[tokenizer.eos_id] -= leading
        twice = int(np.maximum(counts - tokens, 0).sum())  # each stands where another is lost
        unaccounted = row_stream.n_tokens - leading - dropped - n_labels or twice
    empty = judged * seq_len - n_labels
    of_tokens = n_rows * seq_len - (row_stream.n_tokens - leading - dropped)
    # Rows are full where documents follow each other, and hold a token each where they do not.
    empty_max = empty + (n_rows - judged) * (seq_len - 1) if kept_apart else 0
    return decide_all(
        [
            unaccounted != 0
            and f"{unaccounted} token(s) are in no row and not declared as dropped",
            crossed > 0 and f"{crossed} document border(s) are not kept",
            broken > 0
            and f"{broken} place(s) have another label than the next token, or have a label or a "
            "document id without the other",
            not (padding == of_tokens and empty <= padding <= empty_max)
            and f"{padding} positions are declared as padding; the {judged} of {n_rows} rows that "
            f"were read have {empty}, and the tokens leave {of_tokens} of all rows",
            half_empty > limits.half_empty_rows_per_shard_max * leading
            and f"{half_empty} rows are filled to a half or less, in {leading} shard(s): two of "
            "them would fit into one",
            dropped > allowed
            and f"{dropped} token(s) are dropped, and the ends of the shards that fill no row hold "
            f"{allowed}",
        ],
        rows=judged,
        labels=n_labels,
        dropped_tokens=dropped,
        padding_frac=empty / (judged * seq_len),
        unaccounted=unaccounted,
        crossed_borders=crossed,
        half_empty_rows=half_empty,
    )
