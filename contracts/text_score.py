"""Gate of evaluated texts: the reported score is that of this text under this model.

T tokens, V vocab
"""

import math
from types import SimpleNamespace

import torch

from stackproof.contracts.gate import Verdict, decide_all, decides, worst
from stackproof.contracts.subject import Subject
from stackproof.contracts.subject.data import Encoding

JUDGED_WINDOWS = 8  # the first, the last, and between them evenly spread


@decides("evaluation.text-score")
def text_score(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Windows of the declared length and stride over the declared text, scored again here in
    float64, have the reported nats; the totals are their sums; the record states these numbers.

    An end-of-text token begins every text. A window scores the tokens that no earlier one has.
    """
    found, score = subject.scored, subject.scored.score
    encodings = [found.tokenizer.encode(text) for text in found.texts]
    ids = torch.tensor([i for e in encodings for i in (found.tokenizer.eos_id, *e.ids)])
    seq_len, stride, n_labels = found.seq_len, found.stride, len(ids) - 1
    n_windows = 1 + max(0, math.ceil((n_labels - seq_len) / stride))
    counts = [min(seq_len, n_labels)] + [
        min(w * stride + seq_len, n_labels) - ((w - 1) * stride + seq_len)
        for w in range(1, n_windows)
    ]
    errors = [math.inf]
    if len(score.window_nats) == n_windows:
        every = range(0, n_windows, max(1, n_windows // (JUDGED_WINDOWS - 1)))
        errors = [
            abs(nats - mean) / mean
            for w in sorted({*every, n_windows - 1})
            for mean in [_window_nats(found, ids, w, counts[w])]
            for nats in [score.window_nats[w]]
        ]
    dropped = sum(
        _dropped(text, e, found.tokenizer.decode(list(e.ids)))
        for text, e in zip(found.texts, encodings)
    )
    n_bytes = sum(len(text.encode()) for text in found.texts)
    chars = sum(map(len, found.texts)) - dropped
    total = math.fsum(nats * n for nats, n in zip(score.window_nats, counts))
    expected = {
        "total_nats": total,
        "loss_nats": total / max(1, n_labels),
        "bits_per_byte": total / math.log(2) / max(1, n_bytes - score.dropped_bytes),
        "bits_per_char": total / math.log(2) / max(1, chars),
        "tokens": n_labels,
        "bytes": n_bytes - score.dropped_bytes,
        "chars": chars,
        "dropped_chars": dropped,
    }
    off = {
        name: worst((_off(getattr(score, name), value), _off(found.metrics.get(name), value)))
        for name, value in expected.items()
    }
    wrong = [name for name, error in off.items() if not error <= limits.sum_rel_error_max]
    return decide_all(
        [
            not worst(errors) <= limits.window_rel_error_max
            and f"the score of a window is {worst(errors):.3g} from that of the declared text",
            bool(wrong) and f"{', '.join(wrong)} do not follow from the windows and the text",
            n_bytes != found.declared_bytes
            and f"the text has {n_bytes} bytes, its source {found.declared_bytes}",
        ],
        window_rel_error=worst(errors),
        sum_rel_error=worst(off.values()),
        windows=n_windows,
    )


def _dropped(text: str, encoding: Encoding, decoded: str) -> int:
    """Characters of a text that its ids lack. Where ids spell other text than a part of it, as a
    tokenizer that normalises gives, the number that the tokenizer counts.
    """
    rest = iter(text)
    is_part = all(character in rest for character in decoded)
    return len(text) - len(decoded) if is_part else encoding.dropped_chars


def _off(value: float | None, expected: float) -> float:
    return math.inf if value is None else abs(value - expected) / max(1.0, abs(expected))


def _window_nats(found: object, ids: torch.Tensor, window: int, n_scored: int) -> float:
    """Mean nats of the labels that a window scores, by float64 on the model's own logits."""
    start = window * found.stride
    row = ids[start : min(start + found.seq_len, len(ids) - 1) + 1]
    log_probs_TV = found.last_logits(row[:-1].tolist(), n_scored).double().log_softmax(-1)
    return -float(log_probs_TV.gather(1, row[-n_scored:, None]).mean())
