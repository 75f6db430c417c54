"""The adapters: every way of running under gates, with the events that it emits.

An adapter that stops emitting an event is found by tests/contracts/test_adapters.py, which runs
each of them and compares what it emits with this table and with what the gates of its kind watch.
"""

from dataclasses import dataclass

from stackproof.contracts import events
from stackproof.spec.gates import Gate, Moment, Spec

STACK_EVENTS = (
    events.Started,
    events.BatchDrawn,
    events.ModuleModes,
    events.StepTaken,
    events.LossMeasured,
    events.RatesUsed,
    events.WeightsUpdated,
    events.Recomputed,
    events.ActivationsTraced,
    events.Evaluated,
    events.MemorizationMeasured,
    events.LossRescored,
    events.Sampled,
    events.TextDrawn,
    events.StateCompared,
    events.Saved,
    events.LogsRead,
    events.Recorded,
    events.Finished,
)
RANK_EVENTS = (
    events.RanksJoined,
    events.StateDivided,
    events.RowsDealt,
    events.StepRepeated,
    events.ReplicasCompared,
    events.EvaluationRepeated,
    events.RankSpeeds,
    events.MasksCompared,
)
FOREIGN_RANK_EVENTS = (
    events.RanksJoined,
    events.RowsDealt,
    events.StepRepeated,
    events.ReplicasCompared,
)
FOREIGN_EVENTS = (
    events.Started,
    events.StateRestored,
    events.ModelInput,
    events.IdsRead,
    events.RowHashes,
    events.ModuleModes,
    events.LossMeasured,
    events.GradientsAccumulated,
    events.StepTaken,
    events.RatesUsed,
    events.WeightsUpdated,
    events.StateCompared,
)


@dataclass(frozen=True)
class Adapter:
    """One way of running: how a person starts it, the kind of its runs, the events that it emits,
    those that it emits on several ranks as well, and the moments at which it calls gates.
    """

    name: str
    verb: str
    kind: str
    events: tuple[type, ...] = ()
    rank_events: tuple[type, ...] = ()
    moments: tuple[Moment, ...] = ("preflight", "runtime", "artifact")

    def gates(self, spec: Spec) -> list[Gate]:
        """The gates that its runs hold, for every configuration."""
        return [g for g in spec.required(self.kind) if g.moment in self.moments]

    def missing(self, watched: tuple[type, ...]) -> list[str]:
        """Names of watched events that it does not emit."""
        return [e.__name__ for e in watched if e not in (*self.events, *self.rank_events)]


ADAPTERS = (
    Adapter("train", "stack train", "train", STACK_EVENTS, RANK_EVENTS),
    Adapter(
        "resume",
        "stack train --resume, --fork, --continue-from",
        "train",
        (events.Resumed, *STACK_EVENTS),
        RANK_EVENTS,
    ),
    Adapter("export", "stack export hf", "export"),
    Adapter("import", "stack import", "import"),
    Adapter("data", "stack data build", "data"),
    Adapter("evaluate", "stack evaluate", "evaluate"),
    Adapter("sample", "stack sample", "sample", (events.Sampled, events.TextDrawn)),
    Adapter("trace", "stack trace", "trace"),
    Adapter("compare", "stack trace compare", "compare"),
    Adapter(
        "plain",
        "with gated(model, optimizer): …",
        "foreign",
        FOREIGN_EVENTS,
        FOREIGN_RANK_EVENTS,
    ),
    Adapter(
        "huggingface",
        "transformers.Trainer or a trainer of TRL, with GateCallback",
        "foreign",
        FOREIGN_EVENTS,
        FOREIGN_RANK_EVENTS,
    ),
    Adapter(
        "lightning",
        "lightning.Trainer with GateCallback",
        "foreign",
        FOREIGN_EVENTS,
        FOREIGN_RANK_EVENTS,
    ),
    Adapter("pytest", "pytest --stack-gates", "foreign", moments=("preflight",)),
)
