"""How a run saves and restores."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from stackproof.contracts.subject import Checkpoints, SavedCheckpoint
from stackproof.subject.run import RunParts, small_run, tiny_run
from stackproof.subject.training import RunTrainee
from stackproof.train import checkpoint
from stackproof.train.state import TrainState, build_state


class RunCheckpoints(RunParts, Checkpoints):
    """By the run's own writer and loader."""

    @cached_property
    def _tiny(self) -> TrainState:
        """One state for all saves of a check: what is judged is what happens to files."""
        return build_state(tiny_run(self.cfg), self.dataset, self.device)

    def save_small(self, root: Path, step: int) -> None:
        self._tiny.step = step
        self._save(self._tiny, root)

    def load_step(self, root: Path) -> int:
        return checkpoint.load(checkpoint.find(root)).state["step"]

    def save(self, trainee: RunTrainee, root: Path) -> None:
        self._save(trainee.state, root)

    def resume(self, root: Path) -> RunTrainee:
        state = build_state(small_run(self.cfg), self.dataset, self.device)
        with torch.no_grad():
            checkpoint.restore(state, checkpoint.load(checkpoint.find(root)))
        return RunTrainee(state)

    def _save(self, state: TrainState, root: Path) -> None:
        document = checkpoint.state_document(
            state,
            tokenizer_sha256=self.dataset.tokenizer.sha256,
            vocab_size=self.vocab_size,
            gates={},
            record="preflight",
        )
        checkpoint.save(root, state, document)


@dataclass(frozen=True)
class WrittenCheckpoint(SavedCheckpoint):
    """A step folder, and the checksums of the state that it was captured from."""

    folder: Path
    step: int
    live_checksums: Mapping[str, int]
