"""Whether a refusal is the fault of this code: then small runs that are known to be right are
refused at the same place.
"""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

from stackproof.distributed.started import is_worker
from stackproof.spec.errors import (
    GateFailed,
    StackproofError,
    Stopped,
    StreamExhausted,
)

STACK = Path(__file__).resolve().parents[1]
READERS = ("data", "model", "kernels", "train", "evaluate", "export")
SHORT = {
    "train.max_steps": 2,
    "schedule.warmup_steps": 1,
    "curriculum.warmup_steps": 0,
    "curriculum.warmup_sources": (),
    "eval.every": 2,
    "sample.every": 2,
    "checkpoint.every": 1,
    "model.max_seq_len": 64,
    "train.tokens_per_step": 2 * 64,
    "train.micro_batch_size": 1,
    "eval.batches": 2,
    "eval.batch_size": 2,
    "sample.max_new_tokens": 72,  # more than the context holds
}
# The museum's own run, and what it has not: together they execute most of what a run consists of.
RUNS: tuple[Mapping[str, Any], ...] = (
    SHORT,
    SHORT
    | {
        "curriculum.kind": "static",
        "data.dedup.kind": "exact",
        "data.tokenizer.kind": "byte",
        "data.packing.kind": "concatenated",
        "model.attention.kind": "differential",
        "model.norm.kind": "layernorm",
        "model.ffn.kind": "moe",
        "model.dropout": 0.0,
        "optim.kind": "adamw",
        "optim.lr": 1e-3,
        "train.dtype": "bfloat16",
        "checkpoint.async_save": True,
    },
)
# Of data alone, which takes less than a second: a tokenizer and a warm-up that no other run has.
WARM = {"curriculum.warmup_steps": 1, "curriculum.warmup_sources": ("grammar",)}
DATA = (SHORT | WARM | {"data.tokenizer.kind": "char"},)
# Errors that every run meets on a machine that is unfit.
OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
BLAMING = (2, 3, 5, 7)  # exit codes that name the command, the data, a checkpoint or the machine
Verb = Callable[[Sequence[str]], object]  # performs a command line; raises what it raises


def is_own_fault(error: StackproofError | RecursionError, verb: Verb) -> bool:
    """Whether a small run that is known to be right, its resume, evaluation or export ends with an
    error of the same type, raised by the same function. Takes some seconds.

    Only errors of code that reads text, models and checkpoints are tried, in a run of one process.
    A gate and a signal name their own cause, the end of a corpus is declared, and a full disk or
    the like is the same for all runs.
    """
    place = place_of(error.__traceback__)
    named = isinstance(error, (GateFailed, Stopped, StreamExhausted))
    unfit = isinstance(cause := error.__cause__, OSError) and cause.errno in OF_THE_MACHINE
    deep = isinstance(error, RecursionError)  # as an input that is nested too deeply ends
    blames = (deep or error.exit_code in BLAMING) and not unfit
    if place is None or named or not blames or is_worker():
        return False
    package = Path(place[0]).relative_to(STACK).parts[0]
    return any(
        type(found) is type(error) and place_of(found.__traceback__) == place
        for found in _ends(verb, package, gated=in_a_check(error.__traceback__))
    )


def in_a_check(trace: TracebackType | None) -> bool:
    """Whether an error was raised in the check of a gate, which reads inputs of its own."""
    from stackproof.contracts.gate import call_check

    while trace is not None:
        if trace.tb_frame.f_code is call_check.__code__:
            return True
        trace = trace.tb_next
    return False


def place_of(trace: TracebackType | None) -> tuple[str, str] | None:
    """File and function of the innermost frame of this package; None if it is not in code that
    reads.
    """
    place = None
    while trace is not None:
        code = trace.tb_frame.f_code
        path = Path(code.co_filename)
        if STACK in path.parents:
            inside = path.relative_to(STACK).parts[0] in READERS and code.co_name != "<module>"
            place = (str(path), code.co_name) if inside else None
        trace = trace.tb_next
    return place


def _ends(verb: Verb, package: str, *, gated: bool) -> Iterator[Exception]:
    """The errors of what is known to be right, as far as it runs a package, with or without gates;
    none where all ends as it should. One of them may be that nothing can be run here, as on a full
    disk.
    """
    for values in (*RUNS, *(DATA if package == "data" and not gated else ())):
        try:
            _perform(values, verb, package, gated)
        except Exception as e:
            yield e


def _perform(values: Mapping[str, Any], verb: Verb, package: str, gated: bool) -> None:
    """Perform a run with these values, without output, in a folder of its own."""
    from stackproof.config import load_config
    from stackproof.data.prepare import prepare
    from stackproof.museum.collection import museum_config
    from stackproof.museum.prove import use_cache, workshop
    from stackproof.mutation.trial import without_gates
    from stackproof.train.state import make_data_loader

    fixed = {key: (value, "a run that is known to be right") for key, value in values.items()}
    silent = redirect_stdout(StringIO()), redirect_stderr(StringIO())
    gates = nullcontext() if gated else without_gates()
    with workshop() as root, silent[0], silent[1], gates:
        use_cache(root / "cache")
        cfg, changed = load_config(museum_config(root), fixed=fixed)
        if package == "data" and not gated:
            make_data_loader(cfg, prepare(cfg.data)).next_batch()
        else:
            _commands(cfg, changed, root, verb, package)


def _commands(cfg: Any, changed: Sequence[Any], root: Path, verb: Verb, package: str) -> None:
    """Train and resume; then evaluate or export."""
    from stackproof.evaluate.suite import SUITES, load_suite
    from stackproof.train import start
    from stackproof.train.loop import train

    if package == "evaluate":
        load_suite(SUITES / "domains.toml")
    run = root / "run"
    train(start.fresh(cfg, changed, run))
    train(start.resume(run, (), cfg, at=1))
    if package == "evaluate":
        verb(["evaluate", str(run), "--run-dir", str(root / "evaluated")])
    if package == "export" and cfg.model.attention.kind == "softmax":
        out = ["--out", str(root / "exported"), "--run-dir", str(root / "export")]
        verb(["export", str(run), *out])
