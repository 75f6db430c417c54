"""Gates of commands that read a checkpoint: the command runs in a forked process on a run of the
museum.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stackproof.contracts.gate import Verdict
from stackproof.museum.plant import touches
from stackproof.spec.errors import GateFailed
from stackproof.spec.gates import Gate
from stackproof.spec.records import read_record

Perform = Callable[[list[str]], object]  # a command line; raises what the command raises
ARGUMENTS = {"evaluate": ("evaluate",), "trace": ("trace", "stats")}


class Performed(NamedTuple):
    """The gate that ended a command or was to be judged, its verdict, and how often planted code
    ran. `error` is what the command raised otherwise.
    """

    gate_id: str
    verdict: Verdict
    touches: int
    error: Exception | None = None


def is_of_command(gate: Gate) -> bool:
    """Whether a gate is proven by a command and not by a run or an export."""
    return gate.kinds[0] in ARGUMENTS


def perform(gate: Gate, run_dir: Path, out: Path, command: Perform) -> Performed:
    """Run the command of a gate on a run, in a forked process, as output and caches are those of
    one command.
    """
    suite = ("--suite", "domains") if gate.when.get("evaluate.of") == "suite" else ()
    line = [*ARGUMENTS[gate.kinds[0]], str(run_dir), *suite, "--run-dir", str(out)]
    answer = out.with_suffix(".answer")
    child = os.fork()
    if not child:
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            answer.write_bytes(pickle.dumps(_performed(gate, out, line, command)))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return pickle.loads(answer.read_bytes())


def _performed(gate: Gate, out: Path, line: list[str], command: Perform) -> Performed:
    before = touches()
    try:
        command(line)
        result = next(g for g in read_record(out / "metadata.json").gates if g.id == gate.id)
        verdict = Verdict(result.verdict, result.message, result.measured)
        return Performed(gate.id, verdict, touches() - before)
    except GateFailed as e:
        return Performed(e.gate_id, e.verdict, touches() - before)
    except Exception as e:
        text = RuntimeError(f"{type(e).__name__}: {e}")
        return Performed(gate.id, Verdict("not_run"), touches() - before, text)
