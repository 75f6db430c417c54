"""How much is injected: a short round in `make test`, a long one in `make stress`."""

import os
import random
import time

STRESS = bool(os.environ.get("STRESS"))
# Another one each time, so that rounds add up; SEED=n repeats a round.
SEED = int(os.environ.get("SEED") or time.time_ns() % 2**32)


def scaled(short: int, long: int) -> int:
    """A number of rounds: `short` in `make test`, `long` in `make stress`."""
    return long if STRESS else short


def chance(name: str) -> random.Random:
    """Random choices of one test, from SEED, which belongs into the message of its asserts."""
    return random.Random(f"{SEED} {name}")
