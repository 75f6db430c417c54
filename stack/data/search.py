"""Search for text in the shards of a split, by token ids."""

from collections.abc import Sequence

import numpy as np

from stackproof.contracts.data import PIECE_TOKENS, span_hashes, span_of
from stackproof.data.shards import TokenStream


def found_in(ids: Sequence[int], stream: TokenStream, max_tokens: int) -> float:
    """Share of a text's runs of about 60 bytes that occur in the first `max_tokens` of a stream; 0
    for a text shorter than a run.
    """
    span = span_of(stream.n_bytes / stream.n_tokens)
    if len(ids) < span:
        return 0.0
    own = np.unique(span_hashes(np.asarray(ids, np.int64), span))
    found = np.zeros(len(own), bool)
    for start in range(0, min(stream.n_tokens, max_tokens), PIECE_TOKENS):
        tokens = stream.token_range(start, min(start + PIECE_TOKENS + span, stream.n_tokens))
        found |= np.isin(own, span_hashes(tokens, span)) if len(tokens) >= span else False
    return float(found.mean())


def passages_found(rows: Sequence[Sequence[int]], stream: TokenStream, max_tokens: int) -> float:
    """Share of passages of about 60 bytes, four from every row, that occur in the first
    `max_tokens` of a stream.
    """
    span = span_of(stream.n_bytes / stream.n_tokens)
    cuts = [
        row[start : start + span]
        for row in rows
        for start in (0, len(row) // 4, len(row) // 2, 3 * len(row) // 4)
    ]
    wanted = [np.asarray(c, "<u4").tobytes() for c in cuts if len(c) == span]
    found = [False] * len(wanted)
    for start in range(0, min(stream.n_tokens, max_tokens), PIECE_TOKENS):
        piece = (
            stream.token_range(start, min(start + PIECE_TOKENS + span, stream.n_tokens))
            .astype("<u4")
            .tobytes()
        )
        found = [was or passage in piece for was, passage in zip(found, wanted)]
    return sum(found) / len(found) if found else 0.0
