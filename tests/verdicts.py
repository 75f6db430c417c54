"""What a clean run's gates say."""

from collections.abc import Iterable

SHORT = 24  # steps; a run of fewer cannot be asked whether it has learned


def all_green(gates: Iterable, steps: int) -> bool:
    """Whether every gate passed, but for `runtime.learned` of a run that is too short for it,
    which says so.
    """
    odd = {g.id: g.verdict for g in gates if g.verdict != "pass"}
    return odd == ({"runtime.learned": "not_run"} if steps < SHORT else {})
