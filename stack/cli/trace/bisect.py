"""`stack trace bisect`: compare two models, and find the operation that causes the difference."""

import shlex
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from stackproof.cli.trace.common import Model, Request, takes
from stackproof.cli.trace.compare import Against, Swap, compare_models
from stackproof.spec.errors import UsageError

EXAMPLES = (
    "stack trace bisect runs/broken --against runs/pocket-1",
    "stack trace bisect runs/pocket-1 --against hf/pocket",
)


@takes("prompt", "input_ids", "points", "backward", "expect", "csv")
def bisect(
    request: Request,
    model: Model,
    against: Against = None,
    check: Annotated[
        str | None,
        Option(help="Command that judges logits in a safetensors file. Exit code 0: good, 1: bad."),
    ] = None,
    swap: Swap = None,
) -> None:
    """Find the operation that causes a difference, by replacing values of MODEL with those of
    --against.
    """
    judge = None if check is None else Check(check)
    bisection = lambda *sides: _bisected(judge, *sides)  # noqa: E731
    compare_models(
        request, model, against, swap or [], bisection=bisection, bisect=True, check=check
    )


def _bisected(
    check: "Check | None",
    good: Any,
    bad: Any,
    input_ids: Any,
    points: list[str] | None,
    against: str,
) -> dict[str, Any]:
    from stackproof.trace import bisect as search

    found = search(good, bad, input_ids, check, points)
    if check is not None and found.chain[0].verdict == "eliminated":
        raise UsageError(
            "the check rejects the logits of --against, so it cannot separate good from bad",
            value=check.stderr or check.command,
            allowed=f"exit code 0 for the logits of {against}",
            next_step="run the check by itself on a safetensors file with logits",
        )
    return {
        "guilty": [
            {"point": p.name, "layer": p.layer, "operation": p.operation} for p in found.guilty
        ],
        "minimal_set": list(found.minimal_set),
        "chain": [{"id": f"E{i}"} | asdict(link) for i, link in enumerate(found.chain, start=1)],
        "runs": found.runs,
        "tolerance": found.tolerance,
        "conclusion": found.conclusion,
    }


class Check:
    """Judges logits by a command. `stderr` is the end of the standard error of its first run."""

    def __init__(self, command: str):
        self.command, self.stderr = command, None

    def __call__(self, logits: Any) -> bool:
        """Whether the command accepts the logits.
        Raises UsageError for exit codes other than 0 and 1.
        """
        import safetensors.torch

        with tempfile.TemporaryDirectory(prefix="stackproof-check-") as folder:
            file = Path(folder) / "logits.safetensors"
            safetensors.torch.save_file({"logits": logits.contiguous()}, file)
            try:
                done = subprocess.run(
                    [*shlex.split(self.command), str(file)], capture_output=True, text=True
                )
            except OSError as e:
                raise UsageError(f"the check cannot be run: {e}", value=self.command) from e
        stderr = done.stderr.strip()[-300:]
        self.stderr = stderr if self.stderr is None else self.stderr
        if done.returncode not in (0, 1):
            raise UsageError(
                "the check failed",
                value=f"exit code {done.returncode}: {stderr}",
                allowed="0 for good, 1 for bad",
            )
        return done.returncode == 0
