"""Plants in the build of a corpus: filters, repeats, evaluation sets, packing."""

from dataclasses import replace

import numpy as np

from stackproof.data import dedup, files, filters, packing, receipts
from stackproof.museum.plant import plant, swap


@plant(
    "corpus.source-skips-filters",
    gate="corpus.filters",
    title="A source skips the filters",
    story=(
        "Text from a teacher model is clean by definition, so its sources are put on a list of "
        "exceptions. Nine tenths of their lines would have been rejected. The list was written "
        "for speed and outlived everybody's memory of it."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def source_skips_filters():
    original = filters.reason_to_drop

    def trusting(text, languages, plugins):
        return None if languages == ("en",) else original(text, languages, plugins)

    with swap(filters, "reason_to_drop", trusting):
        yield


@plant(
    "corpus.system-prompt-as-user",
    gate="corpus.filters",
    title="System prompts become user turns",
    story=(
        "The converter knows two speakers, and the system is not one of them, so its prompt is "
        "given to the user. The model learns that people speak in headers and rules, and answers "
        "them in the ornaments of last month's agents."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def system_prompt_as_user():
    original = files.chat_text

    def two_speakers(turns, place):
        return original(
            [{**t, "role": "user"} if t.get("role") == "system" else t for t in turns], place
        )

    with swap(files, "chat_text", two_speakers):
        yield


@plant(
    "corpus.filter-blind-to-shape",
    gate="corpus.filters",
    title="The filter knows only yesterday's ornaments",
    story=(
        "Leaked prompts are found by the symbols they carried when somebody last looked. The next "
        "prompt carries others, passes, and the report says that no ornament was found."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def filter_blind_to_shape():
    with swap(
        filters, "has_system_prompt_shape", lambda turn, limit: any(c in turn for c in "○●■□")
    ):
        yield


@plant(
    "corpus.receipt-does-not-add-up",
    gate="corpus.filters",
    title="Documents vanish between two counters",
    story=(
        "What is dropped late is subtracted from what went out, and entered nowhere. The table of "
        "drops looks complete, and the share that was lost is whatever nobody added up."
    ),
    sources=("founding note: sixteen days of region region region",),
)
def receipt_does_not_add_up():
    def unentered(receipt, reason, sizes):
        receipt["documents_out"] -= len(sizes)
        receipt["bytes_out"] -= int(sizes.sum())

    with swap(receipts, "drop_many", unentered):
        yield


@plant(
    "corpus.repeats-kept",
    gate="corpus.no-repeats",
    title="Repeated documents stay",
    story=(
        "Each process drops the repeats it sees itself, and none sees those of the others. A "
        "popular page is in the corpus as often as there were processes, and the model knows it "
        "by heart."
    ),
    sources=("https://arxiv.org/abs/2107.06499",),
)
def repeats_kept():
    def none_struck(signature_parts, keep, similarity_min):
        return [np.zeros(len(k), bool) for k in keep]

    kept = swap(dedup, "first_of_each", lambda hashes: [np.ones(len(h), bool) for h in hashes])
    with kept, swap(dedup, "near_repeats", none_struck):
        yield


@plant(
    "corpus.near-repeats-unseen",
    gate="corpus.no-repeats",
    title="The search for near repeats finds nothing",
    story=(
        "Candidates are collected, and the comparison that should strike them compares each with "
        "itself. Zero near repeats is a plausible number for a clean corpus."
    ),
    sources=("https://arxiv.org/abs/2107.06499",),
)
def near_repeats_unseen():
    with swap(dedup, "_strike_groups", lambda value, where, rows, struck, similarity_min: None):
        yield


@plant(
    "corpus.scanner-blind",
    gate="corpus.decontamination",
    title="The contamination scanner hashes two ways",
    story=(
        "Word runs of the evaluation sets are hashed in the main process and those of the corpus "
        "in the workers, each with its own salt. Nothing ever matches, and a contamination of "
        "zero goes into the paper."
    ),
    sources=("https://github.com/marin-community/marin/issues/6742",),
)
def scanner_blind():
    original = receipts.judge

    def salted(receipt, item, languages, plugins, grams):
        return original(
            receipt, item, languages, plugins, np.sort(np.asarray(grams) ^ np.uint64(1))
        )

    with swap(receipts, "judge", salted):
        yield


@plant(
    "corpus.decontamination-skipped",
    gate="corpus.decontamination",
    title="The corpus is not scanned at all",
    story=(
        "The evaluation sets are read and their word runs stored, and the argument that hands "
        "them to the workers is left out. All is in place, the report names the sets, and the "
        "benchmark is in the training data."
    ),
    sources=("https://github.com/openai/parameter-golf/issues/2127",),
)
def decontamination_skipped():
    original = receipts.judge

    def without_sets(receipt, item, languages, plugins, grams):
        return original(receipt, item, languages, plugins, None)

    with swap(receipts, "judge", without_sets):
        yield


@plant(
    "corpus.packing-truncates",
    gate="corpus.packing",
    title="Long documents are cut off",
    story=(
        "A document gives eight rows at most, and the rest of it is gone. Books lose all but "
        "their first pages, and the report counts rows and not tokens."
    ),
    sources=("https://arxiv.org/abs/2404.10830", "https://github.com/huggingface/trl/pull/6320"),
)
def packing_truncates():
    original = packing.plan

    def eight_rows_each(document_starts, n_tokens, seq_len):
        ends = np.append(document_starts[1:], n_tokens)
        long = np.flatnonzero(ends - document_starts > 8 * seq_len)
        plan = original(document_starts, n_tokens, seq_len)
        lost = np.concatenate(
            [np.arange(document_starts[i] - 1 + 8 * seq_len, ends[i]) for i in long] or [[]]
        )
        kept = ~np.isin(plan.starts, lost)
        return packing.Plan(plan.starts[kept], plan.lengths[kept], np.arange(kept.sum() + 1))

    with (
        swap(packing, "plan", eight_rows_each),
        swap(packing.PackedStream, "dropped_tokens", lambda self, seq_len: 0),
    ):
        yield


@plant(
    "corpus.packing-joins-documents",
    gate="corpus.packing",
    title="Packed documents share one id",
    story=(
        "Documents are laid side by side, and the list that says where each begins is made per "
        "row and not per document. The mask keeps nothing apart, and every document is read as "
        "the answer to the one before."
    ),
    sources=("https://github.com/huggingface/transformers/issues/23530",),
)
def packing_joins_documents():
    original = packing.PackedStream.rows

    def joined(self, numbers, seq_len):
        rows = original(self, numbers, seq_len)
        return replace(rows, document_ids=np.zeros_like(rows.document_ids))

    with swap(packing.PackedStream, "rows", joined):
        yield


@plant(
    "corpus.packing-label-crosses",
    gate="corpus.packing",
    title="Labels are shifted after packing",
    story=(
        "Rows are packed first and shifted by one afterwards. The last token of every document is "
        "asked to predict the first word of another one, and learns that anything may follow."
    ),
    sources=("https://arxiv.org/abs/2404.10830",),
)
def packing_label_crosses():
    original = packing.PackedStream.rows

    def shifted_late(self, numbers, seq_len):
        rows = original(self, numbers, seq_len)
        labels = np.concatenate(
            [rows.input_ids[:, 1:], np.full((len(numbers), 1), packing.IGNORE_INDEX)], axis=1
        )
        return replace(rows, labels=labels)

    with swap(packing.PackedStream, "rows", shifted_late):
        yield
