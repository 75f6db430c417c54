"""Who watches a run: the terminal, a log, a test. Every method does nothing by default."""

from pathlib import Path
from typing import Any

from contracts.gate import Verdict
from spec.gates import Gate
from spec.records import Record


class Listener:
    """Receives what happens; never decides anything."""

    def on_phase(self, name: str) -> None: ...

    def on_opened(self, cfg: Any, dataset: Any, n_params: int, run_dir: Path) -> None: ...

    def on_preflight(self, gate: Gate, verdict: Verdict, seconds: float) -> None: ...

    def on_step(self, line: dict[str, Any], max_steps: int) -> None: ...

    def on_evaluation(self, step: int, result: Any, decision: Any) -> None: ...

    def on_sample(self, step: int, prompt: str, text: str, score: float) -> None: ...

    def on_saved(self, step: int, folder: Path) -> None: ...

    def on_event(self, message: str) -> None: ...

    def on_finished(self, record: Record, run_dir: Path) -> None: ...
