"""Receipts of filtering: per source the documents and bytes in, out, and dropped by reason. Their
sums must match.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from stackproof.data import dedup, filters
from stackproof.data.files import Document, Unreadable
from stackproof.data.plugins import Plugin


def empty() -> dict[str, Any]:
    """A receipt before the first document.
    Bytes are UTF-8 bytes of text; for an unreadable item, bytes of the file.
    """
    return {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0, "dropped": {}}


def judge(
    receipt: dict,
    item: Document | Unreadable,
    languages: tuple[str, ...],
    plugins: Iterable[Plugin],
    grams: np.ndarray | None,
) -> str | None:
    """Filter one item and count it. Returns its text if it is kept."""
    if isinstance(item, Unreadable):
        _enter(receipt, item.reason, 1, item.n_bytes, item.id)
        return None
    reason = filters.reason_to_drop(item.text, languages, plugins)
    if reason is None and grams is not None and dedup.shares_gram(item.text, grams):
        reason = "in-evaluation-set"
    _enter(receipt, reason, 1, len(item.text.encode()), item.id)
    return item.text if reason is None else None


def _enter(receipt: dict, reason: str | None, documents: int, n_bytes: int, example: str) -> None:
    receipt["documents_in"] += documents
    receipt["bytes_in"] += n_bytes
    if reason is None:
        receipt["documents_out"] += documents
        receipt["bytes_out"] += n_bytes
        return
    _drop(receipt, reason, documents, n_bytes, example)


def _drop(receipt: dict, reason: str, documents: int, n_bytes: int, example: str) -> None:
    row = receipt["dropped"].setdefault(reason, {"documents": 0, "bytes": 0, "example": example})
    row["documents"] += documents
    row["bytes"] += n_bytes


def drop_many(receipt: dict, reason: str, sizes: np.ndarray) -> None:
    """Move kept documents with these sizes in bytes to the dropped ones."""
    if not len(sizes):
        return
    _drop(receipt, reason, len(sizes), int(sizes.sum()), "")
    receipt["documents_out"] -= len(sizes)
    receipt["bytes_out"] -= int(sizes.sum())


def total(receipts: Iterable[dict]) -> dict:
    """The sum of receipts, with the first example of each reason."""
    whole = empty()
    for receipt in receipts:
        for key in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
            whole[key] += receipt[key]
        for reason, row in receipt["dropped"].items():
            _drop(whole, reason, row["documents"], row["bytes"], row["example"])
    return whole


def worst(receipt: dict) -> str:
    """Text with the reason that dropped most documents; empty without drops."""
    dropped = receipt["dropped"]
    if not dropped:
        return ""
    reason, row = max(dropped.items(), key=lambda item: item[1]["documents"])
    where = f", the first at {row['example']}" if row["example"] else ""
    return f"{row['documents']:,} of {receipt['documents_in']:,} dropped as {reason}{where}"


def table(sources: Iterable[dict]) -> list[dict[str, Any]]:
    """One row per source of a manifest, then their sum: documents in and out, bytes out, share
    dropped, and documents by reason.
    """
    rows = [_row(s["name"], s["receipt"]) for s in sources]
    return [*rows, _row("all", total(s["receipt"] for s in sources))] if len(rows) > 1 else rows


def _row(name: str, receipt: dict) -> dict[str, Any]:
    dropped = receipt["documents_in"] - receipt["documents_out"]
    return {
        "source": name,
        "in": receipt["documents_in"],
        "out": receipt["documents_out"],
        "bytes_in": receipt["bytes_in"],
        "bytes_out": receipt["bytes_out"],
        "dropped": dropped,
        "dropped_frac": dropped / receipt["documents_in"] if receipt["documents_in"] else 0.0,
        "reasons": {reason: row["documents"] for reason, row in sorted(receipt["dropped"].items())},
    }
