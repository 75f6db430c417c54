"""What a gate judges: a trainer and its run, as typed parts that an adapter offers.

A check receives one `Subject`. Each of its parts is an interface below; a trainer is adapted once,
by subclasses of those that it can offer. A member that an adapter leaves out raises NotOffered, and
the gate's verdict is `not_run` with the name of the missing capability.

B batch, T tokens, D d_model, V vocab, R rows (tokens), E experts, L layers, k experts of a token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    import numpy as np
    import torch
    from torch import Tensor, nn


T = TypeVar("T")


class NotOffered(Exception):
    """A check needs a capability that the trainer does not offer."""

    def __init__(self, capability: str):
        super().__init__(f"the trainer does not offer {capability}")
        self.capability = capability


def capability(method: Callable) -> Callable:
    """Mark a method of an interface. Called on an adapter that does not override it, it raises
    NotOffered.
    """
    name = method.__qualname__

    @wraps(method)
    def refuse(self, *args, **kwargs):
        raise NotOffered(name)

    refuse.not_offered = True
    return refuse


class value(Generic[T]):
    """Mark a value of an interface. An adapter sets an attribute of this name, or defines a
    property; without either, reading it raises NotOffered.
    """

    def __init__(self, member: Callable[..., T]):
        self.name, self.__doc__ = member.__qualname__, member.__doc__

    def __get__(self, part: object, owner: type) -> T:
        if part is None:
            return self
        raise NotOffered(self.name)


def offers(method: Callable) -> bool:
    """Whether an adapter overrides a method of an interface: `offers(subject.model.logits)`."""
    return not getattr(method, "not_offered", False)


def offered(read: Callable[[], T]) -> T | None:
    """What reading a value gives; None where the adapter does not offer it."""
    try:
        return read()
    except NotOffered:
        return None


# --- what is declared -----------------------------------------------------------------------------


class Architecture(TypedDict):
    """The resolved `model` section that spec/architecture.py gives shapes and initial laws of. A
    variant is a mapping with its `kind` and settings.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    init_std: float
    dropout: float
    tied_head: bool
    attention: Mapping[str, object]
    ffn: Mapping[str, object]
    norm: Mapping[str, object]
    positions: Mapping[str, object]
    depth: Mapping[str, object]


class Schedule(TypedDict):
    """A learning-rate schedule: warm-up from 0, then `kind` down to `final_lr_frac` of the peak;
    `decay_from` is where its curve begins, peak or start.
    """

    kind: str
    warmup_steps: int
    final_lr_frac: float
    decay_from: str


class UpdateLaw(TypedDict, total=False):
    """How an optimizer updates one parameter. `rule` is adamw, with betas and eps; muon, with what
    follows them; or the class of another optimizer.
    """

    rule: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    nesterov: bool
    ns_steps: int
    lr_scale: str
    dtype: str


class Declared:
    """What the configuration of a run promises."""

    @value
    def architecture(self) -> Architecture:
        """The model's configuration. Such a model is attention, whose masked scores weigh exactly
        0, and maps of single tokens: logits of one shape do not depend on what they may not read,
        bit for bit, unless a router groups tokens.
        """

    @value
    def n_parameters(self) -> int:
        """Number of parameters by the formula of spec/formulas.py."""

    @value
    def tied_head(self) -> bool:
        """Whether head and embedding are declared to be one tensor."""

    @value
    def dtype(self) -> str:
        """Compute precision: float32, bfloat16 or float16."""

    @value
    def schedule(self) -> Schedule:
        """The learning-rate schedule."""

    @value
    def max_steps(self) -> int:
        """Number of optimizer updates."""

    @value
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update, over all micro-batches."""

    @value
    def max_grad_norm(self) -> float:
        """Global L2 norm that gradients are clipped to."""

    @capability
    def update_law(self, name: str, parameter: Tensor) -> UpdateLaw:
        """How one parameter is updated."""

    @value
    def flops_per_step(self) -> float:
        """Floating-point operations of one update by the formula, attention included."""

    @value
    def attention_flops_per_step(self) -> float:
        """Those of attention's products of positions with positions."""


# --- data -----------------------------------------------------------------------------------------


class Rows(Protocol):
    """Packed rows (R, T) int64; a label of −100 does not count."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray | None


class TokenStream(Protocol):
    """The tokens of a split in its shards, and the rows that are cut from them."""

    n_tokens: int
    n_bytes: int
    paths: Sequence[Path]
    tokenizer_sha256: Sequence[str]
    document_hashes: np.ndarray
    document_starts: np.ndarray

    def token_range(self, start: int, stop: int) -> np.ndarray: ...
    def rows(self, numbers: np.ndarray, seq_len: int) -> Rows: ...
    def n_windows(self, seq_len: int) -> int: ...
    def shard_windows(self, seq_len: int) -> Sequence[int]: ...
    def dropped_tokens(self, seq_len: int) -> int: ...
    def padding(self, seq_len: int) -> int: ...


class Manifest(TypedDict):
    """What a build of a data set wrote down. `decontamination` is None without evaluation sets."""

    config: Mapping[str, object]
    filters: Mapping[str, object]
    sources: Sequence[Mapping[str, object]]
    splits: Mapping[str, Mapping[str, object]]
    tokenizer: Mapping[str, object]
    decontamination: Mapping[str, object] | None


class ContaminationScanner(Protocol):
    """Finds passages of evaluation texts in other texts."""

    n_grams: int

    def finds(self, text: str) -> bool: ...


class Corpus:
    """A data set that has been built: its splits, its manifest and the functions that made it."""

    @value
    def splits(self) -> Mapping[str, TokenStream]:
        """Token streams by name: train, validation."""

    @value
    def manifest(self) -> Manifest:
        """What the build wrote down."""

    @capability
    def sample_documents(self, frac: float, minimum: int) -> Iterator[tuple[str, str]]:
        """(source, text) of a share (0-1) of each source's training documents, at least
        `minimum`, decoded from the shards.
        """

    @value
    def held_out_texts(self) -> Sequence[str]:
        """The beginnings of some documents of the validation split."""

    @capability
    def rejection(self, text: str, languages: Sequence[str]) -> str | None:
        """The filter rule that rejects a text; None where all keep it."""

    @capability
    def chat_text(self, turns: list[dict[str, str]]) -> str | None:
        """A chat, given as turns with role and content, as the text that is tokenized; None where
        the chat is not used.
        """

    @capability
    def near_repeats(self, texts: list[str]) -> list[bool]:
        """Which of the texts deduplication drops as near repeats of an earlier one."""

    @capability
    def contamination_scanner(self, texts: Iterable[str] | None) -> ContaminationScanner:
        """The scanner of decontamination for these texts; None: as it was stored for the declared
        evaluation sets.
        """


class DrawnBatch(Protocol):
    """A micro-batch as MicroBatch has it; `epoch` is that of its last row."""

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    sample_ids: Sequence[int]
    epoch: int


class RowLoader(Protocol):
    """A data loader at a position: `cursor` counts the rows of all ranks that were drawn."""

    cursor: int
    stream: TokenStream

    def next_batch(self) -> DrawnBatch: ...


class DataLoader:
    """Rows of the training split as a run reads them."""

    @value
    def seq_len(self) -> int:
        """Tokens of a row."""

    @value
    def n_rows(self) -> int:
        """Rows of one epoch."""

    @capability
    def fresh(
        self,
        *,
        rows: int,
        n_rows: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        on_exhausted: str = "wrap",
    ) -> RowLoader:
        """A data loader over the first `n_rows` rows (None: all) with batches of `rows` rows, at a
        position; `seed` is None for the run's own. `on_exhausted` is wrap or error.
        """


class Source(Protocol):
    """A source of the mixture: its windows in the training split, its weight and bounds (0-1)."""

    name: str
    first: int
    n_windows: int
    weight: float
    cap: float
    floor: float


class Draws(Protocol):
    """Source, window and epoch of samples, int64 (n,)."""

    sources: np.ndarray
    windows: np.ndarray
    epochs: np.ndarray


class SamplerOrder(Protocol):
    """Which window each sample of a run is. Samples are decided in order, then read."""

    sources: Sequence[Source]

    def decide(self, before: int, after: int) -> None: ...
    def at(self, numbers: np.ndarray) -> Draws: ...
    def counts(self, after: int) -> np.ndarray: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: Mapping) -> list[str]: ...


class BanditOrder(SamplerOrder, Protocol):
    """An order that learns from the held-out loss of each source; `focus` is the source of the
    turn.
    """

    focus: int

    def reward(self, losses_nats: Mapping[str, float]) -> None: ...


class Curriculum:
    """The order in which sources are mixed."""

    @capability
    def sampler_order(self) -> SamplerOrder:
        """The sampler order of this run, at its beginning."""

    @capability
    def bandit(self, caps: Mapping[str, float]) -> BanditOrder:
        """A bandit order over sources of these names and caps, of equal size and weight, without
        floors.
        """

    @value
    def warmup_rows(self) -> int:
        """Rows before the bandit chooses."""

    @value
    def warmup_sources(self) -> Sequence[str]:
        """Sources drawn in that time."""

    @value
    def declared_shares(self) -> Mapping[str, tuple[float, float, float]]:
        """(weight, cap, floor) by source, as the configuration has them."""


class Encoding(Protocol):
    """Ids of a text, and the number of characters that have none."""

    ids: Sequence[int]
    dropped_chars: int


class TextEncoder(Protocol):
    """What encodes. `token_bytes` is the number of UTF-8 bytes of each id."""

    eos_id: int
    token_bytes: np.ndarray

    def encode(self, text: str) -> Encoding: ...


class TextTokenizer(TextEncoder, Protocol):
    """What encodes and decodes."""

    vocab_size: int
    control_ids: frozenset[int]

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def literal(self, token_id: int) -> str: ...


class Tokenizer:
    """The tokenizer of a run."""

    @value
    def tokenizer(self) -> TextTokenizer:
        """The object that encodes and decodes."""

    @value
    def sha256(self) -> str:
        """Hash of its saved form, which manifest and shards name."""

    @value
    def n_ids(self) -> int:
        """Number of ids that it may give."""

    @value
    def special_ids(self) -> Mapping[str, tuple[int | None, int | Sequence[int] | None]]:
        """(tokenizer's id, model's id or ids) by name; None where one of them has none."""

    @capability
    def trained_merges(self, texts: Sequence[str], n: int) -> list[tuple[bytes, bytes]]:
        """The first `n` merges that training a BPE tokenizer on texts gives."""


# --- model ----------------------------------------------------------------------------------------


class NamedParameters(Protocol):
    """Anything that names its parameters as a module does."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


class Model:
    """The model that is trained, before its first update."""

    @value
    def module(self) -> nn.Module:
        """The run's own model. Leave it as it was."""

    @value
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @value
    def max_length(self) -> int:
        """Longest row, tokens; 0 where unknown."""

    @capability
    def logits(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) in the model's present mode, on its device or on the CPU; the same
        random numbers in every call. `mask_BT` is an attention mask, 1 for tokens that may be read.
        """

    @property
    def takes_mask(self) -> bool:
        """Whether `logits` takes an attention mask."""
        return False

    @property
    def takes_labels(self) -> bool:
        """Whether `logits` takes labels."""
        return False

    @capability
    def training(self, mode: bool) -> AbstractContextManager[None]:
        """The whole model in training or evaluation mode; everything is put back."""

    @capability
    def packed_logits(self, ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """As `logits`, of rows that hold several documents; each change of the id along a row
        begins one. Gradients reach the output of `embedding`.
        """

    @capability
    def fresh(self, *, n_layers: int | None = None, min_dropout: float = 0.0) -> nn.Module:
        """Another model of the run at step 0, on its device: with `n_layers` layers (None: all) and
        at least this dropout.
        """

    @value
    def embedding(self) -> nn.Module:
        """The token embedding."""

    @value
    def head_weight(self) -> Tensor:
        """Weight of the output head (V, D)."""

    @value
    def rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine (T, J) up to the longest row; None without rotary positions."""

    @value
    def attention_layers(self) -> Sequence[Callable[[Tensor, Tensor | None], Tensor]]:
        """Attention of each layer: (x_BTD, document_ids_BT or None) to (B, T, D)."""


class ExpertFunctions(Protocol):
    """The functions that a mixture of experts is computed by."""

    def route(
        self, logits_RE: Tensor, top_k: int, bias_E: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(experts (R, k), weights (R, k), probabilities (R, E)); `bias_E` is added to the
        probabilities for the choice alone.
        """

    def dispatch(
        self,
        x_RD: Tensor,
        experts_Rk: Tensor,
        weights_Rk: Tensor,
        experts: nn.ModuleList,
        capacity: int | None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send tokens through their experts and add up what these return: (y (R, D), tokens that
        each expert took (E,), choices dropped).
        """

    def balance(self, probs_RE: Tensor, experts_Rk: Tensor, /) -> Tensor:
        """The balance loss, shape ()."""

    def update_selection_bias(
        self, model: nn.Module, loads_LE: Sequence[Tensor], rate: float, /
    ) -> None:
        """Move the selection biases after an update."""


class Experts:
    """The parts of a mixture of experts."""

    @value
    def functions(self) -> ExpertFunctions:
        """Routing, dispatch and balance, as a module or an object."""

    @capability
    def layer(self) -> nn.Module:
        """A fresh layer of experts (B, T, D) to (B, T, D), with router, experts and
        selection_bias.
        """

    @capability
    def model(self, balance_weight: float) -> nn.Module:
        """A fresh model of the run whose balance loss has this weight, without dropout and without
        a limit of capacity.
        """


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one backward pass: ids and labels (B, T) int64, documents (B, T) or None. A label of
    −100 does not count. `sample_ids` are the numbers of the rows in the training split, of rows
    that a data loader drew.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None = None
    sample_ids: tuple[int, ...] = ()


class StepReport(Protocol):
    """What a trainer reports of one update. Norms are global L2."""

    step: int
    loss_nats: float
    grad_norm: float
    clipped_grad_norm: float
    group_lrs: Mapping[str, float]
    n_valid_tokens: int
    changed_tensor_frac: float
    applied: bool


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


# --- kernels and precision ------------------------------------------------------------------------


class Kernels:
    """The kernels and the compiled graph of a run."""

    @capability
    def observe_calls(self, observe: Callable[[str, str, Callable, tuple, Mapping], None]) -> None:
        """Compute the loss of one micro-batch in the run's own precision. Before each call of an
        operation, call `observe` with the operation, its chosen kernel, the function of this,
        and the positional and the keyword arguments.
        """

    @capability
    def head_loss(self, x_RD: Tensor, head_VD: Tensor, labels_R: Tensor) -> Tensor:
        """The sum of nats that the run's head computes from float32, differentiable."""

    @capability
    def small_head_chunks(self, n_rows: int, vocab_size: int) -> AbstractContextManager[None]:
        """Let heads that work in chunks take about `n_rows` rows at a time, with this vocabulary.
        Nothing else of them changes.
        """

    @capability
    def compiled_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """(loss in nats, gradient by name) of batch `i` (0 or 1) by the compiled graph, in training
        mode.
        """

    @capability
    def eager_step(self, i: int) -> tuple[float, Mapping[str, Tensor]]:
        """The same without compilation, from the same random state."""

    @capability
    def by_torch(self) -> AbstractContextManager[None]:
        """Compute every operation by torch's own kernel, which torch's counter of operations
        counts.
        """


class HalfPrecision:
    """The norm, the choice of experts and the loss of a run in half precision, as it calls them."""

    @value
    def dtype(self) -> torch.dtype:
        """bfloat16 or float16."""

    @capability
    def norm(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        """The declared norm with these gains and biases of 0."""

    @capability
    def route(self, logits_RE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(experts (R, k), weights (R, k), probabilities (R, E))."""

    @capability
    def loss(self, x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of nats."""


# --- evaluation, sampling, export -----------------------------------------------------------------


class TextScore(Protocol):
    """The score of a text. A dropped character is one without an id."""

    bits_per_byte: float
    bits_per_char: float
    total_nats: float
    bytes: int
    chars: int
    dropped_chars: int
    dropped_bytes: int


class BatchScore(Protocol):
    """The score of batches: `batch_nats` has the mean of each, `stderr_nats` is the standard error
    of their mean.
    """

    loss_nats: float
    total_nats: float
    n_bytes: int
    bits_per_byte: float
    batch_nats: Sequence[float]
    stderr_nats: float


class Evaluation:
    """How held-out text is scored."""

    @capability
    def score_text(self, model: nn.Module, tokenizer: TextEncoder, text: str) -> TextScore:
        """Score of a text longer than one window. The model gives logits (B, T, V) from ids
        (B, T).
        """

    @capability
    def score_batches(self, model: nn.Module, batches: Sequence[MicroBatch]) -> BatchScore:
        """Score of batches under the run's tokenizer."""

    @capability
    def held_out_batches(self, n_rows: int, n_max: int) -> Sequence[MicroBatch]:
        """At most `n_max` batches of `n_rows` rows each, spread over the held-out split."""


class StopDeclaration(TypedDict):
    """The configuration of a stop rule: patience, with what follows, or never."""

    kind: str
    patience: int
    min_evaluations: int
    z: float
    min_delta_nats: float
    expected_gain_nats: float


class StopDecision(Protocol):
    """Whether a run stops, and how many evaluations it has waited for a gain."""

    stop: bool
    wait: int


class StopRule(Protocol):
    """A stop rule with its memory."""

    def update(self, batch_nats: Sequence[float], /) -> StopDecision: ...


class Stopping:
    """The rule that ends a run early."""

    @capability
    def rule(self) -> StopRule:
        """A fresh stop rule of the run."""

    @value
    def declared(self) -> StopDeclaration:
        """Its configuration."""

    @value
    def n_eval_batches(self) -> int:
        """Held-out batches of each evaluation."""

    @value
    def batch_rows(self) -> int:
        """Rows of a held-out batch."""


class Sampling:
    """How text is generated."""

    @capability
    def logits(self, model: nn.Module, ids_BT: Tensor, cache: object | None = None) -> Tensor:
        """Logits (B, T, V) in evaluation mode of rows, or of the new tokens of rows whose earlier
        keys and values are in `cache`.
        """

    @capability
    def cache(self, batch_size: int) -> object:
        """An empty key-value cache of the run's model."""

    @capability
    def token_probs(
        self,
        logits_V: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seen: Sequence[int] = (),
    ) -> Tensor:
        """Probabilities (V,) of the next token after the tokens `seen`; top_k 0 and top_p 1 keep
        all.
        """

    @capability
    def pick(self, probs_V: Tensor, uniforms_R: Tensor) -> Tensor:
        """The token of each uniform number."""

    @capability
    def generate(
        self,
        model: nn.Module,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
        use_cache: bool = True,
    ) -> list[int]:
        """New tokens after `ids`, one uniform float64 of `generator` for each."""


class LanguageModel(Protocol):
    """A model as one side of a comparison."""

    def logits(self, ids_BT: Tensor, last: int) -> Tensor:
        """Logits of the last positions, (B, ≤ last, V) float32."""

    def continuation(self, ids: Sequence[int], n_new: int) -> list[int]:
        """The next tokens, the most likely one each time."""


class Exported:
    """A folder that was exported or imported, and both sides of its comparison."""

    @value
    def folder(self) -> Path: ...

    @value
    def live_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shapes of the model's tensors in memory."""

    @value
    def dtype(self) -> str:
        """Declared dtype of the stored tensors, as safetensors names it."""

    @value
    def ours(self) -> LanguageModel:
        """The model in memory."""

    @value
    def theirs(self) -> LanguageModel:
        """What the other library has read from the folder."""

    @value
    def their_complaints(self) -> str:
        """What the other library reports while loading: missing or unexpected keys."""

    @value
    def compared_sha256(self) -> Mapping[str, str]:
        """Hash of each weight file when the other library read it for the comparison."""

    @value
    def max_length(self) -> int:
        """Longest row, tokens."""

    @value
    def vocab_size(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trainer and its run, as typed parts. A part that an adapter leaves out offers nothing."""

    declared: Declared = field(default_factory=Declared)
    corpus: Corpus = field(default_factory=Corpus)
    data_loader: DataLoader = field(default_factory=DataLoader)
    curriculum: Curriculum = field(default_factory=Curriculum)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    experts: Experts = field(default_factory=Experts)
    training: Training = field(default_factory=Training)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    saved: SavedCheckpoint = field(default_factory=SavedCheckpoint)
    kernels: Kernels = field(default_factory=Kernels)
    half_precision: HalfPrecision = field(default_factory=HalfPrecision)
    evaluation: Evaluation = field(default_factory=Evaluation)
    stopping: Stopping = field(default_factory=Stopping)
    sampling: Sampling = field(default_factory=Sampling)
    exported: Exported = field(default_factory=Exported)
