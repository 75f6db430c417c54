"""The events of a training run, as runtime gates receive them. Every trainer is adapted to them
once. Numbers are plain Python values, already copied from the device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["training", "evaluation"]
SINCE_UPDATE = "time since the last update"  # a section of StateCompared


# --- the course of a run --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """A run begins, or continues after `step`. `plan` holds what the trainer declares, such as
    peak_lrs, schedule and max_steps; other trainers declare less than `stack train`.
    """

    step: int
    plan: Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Resumed:
    """The training state was loaded from a checkpoint. `cursor` counts the samples drawn so far."""

    step: int
    path: str
    cursor: int


@dataclass(frozen=True, slots=True)
class StateRestored:
    """The restored training state was compared with the saved one; `differing` names the parts
    that differ.
    """

    step: int
    differing: tuple[str, ...]
    compared: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of this step was handed to its writer. A failed write ends the run by itself."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class LogsRead:
    """The logs of a run were read back at its end: every logged step, the last line, and by step
    what is logged of evaluations and samples. `rows(step)` counts the rows of each source that are
    logged after a step; `sources` are the names, in the order of their numbers. This process logs
    every `log_every`-th step. `turns` are the logged ends of turns of a bandit, which come every
    `turn_every` steps; None without one. The files in `mismarked` have another length or hash than
    the marks that checkpoints keep of them. `unlogged` are gates with a verdict before step 1 or on
    a checkpoint that have no line.
    """

    step: int
    log_every: int
    mismarked: tuple[str, ...]
    steps: tuple[int, ...]
    last: Mapping[str, object]
    evaluations: Mapping[int, Mapping[str, float]]
    samples: Mapping[int, Mapping[str, object]]
    sources: tuple[str, ...]
    rows: Callable[[int], Mapping[str, int]]
    turns: tuple[int, ...] = ()
    turn_every: int | None = None
    unlogged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """The record of a run is ready to be written: its metrics and their sample counts by name, and
    the sha256 of its inputs by path. `read` are the files that describe the run's data set, hashed
    again; `held_out_bytes` is the size of its held-out split.

    `status` is how the run ends and `max_steps` the declared number of updates. `environment` is
    what the record states of the machine, `machine` what is read of it now. `outputs` are the
    bytes of the files that the record names by path, `saved` those of the latest checkpoint on the
    disk. `facts` are metrics of the data set and the model, read again.
    """

    step: int
    status: str
    max_steps: int
    metrics: Mapping[str, float | str]
    counts: Mapping[str, int | None]
    inputs: Mapping[str, str]
    read: Mapping[str, str]
    held_out_bytes: int
    environment: Mapping[str, object]
    machine: Mapping[str, object]
    outputs: Mapping[str, int]
    saved: Mapping[str, int]
    facts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Finished:
    """The training loop has ended; the last event of a run. `latest_step` and `best_step` are
    those of the folders that the checkpoint pointers name.
    """

    step: int
    status: str
    latest_step: int | None = None
    best_step: int | None = None


@dataclass(frozen=True, slots=True)
class StateCompared:
    """Training state was compared before and after a section that must not change it: an
    evaluation, a sample, a save or a trace, or all between two updates. `differing` names what of
    the `n_compared` parts changed.
    """

    step: int
    section: str
    n_compared: int
    differing: tuple[str, ...]


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchDrawn:
    """The data loader drew the data of one optimizer step. `cursor_before` and `cursor_after` count
    samples over the whole run; `sources` and `epochs` have one entry per row.
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
class ModelInput:
    """Statistics of one training batch, taken before the model's forward pass. `max_length` and
    `embedding_rows` are 0 where unknown.

    `n_stops` counts stop tokens that follow a learned token and are not padding, `n_stops_learned`
    those of them that have a label. `n_left_padded` counts rows that begin with padding which no
    attention mask marks. `n_places` counts position ids that follow another token, `n_places_up`
    those of them that are one more than the one before.
    """

    step: int
    n_rows: int
    length: int
    max_length: int
    min_id: int
    max_id: int
    embedding_rows: int
    n_labels: int
    n_valid: int
    n_stops: int = 0
    n_stops_learned: int = 0
    n_padding_labels: int = 0
    n_left_padded: int = 0
    n_places: int = 0
    n_places_up: int = 0


@dataclass(frozen=True, slots=True)
class IdsRead:
    """`n_tokens` ids of the batches of one phase were decoded and encoded again by the tokenizer
    that the trainer was given; `n_same` of them came again.
    """

    step: int
    phase: Phase
    n_tokens: int
    n_same: int


@dataclass(frozen=True, slots=True)
class RowHashes:
    """Hashes of the rows of one forward pass; equal rows have equal hashes. Short rows are left
    out. `epoch` is None where it is not known, and for rows that were not drawn again.
    `set_declared`: the trainer declares its held-out rows, so that each evaluation has the same.
    """

    step: int
    phase: Phase
    rows: tuple[int, ...]
    epoch: int | None = None
    set_declared: bool = False


# --- one optimizer step ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModuleModes:
    """Modes of the model's modules in one phase: `wrong` names those in the mode of the other
    phase. `repeat_abs` is the largest difference between the logits of two evaluations of one
    batch, None where the batch was evaluated once. `draws_repeated`: a training pass begins with
    the random state of one of the last passes, so that its dropout has the same masks.
    """

    step: int
    phase: Phase
    wrong: tuple[str, ...]
    repeat_abs: float | None = None
    draws_repeated: bool = False


@dataclass(frozen=True, slots=True)
class LossMeasured:
    """The loss of one optimizer step, read off its logits, or what enters the head, and their
    gradient: the mean over the positions that were measured, under a vocabulary of `vocab_size`
    ids. NaN where no position could be measured.

    `n_learned` positions of all micro-batches have a gradient, `n_judged` were inspected one by
    one. At `n_off_target` of them the target is not the next token; `offset` is the distance of the
    most frequent other target (-1: neither 0, 1 nor 2, or no gradient). `weight_min` and
    `weight_max` are the weights of inspected positions in units of 1/N, N the number of tokens to
    learn in this step. Where rounding weighs much they are means over groups of positions;
    `single_min` and `single_max` are those of single ones. `n_masked_learned` counts positions that
    have a gradient although label or mask exclude them. `absolute`: weights can be compared with
    1/N, as within one process. `half`: logits or gradients have a type of two bytes.

    Where every position is measured, `reported_nats` is the loss that the trainer reports for the
    step. `n_changed_rows` counts drawn rows that entered the model with other tokens or documents,
    not at all, or once more; None where rows are not compared.
    """

    step: int
    mean_nats: float
    n_learned: int
    vocab_size: int
    n_judged: int = 0
    n_off_target: int = 0
    offset: int = 1
    n_masked_learned: int = 0
    weight_min: float = math.nan
    weight_max: float = math.nan
    single_min: float = math.nan
    single_max: float = math.nan
    absolute: bool = True
    half: bool = False
    reported_nats: float = math.nan
    n_changed_rows: int | None = None


@dataclass(frozen=True, slots=True)
class GradientsAccumulated:
    """Gradients between the backward passes of one step and its update. Emitted before every
    update, and without one when there are many more backward passes than usual.

    `stale_norm` is the gradient norm before the first backward pass. `lost` counts backward passes
    after which gradients changed before the next. `factor_spread` is how much the factor between
    the last backward pass and the update differs among tensors, relative to the largest. `usual` is
    the largest number of backward passes of an earlier update, 0 before the first.
    """

    step: int
    micro_steps: int
    stale_norm: float
    lost: int
    factor_spread: float
    usual: int = 0


@dataclass(frozen=True, slots=True)
class StepTaken:
    """One optimizer step. Norms are global L2; `grad_norm` is before clipping, `clipped_grad_norm`
    measured again after it.

    `expert_shares` holds, per layer with experts, the share (0-1) of the step's choices of each
    expert, before any is dropped; `dropped_choice_fracs`, per such layer, the share of choices that
    found no room in their expert. `sample_ids` are the windows trained on.
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
    overflow_retries: int = 0
    expert_shares: tuple[tuple[float, ...], ...] = ()
    dropped_choice_fracs: tuple[float, ...] = ()
    sample_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RatesUsed:
    """Learning rates of one update by parameter group, as the optimizer held them. `declared` are
    those of the scheduler's own closed form, empty where the gate has the schedule or no form is
    known.

    `ticks` counts the scheduler's steps and `updates` the optimizer's since the run was first
    observed; both are 0 for a schedule that is a function of the step number. `epochs` counts the
    epochs since then, 0 where the trainer states none. `horizon` is the tick at which the schedule
    ends and `micro_batches` the number that the whole run has; both are 0 where they are unknown or
    an update has one micro-batch.
    """

    step: int
    used: Mapping[str, float]
    declared: Mapping[str, float] = field(default_factory=dict)
    ticks: int = 0
    updates: int = 0
    epochs: int = 0
    horizon: int = 0
    micro_batches: int = 0


@dataclass(frozen=True, slots=True)
class WeightsUpdated:
    """What one update changed. `changed_frac` is the share (0-1) of changed tensors among those
    that the update applies to; `moved_frac` that among tensors with a visible learning rate, of
    which some may have no gradient. Each is None where it was not measured. `lr` is the declared
    learning rate.

    `frozen_changed` names changed tensors that require no gradient. `longest_still` is the longest
    run of updates in which a tensor with a gradient has not changed, `stillest` that tensor.
    `uphill` is the cosine of update and gradient at an optimizer's first update that changes
    anything, None at all others. Its sign is turned where the optimizer maximizes, so that above 0
    is always the wrong way. `unknown` is why the direction of that update cannot be known.
    `miscounted` names parameters for which the optimizer's own counter of updates did not go up by
    one. `lost_frac` is the share (0-1) of the entries of one matrix that have a gradient and did
    not change, None where none was looked at.
    """

    step: int
    lr: float
    changed_frac: float | None = None
    moved_frac: float | None = None
    frozen_changed: tuple[str, ...] = ()
    longest_still: int = 0
    stillest: str = ""
    uphill: float | None = None
    unknown: str = ""
    miscounted: tuple[str, ...] = ()
    lost_frac: float | None = None


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The gradients of a step were computed twice from one state. `differing` names those of the
    `n_compared` gradients that differ in a bit.
    """

    step: int
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ActivationsTraced:
    """Statistics of the activations of one step: by point n, mean, std, absmax and frac_nonfinite.

    `layers.3.scores` holds the largest attention score of every query and head,
    `layers.3.entropy` the entropy of the attention weights in nats.
    """

    step: int
    points: Mapping[str, Mapping[str, float]]


# --- evaluation and samples -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """The rows that an evaluation scores: their number, the number of distinct ones, the share
    (0-1) of their passages that occurs in the training split, the share of the held-out split
    between the first and the last of them, and how many differ in a token, a label or a document
    from that split.
    """

    n_rows: int
    n_distinct: int
    found_in_training_frac: float
    reach_frac: float = 1.0
    n_wrong: int = 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out evaluation. `batch_nats` are per-batch mean losses over the same batches every time.

    `train_loss_nats` is the run's exponential mean of the training loss; `pretrained`: the weights
    did not begin here. `best_step` and `best_loss_nats` are the best evaluation so far, this one
    included, as the run remembers it. `rows()` compares scored rows with the training split, and
    `compressed()` returns the bits per byte that a compressor needs for them after training text;
    both are slow, and called once or where they are needed.
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
    compressed: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Recited:
    """Counts of passages of which the first `prefix_tokens` were given.

    `n_recited` of `n_windows` training passages were continued word for word to their end;
    `matched_tokens` is the mean length of the match. `held_out()` counts recited passages among
    `n_held_out` held-out ones; it is called only where the first count is suspicious.
    """

    n_windows: int
    n_recited: int
    prefix_tokens: int
    matched_tokens: float
    n_held_out: int
    held_out: Callable[[], int]


@dataclass(frozen=True, slots=True)
class MemorizationMeasured:
    """The model continued the first half of training passages greedily, with the `reported` counts.

    `own`: the counts of the gate, from full forwards over passages that it selects; None: it has
    none. `half`: the model computes in half precision.
    """

    step: int
    reported: Recited
    own: Recited | None = None
    half: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """A text was sampled from the model; `language` selects the word list.

    `loss_nats` is the model's own mean loss on the text. `found_in_corpus()` returns the share of
    its spans that occurs in the training text; it is called only where the loss is suspicious.
    """

    step: int
    text: str
    prompt: str = ""
    language: str = "en"
    loss_nats: float | None = None
    found_in_corpus: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class TextDrawn:
    """A sampled text was compared with what its prompt, options and seed give. `distances` has one
    entry per token: in logits if `greedy`, else of the uniform number from the token's interval.
    `ended`: the last entry is of the end-of-text token that ended the text. `n_unfinished` counts
    tokens beyond those declared, negative for missing ones; `is_text` is whether the text is that
    of the tokens.
    """

    step: int
    distances: tuple[float, ...]
    greedy: bool
    ended: bool
    n_unfinished: int
    is_text: bool


@dataclass(frozen=True, slots=True)
class LossRescored:
    """A held-out batch was scored again after an evaluation, or a sample after it was drawn, by the
    model as it is: `reported_nats` is the mean that was reported, `own_nats` the new one. `half`:
    under autocast to a type of two bytes.
    """

    step: int
    what: str
    reported_nats: float
    own_nats: float
    half: bool


# --- a run on several ranks -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RanksJoined:
    """The ranks of a run were compared before its first step. `n_started` processes were started by
    the launcher, `n_ranks` are in the process group; `differing` names what of the `n_compared`
    parts of code, configuration, data, kernels and machine is not the same on all of them.
    """

    step: int
    n_ranks: int
    n_started: int
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StateDivided:
    """The weights and buffers that the ranks hold, assembled, were compared with those before they
    were divided.
    """

    step: int
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RowsDealt:
    """The rows that all data ranks have for a step, against those of its position in the order.
    `n_lost` rows of the order are on no rank, `n_repeated` are on more than one or are not of the
    step; `n_foreign` hold other tokens than their window; `n_unequal` ranks of a tensor group hold
    other rows than its first.
    """

    step: int
    n_rows: int
    n_lost: int
    n_repeated: int
    n_foreign: int
    n_unequal: int


@dataclass(frozen=True, slots=True)
class StepRepeated:
    """A step of all ranks was computed again by one process, from the same weights and rows.

    `errors` are relative: of `loss`, `grad_norm`, of the clipped `gradient` (the worst tensor,
    `worst`) and of the `update` that the optimizer makes of the gradients of all ranks. `counts`
    are (all ranks, one process) of valid labels, tokens and expert choices. `half`: half precision
    rounds other numbers on the ranks than in one process.
    """

    step: int
    n_compared: int
    errors: Mapping[str, float]
    worst: str
    counts: Mapping[str, tuple[int, int]]
    unknown: str = ""
    half: bool = False


@dataclass(frozen=True, slots=True)
class ReplicasCompared:
    """Parts of the state that more than one rank holds were compared: weights, buffers, moments,
    random state, learning rates and counters.
    """

    step: int
    n_compared: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EvaluationRepeated:
    """An evaluation or a sample of all ranks was computed again by one process. `n_texts` counts
    different texts among the ranks. `half` as in StepRepeated.
    """

    step: int
    what: Literal["evaluation", "sample"]
    rel_error: float
    n_texts: int = 1
    unknown: str = ""
    half: bool = False


@dataclass(frozen=True, slots=True)
class MasksCompared:
    """The dropout masks of a step were compared: of every row behind every branch, on the slice of
    it that a rank holds.

    `n_foreign` are not those of one process. `n_repeated` equal another of this step, or one of the
    step compared before; they are counted among `n_telling`, which keep and drop so many elements
    that none equals another by chance.
    """

    step: int
    n_masks: int
    n_foreign: int
    n_repeated: int
    n_telling: int


@dataclass(frozen=True, slots=True)
class RankSpeeds:
    """Operations per second of one product on each rank, measured at the same time."""

    step: int
    flops_per_s: tuple[float, ...]


Event = (
    Started
    | Resumed
    | StateRestored
    | Saved
    | Finished
    | BatchDrawn
    | ModelInput
    | RowHashes
    | ModuleModes
    | LossMeasured
    | GradientsAccumulated
    | StepTaken
    | RatesUsed
    | WeightsUpdated
    | Recomputed
    | ActivationsTraced
    | Evaluated
    | MemorizationMeasured
    | LossRescored
    | Sampled
    | TextDrawn
    | LogsRead
    | Recorded
    | StateCompared
    | RanksJoined
    | StateDivided
    | RowsDealt
    | StepRepeated
    | ReplicasCompared
    | EvaluationRepeated
    | RankSpeeds
    | MasksCompared
)
