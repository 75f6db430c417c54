"""How much is injected: a short round in `make test`, a long one in `make stress`."""

import os
import random
import time

STRESS = bool(os.environ.get("STRESS"))
# The short round is the same each time, so that a red test follows from a change. Long rounds add
# up: each has another seed. SEED=n repeats a round.
SEED = int(os.environ.get("SEED") or (time.time_ns() % 2**32 if STRESS else 0))


def scaled(short: int, long: int) -> int:
    """A number of rounds: `short` in `make test`, `long` in `make stress`."""
    return long if STRESS else short


def chance(name: str) -> random.Random:
    """Random choices of one test, from SEED, which belongs into the message of its asserts."""
    return random.Random(f"{SEED} {name}")
