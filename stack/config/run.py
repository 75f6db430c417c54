"""The other sections of the configuration, and the configuration of a run."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from stackproof.config.base import Frozen
from stackproof.config.data import BanditCurriculum, DataConfig, StaticCurriculum
from stackproof.config.model import ModelConfig
from stackproof.config.optim import Optim, Schedule, Wsd
from stackproof.kernels import table
from stackproof.spec.errors import UsageError
from stackproof.spec.records import Waiver


class TrainConfig(Frozen):
    max_steps: int = Field(ge=1, description="optimizer steps")
    tokens_per_step: int = Field(
        ge=1,
        description="tokens of one optimizer step, over all micro-steps (gradient "
        "accumulation) and ranks",
    )
    micro_batch_size: int = Field(ge=1, description="rows of one forward and backward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="autocast dtype; weights stay float32"
    )
    compile: bool = Field(False, description="run the model through torch.compile")
    activation_checkpointing: Literal["none", "blocks"] = Field(
        "none",
        description=(
            "activations kept for the backward: all, or only the input of each block, which is "
            "then recomputed (activation checkpointing)"
        ),
    )
    kernels: str | dict[str, str] = Field(
        "auto",
        description=(
            "auto (the fastest by a shipped record or by stack doctor --kernels), torch, triton, "
            "or one by name for each operation"
        ),
    )
    sdc_check_every: int = Field(
        500,
        ge=1,
        description=(
            "steps between two checks for silent data corruption: the step is computed twice and "
            "its gradients are compared bit by bit; the last step is checked too"
        ),
    )
    log_every: int = Field(1, ge=1, description="steps between two lines of metrics.jsonl")

    @field_validator("kernels", mode="before")
    @classmethod
    def _known_kernels(cls, value):
        try:
            table.by_operation(value)
        except UsageError as e:
            near = ", ".join(f"'{name}'" for name in e.allowed.split(", "))
            raise PydanticCustomError(
                "unknown_kernel", "{what}", {"what": e.what, "tag": e.value, "expected_tags": near}
            ) from e
        return value


class ParallelConfig(Frozen):
    """The mesh of a run on several processes: ranks = replicate × shard × tensor."""

    replicate: int = Field(
        1, ge=1, description="data parallelism: copies of the model, each on shard × tensor ranks"
    )
    shard: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description=(
            "data parallelism with sharded weights, gradients and optimizer state (FSDP2): ranks "
            "that hold one copy of the model; auto takes all ranks that are left"
        ),
    )
    tensor: int = Field(
        1,
        ge=1,
        description="tensor parallelism: ranks that share each matrix, sequence and vocabulary",
    )
    timeout_s: int = Field(
        600, ge=1, description="seconds that a collective operation may take before the run ends"
    )
    compare_every: int = Field(
        100,
        ge=1,
        description="steps between two comparisons of weights and optimizer state of all replicas",
    )

    @field_validator("shard", mode="before")
    @classmethod
    def _auto_or_count(cls, value: object) -> object:
        """One message: pydantic has one for each type of a union, and shows the first."""
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("it must be auto or a whole number of at least 1")
        return value


class EvalConfig(Frozen):
    every: int = Field(ge=1, description="steps between two evaluations on held-out data")
    batches: int = Field(
        16,
        ge=2,
        description="held-out batches, the same in each evaluation; the power check may raise it",
    )
    batch_size: int = Field(8, ge=1, description="rows per held-out batch")
    bits_per_byte_min: float | None = Field(
        None,
        ge=0,
        description="lowest held-out loss that is plausible, bits per byte; none: a share of what "
        "a compressor needs; 0 for text that can be predicted and not compressed, such as "
        "generated sequences",
    )


class Patience(Frozen):
    """Early stopping: stop after `patience` evaluations without a significant improvement in a
    paired comparison.
    """

    kind: Literal["patience"] = "patience"
    patience: int = Field(
        5, ge=2, description="evaluations without a significant improvement before the run stops"
    )
    min_evaluations: int = Field(3, ge=1, description="evaluations before a stop is possible")
    z: float = Field(
        2.0,
        gt=0,
        description="standard errors of the paired difference that an improvement must exceed",
    )
    min_delta_nats: float = Field(0.0, ge=0, description="minimum improvement, nats per token")
    expected_gain_nats: float = Field(
        0.02,
        gt=0,
        description="gain per evaluation that the held-out set must be able to detect, "
        "nats per token",
    )


class NeverStop(Frozen):
    """No early stopping: train all steps."""

    kind: Literal["never"] = "never"


class SampleConfig(Frozen):
    every: int = Field(ge=1, description="steps between two audited samples")
    prompt: str = Field("The ", description="prompt of the sample")
    max_new_tokens: int = Field(96, ge=8)
    temperature: float = Field(0.8, ge=0, description="sampling temperature; 0 is greedy")
    top_k: int = Field(50, ge=0, description="0 keeps all")
    language: Literal["en", "code", "any"] = Field(
        "en", description="language of the words in the coherence score"
    )


class CheckpointConfig(Frozen):
    every: int = Field(ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="latest checkpoints kept, besides the best")
    async_save: bool = Field(
        False,
        description=(
            "write checkpoints in a background thread, from a copy of the state, while training "
            "continues"
        ),
    )
    layout: Literal["auto", "single", "sharded"] = Field(
        "auto",
        description=(
            "single: whole tensors in two files, which rank 0 writes; sharded: a file of each rank "
            "by torch's distributed checkpoint; auto: sharded on several ranks"
        ),
    )
    signal_boundary: int = Field(
        100, ge=1, description="SIGUSR1 saves after the next step that is a multiple of this"
    )


class TraceConfig(Frozen):
    every: int = Field(
        0,
        ge=0,
        description=(
            "steps between two records of the activation statistics of every point; 0: no records"
        ),
    )


class GatesConfig(Frozen):
    waive: tuple[Waiver, ...] = Field(
        (),
        description="gates allowed to fail, each with reason and expiry; written into the record",
    )


class RunConfig(Frozen):
    """The configuration of a run."""

    recipe: str = Field(description="name of the recipe this was built from")
    seed: int = Field(1337, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = DataConfig()
    curriculum: Annotated[StaticCurriculum | BanditCurriculum, Field(discriminator="kind")] = (
        StaticCurriculum()
    )
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: Annotated[Optim, Field(discriminator="kind")]
    schedule: Annotated[Schedule, Field(discriminator="kind")]
    eval: EvalConfig
    stop: Annotated[Patience | NeverStop, Field(discriminator="kind")] = Patience()
    sample: SampleConfig
    checkpoint: CheckpointConfig
    trace: TraceConfig = TraceConfig()
    gates: GatesConfig = GatesConfig()

    @property
    def tokens_per_micro_step(self) -> int:
        return self.train.micro_batch_size * self.model.max_seq_len

    @property
    def rows_per_step(self) -> int:
        return self.train.tokens_per_step // self.model.max_seq_len

    def micro_batch_rows(self, n_data_ranks: int = 1) -> int:
        """Rows of a micro-batch on each of the ranks that draw other rows: train.micro_batch_size,
        or a divisor of it where a rank has fewer rows or another multiple.
        """
        return math.gcd(self.rows_per_step // n_data_ranks, self.train.micro_batch_size)

    def accumulation(self, n_data_ranks: int = 1) -> int:
        """Micro-steps of one optimizer step on each of the ranks that draw other rows."""
        return self.rows_per_step // (n_data_ranks * self.micro_batch_rows(n_data_ranks))

    @model_validator(mode="after")
    def _consistent(self):
        if self.train.tokens_per_step % self.tokens_per_micro_step:
            raise ValueError(
                f"train.tokens_per_step ({self.train.tokens_per_step}) must be a multiple of "
                f"train.micro_batch_size × model.max_seq_len ({self.train.micro_batch_size} × "
                f"{self.model.max_seq_len} = {self.tokens_per_micro_step})"
            )
        if self.schedule.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be below "
                f"train.max_steps ({self.train.max_steps})"
            )
        if isinstance(self.schedule, Wsd) and self.schedule.warmup_steps > (
            begins := self.schedule.decay_begins(self.train.max_steps)
        ):
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must end before the decay "
                f"begins, which is after step {begins} (schedule.decay_frac "
                f"{self.schedule.decay_frac:g} of train.max_steps {self.train.max_steps})"
            )
        if self.train.compile and (ragged := self.model.ragged()):
            raise ValueError(
                f"train.compile cannot be combined with {ragged}: shapes depend on the data"
            )
        if self.curriculum.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"curriculum.warmup_steps ({self.curriculum.warmup_steps}) must be below "
                f"train.max_steps ({self.train.max_steps})"
            )
        return self

    def to_dict(self) -> dict:
        """The resolved tree, JSON-ready."""
        return self.model_dump(mode="json")
