"""The rows that the ranks of a run draw, in a log beside the run."""

import json
from pathlib import Path


def logged(draw, log: Path):
    """A function of the loop that draws a step, with a line of its rows and windows in `log`."""

    def drawn(trainer):
        batches = draw(trainer)
        rows = {row: w for b in batches for row, w in zip(b.rows, b.sample_ids, strict=True)}
        with open(log, "a") as f:
            f.write(json.dumps({"step": trainer.state.step + 1, "rows": rows}) + "\n")
        return batches

    return drawn


def rows_of(log: Path) -> dict[int, tuple[int, int]]:
    """Step and window of each row that the ranks of a run drew. A row that was drawn again, since
    its step was lost, must be the same.
    """
    found: dict[int, tuple[int, int]] = {}
    for line in log.read_text().splitlines():
        drawn = json.loads(line)
        for row, window in drawn["rows"].items():
            assert found.setdefault(int(row), (drawn["step"], window)) == (drawn["step"], window)
    return found
