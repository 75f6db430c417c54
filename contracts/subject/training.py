"""How a run trains: a small trainee and its steps, and how a state is saved and loaded.

B batch, T tokens, D d_model, V vocab
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    import torch
    from torch import Tensor, nn

    from stackproof.contracts.subject.model import NamedParameters


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one backward pass: ids and labels (B, T) int64, documents (B, T) or None. A label of
    −100 does not count. A negative document is padding. `sample_ids` are the numbers of the rows in
    the training split, of rows that a data loader drew.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None = None
    sample_ids: tuple[int, ...] = ()


class StepReport(Protocol):
    """What a trainer reports of one update. Norms are global L2. Of experts, by layer: the share of
    choices of each, and that of choices which found no room.
    """

    step: int
    loss_nats: float
    grad_norm: float
    clipped_grad_norm: float
    group_lrs: Mapping[str, float]
    n_valid_tokens: int
    changed_tensor_frac: float
    applied: bool
    expert_shares: Sequence[Sequence[float]]
    dropped_choice_fracs: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class TraineeOptions:
    """How a trainee differs from the run. None: as the run has it.

    `first_row` is where its data begin, `updates_done` the step number it starts at. `exact`
    computes in float32 throughout, Muon's iteration included. `loss_scale` is what gradients are
    multiplied by in backward. `tiny` is a model of a few hundred parameters, for what judges files
    and not arithmetic.
    """

    exact: bool = False
    tiny: bool = False
    seed_offset: int = 0
    first_row: int = 0
    updates_done: int = 0
    max_grad_norm: float | None = None
    loss_scale: float | None = None


class ResidualBlock(Protocol):
    """A block of two branches, each added to the residual stream (B, T, D): the inputs of its
    norms are the stream before a branch, `attention` and `ffn` give what dropout is applied to.
    """

    attention_norm: nn.Module
    attention: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module

    def on_output(self, keep: Callable[[Tensor], None]) -> None:
        """From here on call `keep` with the stream behind both branches, before a gate of depth."""


class Trainee:
    """A training state made of the run's own parts, with few rows: model, optimizer, data, loss.
    It may be changed at will: nothing of the run depends on it.
    """

    @value
    def model(self) -> nn.Module:
        """The model, in training mode."""

    @value
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer; every group has a name."""

    @capability
    def draw(self) -> Sequence[MicroBatch]:
        """The micro-batches of the next update, from the run's data loader."""

    @capability
    def accumulate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean loss in nats over all labels that count; its gradient is left in `.grad`."""

    @capability
    def update(self, batches: Sequence[MicroBatch]) -> float:
        """Accumulate, clip and move, at the optimizer's present rate; returns the mean loss in
        nats.
        """

    @capability
    def step(self, batches: Sequence[MicroBatch]) -> StepReport:
        """One train step of the run: schedule, accumulation, clipping, update."""

    @capability
    def advance(self) -> float:
        """Draw and take one step, and change what an evaluation after it would change; returns the
        loss in nats.
        """

    @capability
    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Summed loss in nats with its graph, shape ()."""

    def idle_parameters(self) -> set[str]:
        """Names of the parameters of experts that no token of the last update was sent to."""
        return set()

    @capability
    def evaluate(self, batch: MicroBatch) -> float:
        """Mean loss in nats in evaluation mode, in the run's precision, without a gradient."""

    @capability
    def residual_blocks(self) -> Sequence[ResidualBlock]:
        """The blocks of the model, which run once in a step from here on."""

    @capability
    def digest(self) -> Mapping[str, object]:
        """Every part of the state as a hash or a number, taken without the code that saves:
        `weights.<parameter>`, `optim.<parameter>.<field>`, `rng.cpu`, `cursor` (rows drawn), …
        """


class Training:
    """How a run trains: fresh trainees, and its loss, clipping and optimizer by themselves."""

    @capability
    def trainee(self, options: TraineeOptions = TraineeOptions()) -> Trainee:
        """A fresh trainee at step 0."""

    @capability
    def trainee_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainee:
        """A trainee around another model, in its present mode, and another optimizer, in float32.
        It draws no data and takes no steps of a schedule: `accumulate` and `update` work.
        """

    @capability
    def make_optimizer(self, model: NamedParameters) -> torch.optim.Optimizer:
        """A new optimizer as the run has it, for these parameters."""

    @value
    def module(self) -> nn.Module:
        """The run's own module whose parameters are trained: the model, or one around it."""

    @value
    def optimizer(self) -> torch.optim.Optimizer:
        """The run's own optimizer, to be read only."""

    @capability
    def hidden_leaves(self) -> Sequence[Tensor]:
        """Tensors that the logits give a gradient to, and that are neither a parameter of `module`
        nor in the optimizer.
        """

    @capability
    def cross_entropy_sum(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """The run's loss from logits, summed, nats."""

    @capability
    def mean_nats(self, logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor) -> float:
        """The loss that accumulation reports of a model that answers with these logits."""

    @capability
    def clip(self, model: NamedParameters) -> float:
        """Clip the gradients in `.grad` in place as a step does; returns their norm before."""


class Checkpoints:
    """Saving and restoring."""

    @capability
    def load_step(self, root: Path) -> int:
        """Load the newest checkpoint and return its step. Raises if it is damaged."""

    @capability
    def save(self, trainee: Trainee, root: Path) -> None:
        """Write a checkpoint of a trainee."""

    @capability
    def resume(self, root: Path) -> Trainee:
        """A trainee that continues from the newest checkpoint."""


class SavedCheckpoint:
    """One checkpoint that was written, and the live state that it must hold. `replica_checksums`
    are those of another process that holds the model, of one that differs if there is one.
    """

    replica_checksums: Mapping[str, int | str] | None = None

    @value
    def live_checksums(self) -> Mapping[str, int | str]:
        """A checksum of every tensor in memory at the save, by name, taken without the writer."""

    @value
    def reloaded_checksums(self) -> Mapping[str, int | str]:
        """The same of every tensor after loading it again."""

    @value
    def tied(self) -> tuple[bool, bool]:
        """Whether head and embedding are one tensor: (live, loaded again)."""

    @property
    def format_problems(self) -> Sequence[str]:
        """What is wrong in the written files beside the tensors, where the adapter reads them."""
        return ()
