"""Reusable icontract pre- and postconditions for public functions, at one of three levels.

STACK_CONTRACTS=off       nothing is checked
STACK_CONTRACTS=standard  cheap conditions: types, shapes, ranges (the default)
STACK_CONTRACTS=full      also conditions that read whole tensors
"""

import os
from collections.abc import Callable

import icontract

from stackproof.spec.errors import ConfigError

LEVELS = ("off", "standard", "full")
LEVEL = os.environ.get("STACK_CONTRACTS", "standard")
if LEVEL not in LEVELS:
    raise ConfigError("STACK_CONTRACTS names no level", value=LEVEL, allowed=" | ".join(LEVELS))

STANDARD = LEVEL in ("standard", "full")
FULL = LEVEL == "full"

ContractError = icontract.ViolationError


def require(condition: Callable, message: str, *, full: bool = False) -> Callable:
    """Precondition on a public function's arguments.
    `full=True` marks one that reads whole tensors.
    """
    return icontract.require(condition, message, enabled=FULL if full else STANDARD)


def ensure(condition: Callable, message: str, *, full: bool = False) -> Callable:
    """Postcondition; may name `result` and any argument."""
    return icontract.ensure(condition, message, enabled=FULL if full else STANDARD)


def is_token_ids(ids) -> bool:
    """Two-dimensional integer tensor: (batch, tokens)."""
    return ids.ndim == 2 and not ids.is_floating_point()


def within_vocabulary(ids, vocab_size: int) -> bool:
    """Every id is in 0 … vocab_size-1. Reads the tensor."""
    return ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size)


def labels_match(labels, input_ids) -> bool:
    """Labels have the shape of the input."""
    return labels.shape == input_ids.shape


def all_finite(tensor) -> bool:
    """No NaN or infinity. Reads the tensor."""
    return bool(tensor.isfinite().all())
