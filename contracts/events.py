"""What happens inside a run, as runtime gates see it.
All numbers are plain Python values, read off the device by the caller.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Started:
    """A run begins or continues after `step`.
    `plan` holds what was declared: peak_lr, peak_lrs, schedule, max_steps, …
    """

    step: int
    plan: Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class BatchDrawn:
    """The data of one optimizer step was drawn.
    `cursor_before/after` count samples over the whole run.
    """

    step: int
    cursor_before: int
    cursor_after: int
    sample_ids: tuple[int, ...]
    epoch: int
    n_tokens: int
    sources: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTaken:
    """One optimizer step. Norms are global L2; `grad_norm` is before clipping,
    `clipped_grad_norm` re-measured after it.

    `expert_shares` holds per layer with experts the share (0-1) of the step's choices that went to
    each, before any is dropped. `group_lrs` holds the learning rate by group as it stands in the
    optimizer.
    """

    step: int
    loss_nats: float
    grad_norm: float
    clipped_grad_norm: float
    max_grad_norm: float
    lr: float
    n_valid_tokens: int
    n_expected_tokens: int
    tokens_seen: int
    wall_s: float
    flops: float
    peak_flops: float
    changed_tensor_frac: float
    overflow_retries: int = 0
    expert_shares: tuple[tuple[float, ...], ...] = ()
    group_lrs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A step was computed twice from one state.
    `differing` names what of the `n_compared` results was not the same to the bit.
    """

    step: int
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Rows that an evaluation scores: how many, how many different ones, which share (0-1) of their
    passages is in training, and over which share of the held-out split they reach from the first to
    the last.
    """

    n_rows: int
    n_distinct: int
    found_in_training_frac: float
    reach_frac: float = 1.0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out evaluation. `batch_nats` are per-batch mean losses over the same batches every time.

    `train_loss_nats` is the run's exponential mean of the training loss; `pretrained` says that the
    weights did not begin here. `best_step` and `best_loss_nats` are the best evaluation so far,
    this one included, as the run remembers it. `rows()` looks at what is scored; it reads the
    training split, and is asked once.
    """

    step: int
    loss_nats: float
    bits_per_byte: float
    batch_nats: tuple[float, ...]
    batch_hash: str
    previous_loss_nats: float | None
    random_loss_nats: float
    train_loss_nats: float | None = None
    pretrained: bool = False
    best_step: int | None = None
    best_loss_nats: float | None = None
    rows: Callable[[], HeldOutRows] | None = None


@dataclass(frozen=True, slots=True)
class Recited:
    """The model was given the first `prefix_tokens` of passages it was trained on,
    and went on with its most likely tokens.

    `n_recited` of `n_windows` passages came out word for word to their end; `matched_tokens` is how
    far it went on average. `held_out()` counts the same over `n_held_out` held-out passages, and is
    only asked where the first count is suspicious.
    """

    step: int
    n_windows: int
    n_recited: int
    prefix_tokens: int
    matched_tokens: float
    n_held_out: int
    held_out: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A text was drawn from the model for the audit; `language` chooses the word list.

    `loss_nats` is the model's own mean loss on it; `found_in_corpus()` says which share of its runs
    is in the training text, and is only asked where the loss is suspicious.
    """

    step: int
    text: str
    prompt: str = ""
    language: str = "en"
    loss_nats: float | None = None
    found_in_corpus: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of this step was given to its writer.
    A write that fails ends the run by itself.
    """

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run continued from a checkpoint."""

    step: int
    path: str
    cursor: int


@dataclass(frozen=True, slots=True)
class Looked:
    """An evaluation, a sample or a save is over.
    `differing` names what of the `n_compared` parts of the training state it changed.
    """

    step: int
    at: str
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The loop has ended; the last event of every run.
    `latest_step` and `best_step` are those of the folders that the pointers name.
    """

    step: int
    status: str
    latest_step: int | None = None
    best_step: int | None = None


Event = (
    Started
    | BatchDrawn
    | StepTaken
    | Recomputed
    | Evaluated
    | Recited
    | Sampled
    | Saved
    | Looked
    | Resumed
    | Finished
)
