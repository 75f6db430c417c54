"""`ranks.jsonl`: the ranks of a run, and what their steps took. A line `mesh` for each start of the
processes, and a line `times` for each step that was profiled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

FILE = "ranks.jsonl"
PEAK = "peak_memory_bytes"
FIGURES = ("step_s", "own_s", "communication_frac", "exposed_frac", PEAK)


def over_ranks(values: Sequence[float]) -> dict[str, Any]:
    """A figure of all ranks as a line has it: in order of rank, and its spread."""
    rounded = [round(value, 6) for value in values]
    spread = {"min": min(rounded), "median": round(median(rounded), 6), "max": max(rounded)}
    return spread | {"ranks": rounded}


@dataclass(frozen=True)
class RankTable:
    """The ranks since the last start of the processes. `ranks` are their facts, and `figures` their
    medians over the lines, of memory the maximum, by name, in order of rank; `n_profiled` counts
    the profiled steps.
    """

    mesh: Mapping[str, int]
    ranks: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Sequence[float]]
    n_profiled: int

    @property
    def slowest_rank_ratio(self) -> float:
        """Own time of the slowest rank over that of the fastest."""
        return max(self.figures["own_s"]) / max(min(self.figures["own_s"]), 1e-9)

    def rows(self) -> list[dict[str, Any]]:
        """A row of facts and figures for each rank."""
        return [
            {**facts, **{name: values[i] for name, values in self.figures.items()}}
            for i, facts in enumerate(self.ranks)
        ]


def rank_table(lines: Iterable[Mapping[str, Any]]) -> RankTable | None:
    """The table of a series; None without a line. Raises ValueError if a line has another number of
    ranks than the mesh, or no line of the mesh comes before it.
    """
    start, found = None, []
    for line in lines:
        if line["event"] == "mesh":
            start, found = line, []
        else:
            found.append(line)
    if start is None:
        if found:
            raise ValueError("no line of a mesh comes before the times")
        return None
    figures = {}
    for name in FIGURES:
        values = [line[name]["ranks"] for line in found if line.get(name)]
        if any(len(of_ranks) != len(start["ranks"]) for of_ranks in values):
            raise ValueError(f"{name} has another number of ranks than the mesh")
        if values:
            over_lines = max if name == PEAK else median
            figures[name] = [over_lines(map(float, of_rank)) for of_rank in zip(*values)]
    n_profiled = sum(bool(line.get("own_s")) for line in found)
    return RankTable(start["mesh"], start["ranks"], figures, n_profiled)
