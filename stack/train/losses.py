"""Cross-entropy as a sum over valid labels; whoever averages divides once, by the global count."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.conditions import ensure, require

IGNORE_INDEX = -100


@require(lambda logits_BTV, labels_BT: logits_BTV.shape[:2] == labels_BT.shape, "logits and labels agree in batch and length")
@ensure(lambda result: result.ndim == 0, "the sum is one number")
def cross_entropy_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of −log p(label) in nats over labels that are not IGNORE_INDEX. Computed and returned in float32, shape ()."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def count_valid(labels_BT: Tensor) -> int:
    """How many labels enter the loss."""
    return int((labels_BT != IGNORE_INDEX).sum())


def is_finite(*numbers: float) -> bool:
    """No number is NaN or infinite."""
    return all(torch.isfinite(torch.tensor(numbers)).tolist())
