"""The resume certificate: an uninterrupted run and one with SIGKILLs at random moments, compared
byte for byte, or by their losses if the other one was resumed on another number of processes.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path

import numpy as np
from torch import Tensor

from stackproof.config import RunConfig, load_config
from stackproof.contracts.gate import worst
from stackproof.distributed.mesh import mesh_sizes
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.errors import (
    EXIT_CODES,
    ConfigError,
    EnvironmentUnfit,
    RankLost,
    StackproofError,
)
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import Record
from stackproof.train import checkpoint
from stackproof.train.rng import stream_seed
from stackproof.train.run_dir import RunDir
from stackproof.train.state import tensor_bytes

CLAIM = "Training killed at random moments and resumed each time ends in byte-identical weights."
CLAIM_ELSEWHERE = (
    "Training killed at random moments and resumed each time on another number of processes draws "
    "as many rows of each source in each step, ends at the same place of the data and, within a "
    "bound, has the same losses."
)
NOT_COVERED = (
    "another processor, torch build or number of threads",
    "kills by power failure: the page cache survives a SIGKILL",
)
DEADLINE_S = 900.0
PROC = Path("/proc")
# Relative distance of the losses of a step on another number of processes, after 60 steps. Their
# float32 sums have another order: measured at most 1.8e-7. In half precision weights that differ so
# round to other numbers: measured 4.0e-5; the weakest error that a gate finds is 2.5e-4 (ADR 0053).
LOSS_REL_MAX, HALF_LOSS_REL_MAX = 1e-6, 2e-4
SAME_STATE = ("step", "cursor", "tokens_seen", "curriculum")
SAME_BITS = (*SAME_STATE, "stopper", "best")


@dataclass(frozen=True)
class Processes:
    """Processes of the uninterrupted run and of the first part of the other one, and those of its
    resumed parts. `half`: they compute in half precision.
    """

    first: int = 1
    resumed: int = 1
    half: bool = False

    @property
    def are_equal(self) -> bool:
        """Whether all parts have as many processes, so that the bits are compared."""
        return self.first == self.resumed

    @property
    def loss_rel_max(self) -> float:
        """The bound of the relative distance of the losses."""
        of_dtype = HALF_LOSS_REL_MAX if self.half else LOSS_REL_MAX
        return 0.0 if self.are_equal else of_dtype


def certify(
    base: RunConfig,
    *,
    steps: int,
    kills: int,
    sets: tuple[str, ...],
    run_dir: Path | None,
    processes: Processes = Processes(),
) -> tuple[Record, Path]:
    """Run both, compare them, and write the record. `base` is the configuration of a recipe.

    Raises ConfigError if there are too few steps for the kills, or if the configuration cannot be
    divided among the processes, EnvironmentUnfit if one of several processes cannot be killed, and
    the error of a run that does not end well, after writing the record.
    """
    _require_list_of_children(processes)
    if steps < 2 * (kills + 1):
        raise ConfigError(
            f"{steps} steps are too few for {kills} kills",
            allowed=f"at least {2 * (kills + 1)} steps",
            next_step="--steps 60",
        )
    every = max(1, steps // (3 * (kills + 1)))
    looks = (
        f"eval.every={min(steps, base.eval.every)}",
        f"sample.every={min(steps, base.sample.every)}",
    )
    sets = (
        f"train.max_steps={steps}",
        f"schedule.warmup_steps={max(1, steps // 10)}",
        f"checkpoint.every={every}",
        *looks,
        *sets,
    )
    cfg, overrides = load_config(base, sets=sets)
    processes = replace(processes, half=cfg.train.dtype != "float32")
    counts = {"mesh": processes.first, "resumed_mesh": processes.resumed}
    meshes = {
        f"{name}_{axis}": size
        for name, n in counts.items()
        for axis, size in mesh_sizes(cfg, n).as_dict().items()
    }
    builder = RecordBuilder(
        kind="resume",
        spec=load_spec(),
        config=cfg.to_dict(),
        claim=CLAIM if processes.are_equal else CLAIM_ELSEWHERE,
        not_covered=NOT_COVERED,
        overrides=overrides,
        environment=environment(world_size=processes.first, **meshes),
    )
    directory = run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    command = ["train", base.recipe, *(f"--set={s}" for s in sets), "--run-dir"]
    straight, killed = directory / "straight", directory / "killed"
    try:
        _finish(_stack(processes.first, *command, str(straight)), straight)
        moments = _with_kills(
            processes,
            _stack(processes.first, *command, str(killed)),
            _stack(processes.resumed, "train", "--resume", str(killed)),
            killed,
            steps,
            kills,
            random.Random(stream_seed(cfg.seed, "kills")),
        )
    except StackproofError as e:
        builder.finish(directory, status="failed", end_reason=e.what, exit_code=e.exit_code)
        raise
    return _judge(builder, directory, straight, killed, moments, steps, processes), directory


def _stack(n_processes: int, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "stackproof", *arguments, "--nproc", str(n_processes)]


def _finish(command: list[str], run_dir: Path) -> None:
    """Run a command to its end. Raises the error with which it ended, with its exit code, and
    RankLost if it does not end.
    """
    log = run_dir.with_suffix(".log")
    try:
        with open(log, "ab") as f:
            code = subprocess.run(command, stdout=f, stderr=f, timeout=DEADLINE_S).returncode
    except subprocess.TimeoutExpired as e:
        raise _endless(command, DEADLINE_S) from e
    if code:
        stated = re.findall(r"^error: (.+)$", log.read_text(errors="replace"), re.MULTILINE)
        error = StackproofError(
            f"the run {run_dir.name} ended with exit code {code}, so that nothing was compared: "
            f"{stated[-1] if stated else 'it has stated no error'}",
            value=str(run_dir),
            allowed="two runs that end",
            next_step=f"read {log}",
        )
        error.exit_code = code if code in EXIT_CODES else RankLost.exit_code
        raise error


def _endless(command: list[str], timeout_s: float) -> RankLost:
    return RankLost(
        f"a run did not end within {timeout_s:g} s",
        value=" ".join(command),
        next_step="read the logs straight.log and killed.log beside the folders of the runs",
    )


def _with_kills(
    processes: Processes,
    command: list[str],
    resumed: list[str],
    run_dir: Path,
    steps: int,
    kills: int,
    draw: random.Random,
) -> list[int]:
    """Kill the run at random steps after the first checkpoint, and resume it each time. Returns the
    last logged step of each kill.
    """
    log = run_dir.with_suffix(".log")
    targets = sorted(draw.sample(range(steps // 4, steps - 1), kills))
    moments = []
    for target in targets:
        now, n = (resumed, processes.resumed) if moments else (command, processes.first)
        moments.append(_kill_at(now, n, run_dir, log, target, draw))
    _finish(resumed, run_dir)
    return moments


def _kill_at(
    command: list[str], n: int, run_dir: Path, log: Path, target: int, draw: random.Random
) -> int:
    """Kill the only process of a run, or one of its `n`, after a step. Returns its last step."""
    with open(log, "ab") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f)
        deadline = time.monotonic() + DEADLINE_S
        while (
            process.poll() is None and _last_step(run_dir) < target and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        # Of several processes one is killed: the others and their launcher end by themselves.
        _kill(draw.choice((n > 1 and children_of(process.pid)) or [process.pid]))
        _await_end(process, DEADLINE_S)
    return _last_step(run_dir)


def _await_end(process: subprocess.Popen, timeout_s: float) -> None:
    """Wait for the end of a run of which a process was killed. Raises RankLost if it does not end,
    after killing what is left of it, so that none keeps the lock of the folder.
    """
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired as e:
        for pid in (process.pid, *children_of(process.pid)):
            _kill(pid)
        process.wait()
        raise _endless(process.args, timeout_s) from e


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _require_list_of_children(processes: Processes) -> None:
    """Raises EnvironmentUnfit if a run has several processes and the system does not list them:
    without their launcher alone they would keep the lock of the folder.
    """
    n, listed = max(processes.first, processes.resumed), _children_file(os.getpid())
    if n > 1 and not listed.is_file():
        raise EnvironmentUnfit(
            "the processes of a run cannot be listed, so that none of them can be killed",
            value=f"{n} processes, and no file {listed}",
            allowed="a Linux with /proc and CONFIG_PROC_CHILDREN, or one process",
            next_step="drop --nproc and --resume-nproc, or certify on such a machine",
        )


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, as Linux lists them; none of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(n) for n in _children_file(pid).read_text().split()]
    return []


def _children_file(pid: int) -> Path:
    return PROC / f"{pid}/task/{pid}/children"


def _last_step(run_dir: Path) -> int:
    """The last step in the log of a run that may still write it; 0 without one."""
    return max((line["step"] for line in RunDir(run_dir).lines("metrics.jsonl")), default=0)


def _judge(
    builder: RecordBuilder,
    directory: Path,
    straight: Path,
    killed: Path,
    moments: list[int],
    steps: int,
    processes: Processes,
) -> Record:
    try:
        loaded = [checkpoint.load(checkpoint.find(run)) for run in (straight, killed)]
    except StackproofError as e:
        reasons = [e.what]
    else:
        builder.outputs = [
            artefact(found.path / "manifest.json", root=directory, name=name)
            for found, name in zip(loaded, ("straight", "killed"), strict=True)
        ]
        differing, distance = differing_tensors(*loaded), loss_distance(straight, killed)
        builder.metric("differing_tensors", len(differing), "tensors", better="lower")
        builder.metric("weights_equal", int(not differing), "1", better="higher")
        if isfinite(distance):
            builder.metric("loss_rel_distance", distance, "1", better="lower")
        same_rows = rows_by_source(straight) == rows_by_source(killed)
        reasons = reasons_against(processes, steps, *loaded, differing, distance, same_rows)
    builder.metric("steps", steps, "steps")
    builder.metric("kills", len(moments), "kills")
    builder.metric("resumes", _resumes(killed), "resumes")
    builder.metric("processes", processes.first, "processes")
    builder.metric("resumed_processes", processes.resumed, "processes")
    builder.metric("loss_rel_max", processes.loss_rel_max, "1")
    for i, step in enumerate(moments, start=1):
        builder.metric(f"kill_{i}_after_step", step, "steps")
    if not reasons and _resumes(killed) != len(moments):
        reasons = ["not every kill led to a resume"]
    good = "byte-identical weights"
    if not processes.are_equal:
        good = f"losses within {processes.loss_rel_max:g} on another number of processes"
    return builder.finish(
        directory,
        status="failed" if reasons else "completed",
        end_reason="; ".join(reasons) or good,
        exit_code=6 if reasons else 0,
    )


def reasons_against(
    processes: Processes,
    steps: int,
    straight: checkpoint.Loaded,
    killed: checkpoint.Loaded,
    differing: list[str],
    distance: float,
    same_rows: bool,
) -> list[str]:
    """Why the claim does not hold; empty if it does. On one number of processes all bits must be
    equal.
    """
    keys = SAME_BITS if processes.are_equal else SAME_STATE
    reasons = [f"{key} differs" for key in keys if straight.state[key] != killed.state[key]]
    if killed.state["step"] != steps:
        reasons.append(f"ended at step {killed.state['step']}, not {steps}")
    if processes.are_equal and differing:
        reasons.append(f"{len(differing)} tensors differ, the first is {differing[0]}")
    if not same_rows:
        reasons.append("a step has drawn other numbers of rows from the sources")
    if not distance <= processes.loss_rel_max:
        reasons.append(f"losses differ by {distance:.2g}, more than {processes.loss_rel_max:g}")
    return reasons


def differing_tensors(left: checkpoint.Loaded, right: checkpoint.Loaded) -> list[str]:
    """Names of the tensors of weights and training state that are not bitwise equal."""
    ours, theirs = left.model | left.tensors, right.model | right.tensors
    names = sorted(ours.keys() | theirs.keys())
    return [n for n in names if not _equal(ours.get(n), theirs.get(n))]


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return left.shape == right.shape and np.array_equal(tensor_bytes(left), tensor_bytes(right))


def loss_distance(straight: Path, killed: Path) -> float:
    """Largest relative distance of the losses of a step; infinity if a loss is NaN or the logs do
    not have the same steps.
    """
    ours, theirs = (
        [(line["step"], float(line["loss_nats"])) for line in RunDir(run).lines("metrics.jsonl")]
        for run in (straight, killed)
    )
    if not ours or [step for step, _ in ours] != [step for step, _ in theirs]:
        return inf
    pairs = zip(ours, theirs, strict=True)
    return worst(abs(b - a) / max(abs(a), abs(b), 1e-30) for (_, a), (_, b) in pairs)


def rows_by_source(run: Path) -> list[dict]:
    """The lines of a run with the rows that a step drew from each source; none with one source."""
    return [line for line in RunDir(run).lines("curriculum.jsonl") if line["event"] == "rows"]


def _resumes(run_dir: Path) -> int:
    return sum(line["event"] == "resumed" for line in RunDir(run_dir).lines("events.jsonl"))
