"""How a run saves and restores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stackproof.contracts.subject import Checkpoints, SavedCheckpoint
from stackproof.subject.run import RunParts
from stackproof.subject.training import RunTrainee
from stackproof.train import checkpoint


class RunCheckpoints(RunParts, Checkpoints):
    """By the run's own writer and loader."""

    def load_step(self, root: Path) -> int:
        return checkpoint.load(checkpoint.find(root)).state["step"]

    def save(self, trainee: RunTrainee, root: Path) -> None:
        document = checkpoint.state_document(
            trainee.state,
            tokenizer_sha256=self.dataset.tokenizer.sha256,
            vocab_size=self.vocab_size,
            gates={},
            record="preflight",
        )
        checkpoint.save(root, trainee.state, document)

    def resume(self, root: Path) -> RunTrainee:
        state = self.build()
        with torch.no_grad():
            checkpoint.restore(state, checkpoint.load(checkpoint.find(root)))
        return RunTrainee(state)


@dataclass(frozen=True)
class WrittenCheckpoint(SavedCheckpoint):
    """A step folder, and the checksums of the state that it was captured from."""

    folder: Path
    step: int
    live_checksums: Mapping[str, int]
