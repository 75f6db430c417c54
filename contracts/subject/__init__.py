"""What a gate judges: a trainer and its run, as typed parts that an adapter offers.

A check receives one `Subject`. Each of its parts is an interface of this package; a trainer is
adapted once, by subclasses of those that it can offer. A member that an adapter leaves out raises
NotOffered, and the gate's verdict is `not_run` with the name of the missing capability.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stackproof.contracts.subject.capability import NotOffered, capability, offered, offers, value
from stackproof.contracts.subject.commands import (
    AnsweredSuite,
    OpenedCheckpoint,
    ScoredText,
    SuiteAnswer,
    TracedForward,
)
from stackproof.contracts.subject.data import (
    BanditOrder,
    ContaminationScanner,
    Corpus,
    Curriculum,
    DataLoader,
    DrawnBatch,
    Draws,
    Encoding,
    Manifest,
    RowLoader,
    Rows,
    SamplerOrder,
    Source,
    TextEncoder,
    TextTokenizer,
    Tokenizer,
    TokenStream,
)
from stackproof.contracts.subject.declared import Architecture, Declared, Schedule, UpdateLaw
from stackproof.contracts.subject.evaluation import (
    BatchScore,
    Evaluation,
    Exported,
    LanguageModel,
    Sampling,
    StopDecision,
    StopDeclaration,
    Stopping,
    StopRule,
    TextScore,
)
from stackproof.contracts.subject.kernels import HalfPrecision, Kernels
from stackproof.contracts.subject.model import ExpertFunctions, Experts, Model, NamedParameters
from stackproof.contracts.subject.training import (
    Checkpoints,
    MicroBatch,
    ResidualBlock,
    SavedCheckpoint,
    StepReport,
    Trainee,
    TraineeOptions,
    Training,
)


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
    opened: OpenedCheckpoint = field(default_factory=OpenedCheckpoint)
    scored: ScoredText = field(default_factory=ScoredText)
    answered: AnsweredSuite = field(default_factory=AnsweredSuite)
    traced: TracedForward = field(default_factory=TracedForward)
