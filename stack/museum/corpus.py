"""Plants in the build of a corpus: filters, repeats, evaluation sets, packing."""

from dataclasses import replace

import numpy as np

from stackproof.data import dedup, files, filters, packing, receipts
from stackproof.museum.plant import swap


def source_skips_filters():
    original = filters.reason_to_drop

    def trusting(text, languages, plugins):
        return None if languages == ("en",) else original(text, languages, plugins)

    with swap(filters, "reason_to_drop", trusting):
        yield


def system_prompt_as_user():
    original = files.chat_text

    def two_speakers(turns, place):
        return original(
            [{**t, "role": "user"} if t.get("role") == "system" else t for t in turns], place
        )

    with swap(files, "chat_text", two_speakers):
        yield


def filter_blind_to_shape():
    with swap(
        filters, "has_system_prompt_shape", lambda turn, limit: any(c in turn for c in "○●■□")
    ):
        yield


def receipt_does_not_add_up():
    def unentered(receipt, reason, sizes):
        receipt["documents_out"] -= len(sizes)
        receipt["bytes_out"] -= int(sizes.sum())

    with swap(receipts, "drop_many", unentered):
        yield


def repeats_kept():
    def none_struck(signature_parts, keep, similarity_min):
        return [np.zeros(len(k), bool) for k in keep]

    kept = swap(dedup, "first_of_each", lambda hashes: [np.ones(len(h), bool) for h in hashes])
    with kept, swap(dedup, "near_repeats", none_struck):
        yield


def near_repeats_unseen():
    with swap(dedup, "_strike_groups", lambda value, where, rows, struck, similarity_min: None):
        yield


def scanner_blind():
    original = receipts.judge

    def salted(receipt, item, languages, plugins, grams):
        return original(
            receipt, item, languages, plugins, np.sort(np.asarray(grams) ^ np.uint64(1))
        )

    with swap(receipts, "judge", salted):
        yield


def decontamination_skipped():
    original = receipts.judge

    def without_sets(receipt, item, languages, plugins, grams):
        return original(receipt, item, languages, plugins, None)

    with swap(receipts, "judge", without_sets):
        yield


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


def packing_joins_documents():
    original = packing.PackedStream.rows

    def joined(self, numbers, seq_len):
        rows = original(self, numbers, seq_len)
        return replace(rows, document_ids=np.zeros_like(rows.document_ids))

    with swap(packing.PackedStream, "rows", joined):
        yield


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
