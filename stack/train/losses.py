"""Cross-entropy as a sum over valid labels; the caller divides once,
by the count of the whole step.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from stackproof.contracts.conditions import ensure, require
from stackproof.data.packing import IGNORE_INDEX
from stackproof.kernels import dispatch
from stackproof.model.forward_context import ExpertLoad


@require(
    lambda x_BTD, labels_BT: x_BTD.shape[:2] == labels_BT.shape,
    "features and labels agree in batch and length",
)
@ensure(lambda result: result.ndim == 0, "the sum is one number")
def linear_cross_entropy_sum(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of −log p(label) in nats over labels that are not IGNORE_INDEX, where p =
    softmax(x·headᵀ). Returned in float32, shape ().
    """
    nats, _ = dispatch.linear_cross_entropy(
        x_BTD.flatten(0, 1), head_VD, labels_BT.flatten(), ignore_index=IGNORE_INDEX
    )
    return nats


def balance_term(loads: Sequence[ExpertLoad], weight: float) -> Tensor | float:
    """Weighted balance of all layers with experts, summed over tokens, shape (); 0 without any."""
    if not loads or weight == 0:
        return 0.0
    return weight * sum(load.balance_sum for load in loads)


def count_valid(labels_BT: Tensor) -> int:
    """How many labels enter the loss."""
    return int((labels_BT != IGNORE_INDEX).sum())


def is_finite(*numbers: float) -> bool:
    """No number is NaN or infinite."""
    return all(map(math.isfinite, numbers))
