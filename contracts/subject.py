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
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:  # commands that judge nothing answer without torch
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

    def __init__(self, member: Callable[[Any], T]):
        self.name, self.__doc__ = member.__qualname__, member.__doc__

    def __get__(self, part: Any, owner: type) -> T:
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


class Declared:
    """What the configuration of a run promises."""

    @value
    def architecture(self) -> Mapping[str, Any]:
        """The model's configuration: width, layers, variants, initial laws."""

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
    def schedule(self) -> Mapping[str, Any]:
        """The learning-rate schedule: kind, warmup_steps, final_lr_frac, …"""

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
    def update_law(self, name: str, parameter: Tensor) -> Mapping[str, Any]:
        """How one parameter is updated: rule (adamw or muon), lr, weight_decay and what else the
        rule needs.
        """

    @value
    def flops_per_step(self) -> float:
        """Floating-point operations of one update by the formula, attention included."""

    @value
    def attention_flops_per_step(self) -> float:
        """Those of attention's products of positions with positions."""


# --- data -----------------------------------------------------------------------------------------


class Corpus:
    """A data set that has been built: its splits, its manifest and the functions that made it."""

    @value
    def splits(self) -> Mapping[str, Any]:
        """Token streams by name: train, validation."""

    @value
    def manifest(self) -> Mapping[str, Any]:
        """What the build wrote down: sources, hashes, counts, filters, tokenizer."""

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
    def gram_set(self, texts: Iterable[str]) -> Any:
        """The n-grams of texts, as decontamination keeps them."""

    @capability
    def shares_gram(self, text: str, grams: Any) -> bool:
        """Whether decontamination finds one of the n-grams in a text."""

    @value
    def evaluation_grams(self) -> Any:
        """The n-grams of the declared evaluation sets; None if none were declared."""


class DataLoader:
    """Rows of the training split as a run reads them."""

    @value
    def seq_len(self) -> int:
        """Tokens of a row."""

    @value
    def n_rows(self) -> int:
        """Rows of one epoch."""

    @capability
    def fresh(self, *, n_rows: int | None = None, rows: int, **options: Any) -> Any:
        """A data loader over the first `n_rows` rows (default: all), from the beginning, with
        batches of `rows` rows. `options` override those of the run: seed, rank, world_size, cursor,
        on_exhausted.
        """


class Curriculum:
    """The order in which sources are mixed."""

    @capability
    def sampler_order(self) -> Any:
        """The sampler order of this run, at its beginning."""

    @capability
    def bandit(self, capped: str = "") -> Any:
        """A bandit order over the sources useful, list and other, without caps and floors; the cap
        of source `capped` is 0.
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


class Tokenizer:
    """The tokenizer of a run."""

    @value
    def tokenizer(self) -> Any:
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


class Model:
    """The model that is trained, before its first update."""

    @value
    def module(self) -> nn.Module:
        """The live model."""

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

    @property
    def bitwise_rows(self) -> bool:
        """Whether masked scores weigh exactly 0 and rows do not depend on each other, bit for bit,
        unless a router of the declared architecture computes tokens in other groups. The kernels of
        other trainers promise that to rounding only.
        """
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
    def fresh(self) -> nn.Module:
        """Another model of the run at step 0, on its device."""

    @capability
    def small(self, n_layers: int, dropout: float) -> nn.Module:
        """A model of the run with so many layers and at least this dropout, on its device."""

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


class Experts:
    """The parts of a mixture of experts."""

    @capability
    def route(self, logits_RE: Tensor, top_k: int, bias_E: Tensor | None) -> tuple:
        """(experts (R, k), weights (R, k), probabilities (R, E)); `bias_E` is added to the
        probabilities for the choice alone.
        """

    @capability
    def dispatch(
        self,
        x_RD: Tensor,
        experts_Rk: Tensor,
        weights_Rk: Tensor,
        experts: nn.ModuleList,
        capacity: int | None,
    ) -> tuple:
        """Send tokens through their experts and add up what these return: (y (R, D), tokens that
        each expert took (E,), choices dropped).
        """

    @capability
    def balance(self, probs_RE: Tensor, experts_Rk: Tensor) -> Tensor:
        """The balance loss, shape ()."""

    @capability
    def update_selection_bias(self, model: nn.Module, loads_LE: Any, rate: float) -> None:
        """Move the selection biases after an update."""

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
    multiplied by in backward.
    """

    exact: bool = False
    seed_offset: int = 0
    first_row: int = 0
    updates_done: int = 0
    max_grad_norm: float | None = None
    loss_scale: float | None = None


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

    @capability
    def logits(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """Logits (B, T, V)."""

    def idle_parameters(self) -> set[str]:
        """Names of the parameters of experts that no token of the last update was sent to."""
        return set()

    @capability
    def digest(self) -> Mapping[str, Any]:
        """Every part of the state as a hash or a number, taken without the code that saves:
        `weights.<parameter>`, `optim.<parameter>.<field>`, `rng.cpu`, counters, …
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
    def make_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """The run's optimizer for the parameters of anything that names them as a module does."""

    @value
    def live_optimizer(self) -> tuple[Sequence[tuple[str, Tensor]], Sequence[Mapping[str, Any]]]:
        """(named parameters of the live model, groups of its live optimizer)."""

    @capability
    def cross_entropy_sum(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """The run's loss from logits, summed, nats."""

    @capability
    def mean_nats(self, logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor) -> float:
        """The loss that accumulation reports of a model that answers with these logits."""

    @capability
    def clip(self, model: Any) -> float:
        """Clip the gradients in `.grad` of anything that names parameters as a module does, in
        place as a step does; returns their norm before.
        """

    @capability
    def branch_draws(self) -> Sequence[tuple[tuple[int, str], Tensor, Tensor]]:
        """Of real steps, in order: ((layer, attention or ffn), what the branch gave, what was added
        to the residual stream), both (T, D) float32.
        """


class Checkpoints:
    """Saving and restoring."""

    @capability
    def save_small(self, root: Path, step: int) -> None:
        """Write a checkpoint of a very small model, by the run's own writer."""

    @capability
    def load_step(self, root: Path) -> int:
        """Load the newest checkpoint and return its step. Raises if it is damaged."""

    @capability
    def save(self, trainee: Trainee, root: Path) -> None:
        """Write a checkpoint of a trainee."""

    @capability
    def resume(self, root: Path) -> Trainee:
        """A trainee that goes on from the newest checkpoint."""


class SavedCheckpoint:
    """One checkpoint that was written, and the live state that it must hold. `folder` is where, for
    the format of `stack train`; None for any other.
    """

    folder: Path | None = None

    @value
    def step(self) -> int:
        """The step at which it was written."""

    @value
    def live_checksums(self) -> Mapping[str, int]:
        """A checksum of every tensor in memory at the save, by name, taken without the writer: in
        the format of `stack train` crc32.
        """

    @value
    def reloaded_checksums(self) -> Mapping[str, int]:
        """The same of every tensor after loading it again."""

    @value
    def tied(self) -> tuple[bool, bool]:
        """Whether head and embedding are one tensor: (live, loaded again)."""


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


class Evaluation:
    """How held-out text is scored."""

    @capability
    def score_text(self, model: nn.Module, tokenizer: Any, text: str) -> Any:
        """Score of a text longer than one window: bits_per_byte, bits_per_char, total_nats, bytes,
        chars, dropped_chars and dropped_bytes. A tokenizer has `encode`, `eos_id` and
        `token_bytes`, a model gives logits (B, T, V) from ids (B, T).
        """

    @capability
    def score_batches(self, model: nn.Module, batches: Sequence[MicroBatch]) -> Any:
        """Score of batches under the run's tokenizer: loss_nats, total_nats, n_bytes,
        bits_per_byte, batch_nats and stderr_nats.
        """


class Stopping:
    """The rule that ends a run early."""

    @capability
    def rule(self) -> Any:
        """A fresh stop rule of the run: `update(batch_nats)` returns `stop` and `wait`."""

    @value
    def declared(self) -> Mapping[str, Any]:
        """Its configuration: kind, patience, min_evaluations, z, min_delta_nats and
        expected_gain_nats.
        """

    @value
    def paired_difference_std(self) -> float:
        """Spread over held-out batches of the loss difference between two evaluations, nats."""

    @value
    def n_eval_batches(self) -> int:
        """Held-out batches of each evaluation."""


class Sampling:
    """How text is generated."""

    @capability
    def logits(self, model: nn.Module, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Logits (B, T, V) in evaluation mode of rows, or of the new tokens of rows whose earlier
        keys and values are in `cache`.
        """

    @capability
    def cache(self, batch_size: int) -> Any:
        """An empty key-value cache of the run's model."""

    @capability
    def filtered_probs(self, logits_V: Tensor, **options: Any) -> Tensor:
        """Probabilities (V,) after `temperature`, `top_k` and `top_p`."""

    @capability
    def pick(self, probs_V: Tensor, uniforms_R: Tensor) -> Tensor:
        """The token of each uniform number."""

    @capability
    def penalised(self, logits_V: Tensor, seen: Any, penalty: float) -> Tensor:
        """Logits after the repetition penalty."""

    @capability
    def generate(self, model: nn.Module, ids: list[int], **options: Any) -> list[int]:
        """New tokens after `ids`; options are max_new_tokens, temperature, top_k, top_p,
        repetition_penalty, generator, eos_id and use_cache.
        """


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
