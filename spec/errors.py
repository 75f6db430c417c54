"""The exception tree. A user-facing error holds a cause, a value with its origin, the allowed
values, and a next step.
"""


def _on_one_line(part: object) -> str:
    return str(part).replace("\n", "\\n")


class StackproofError(Exception):
    """Base of every error a user can cause. `exit_code` is the exit code of the process."""

    exit_code = 1

    def __init__(self, what: str, *, value: object = None, allowed: str = "", next_step: str = ""):
        self.what, self.value, self.allowed, self.next_step = what, value, allowed, next_step
        super().__init__(self.render())

    def render(self) -> str:
        """The message as up to four labelled lines; empty parts are omitted. Each part is one line,
        so that no text of others in it looks like another part.
        """
        parts = ["; ".join(filter(None, map(str.strip, self.what.split("\n"))))]
        if self.value is not None:
            parts.append(f"  got      {_on_one_line(self.value)}")
        if self.allowed:
            parts.append(f"  allowed  {_on_one_line(self.allowed)}")
        if self.next_step:
            parts.append(f"  next     {_on_one_line(self.next_step)}")
        return "\n".join(parts)

    def as_json(self) -> dict:
        """The same parts as a JSON-ready mapping."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "value": None if self.value is None else str(self.value),
            "allowed": self.allowed,
            "next_step": self.next_step,
            "exit_code": self.exit_code,
        }


class UsageError(StackproofError):
    """An invalid command or argument."""

    exit_code = 2


class ConfigError(StackproofError):
    """An invalid, contradictory or unknown configuration."""

    exit_code = 2


class DataError(StackproofError):
    """A corpus, shard, tokenizer or text that is unreadable or damaged."""

    exit_code = 3


class StreamExhausted(DataError):
    """The corpus is exhausted and `data.on_exhausted` is `error`."""


class GateFailed(StackproofError):
    """A gate of severity `halt` failed.
    `gate_id` is the gate, `verdict` its verdict, `record` the record of the halted run.
    """

    exit_code = 4

    def __init__(self, gate_id: str, verdict=None, **parts):
        self.gate_id, self.verdict, self.record = gate_id, verdict, None
        super().__init__(
            f"gate {gate_id} failed: {parts.pop('what', '') or getattr(verdict, 'message', '')}",
            **parts,
        )


class CheckpointError(StackproofError):
    """A checkpoint that is incomplete, damaged, unsafe or could not be written."""

    exit_code = 5


class IntegrityError(StackproofError):
    """Contradictions between evidence, ledger, spec and registry."""

    exit_code = 6


class NoHistory(IntegrityError):
    """An archived record that cannot be verified, because this checkout lacks the git history."""


class EnvironmentUnfit(StackproofError):
    """The machine or the installation lacks something that the command needs."""

    exit_code = 7


class RankLost(EnvironmentUnfit):
    """Another process of the run ended or does not answer. With the exit code of a rank that stated
    its error.
    """


class Stopped(StackproofError):
    """A signal stopped the run, after a complete checkpoint was written."""

    def __init__(self, what: str, *, exit_code: int, **parts):
        self.exit_code = exit_code
        super().__init__(what, **parts)


EXIT_CODES = {
    0: "done, gates passed",
    1: "a bug in stackproof",
    2: "usage or configuration",
    3: "data",
    4: "a gate failed",
    5: "checkpoint",
    6: "integrity of evidence",
    7: "the environment cannot do it",
    75: "preempted (SIGTERM): its checkpoint is good, or no step was taken",
    130: "interrupted (Ctrl-C): its checkpoint is good, or no step was taken",
}
