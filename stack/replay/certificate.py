"""The resume certificate: an uninterrupted run and one with SIGKILLs at random moments, compared
byte for byte.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from stackproof.config import RunConfig, load_config
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.canonical import sha256_file
from stackproof.spec.errors import ConfigError
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment
from stackproof.spec.records import Record
from stackproof.train import checkpoint
from stackproof.train.rng import stream_seed
from stackproof.train.run_dir import RunDir

CLAIM = "Training killed at random moments and resumed each time ends in byte-identical weights."
NOT_COVERED = (
    "another processor, torch build or number of threads",
    "kills by power failure: the page cache survives a SIGKILL",
)
DEADLINE_S = 900.0


def certify(
    base: RunConfig, *, steps: int, kills: int, sets: tuple[str, ...], run_dir: Path | None
) -> tuple[Record, Path]:
    """Run both, compare them, and write the record. `base` is the configuration of a recipe.

    Raises ConfigError if there are too few steps for the kills.
    """
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
    builder = RecordBuilder(
        kind="resume",
        spec=load_spec(),
        config=cfg.to_dict(),
        claim=CLAIM,
        not_covered=NOT_COVERED,
        overrides=overrides,
        environment=environment(),
    )
    directory = run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "stackproof",
        "train",
        base.recipe,
        *(f"--set={s}" for s in sets),
        "--run-dir",
    ]
    straight, killed = directory / "straight", directory / "killed"
    _finish([*command, str(straight)], directory / "straight.log")
    moments = _with_kills(
        [*command, str(killed)], killed, directory / "killed.log", steps, kills, cfg.seed
    )
    return _judge(builder, directory, straight, killed, moments, steps), directory


def _finish(command: list[str], log: Path) -> int:
    with open(log, "ab") as f:
        return subprocess.run(command, stdout=f, stderr=f, timeout=DEADLINE_S).returncode


def _with_kills(
    command: list[str], run_dir: Path, log: Path, steps: int, kills: int, seed: int
) -> list[int]:
    """Kill the run at random steps after the first checkpoint, and continue with --resume each
    time. Returns the last logged step of each kill.
    """
    draw = random.Random(stream_seed(seed, "kills"))
    targets = sorted(draw.sample(range(steps // 4, steps - 1), kills))
    resumed = [sys.executable, "-P", "-m", "stackproof", "train", "--resume", str(run_dir)]
    moments = []
    for target in targets:
        moments.append(_kill_at(command if not moments else resumed, run_dir, log, target, draw))
    _finish(resumed, log)
    return moments


def _kill_at(command: list[str], run_dir: Path, log: Path, target: int, draw: random.Random) -> int:
    with open(log, "ab") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f)
        deadline = time.monotonic() + DEADLINE_S
        while (
            process.poll() is None and _last_step(run_dir) < target and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return _last_step(run_dir)


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
) -> Record:
    reasons, folders = [], []
    for run in (straight, killed):
        try:
            folders.append(checkpoint.find(run))
        except Exception as e:
            reasons.append(f"{run.name}: {e}")
    if not reasons:
        a, b = (sha256_file(f / "model.safetensors") for f in folders)
        states = [checkpoint.load(f).state for f in folders]
        builder.outputs = [
            artefact(f / "model.safetensors", root=directory, name=n)
            for f, n in zip(folders, ("straight", "killed"))
        ]
        reasons += ["the weights differ"] if a != b else []
        reasons += [
            f"{k} differs"
            for k in ("step", "cursor", "tokens_seen", "stopper", "best")
            if states[0][k] != states[1][k]
        ]
        reasons += (
            [f"ended at step {states[1]['step']}, not {steps}"]
            if states[1]["step"] != steps
            else []
        )
    builder.metric("steps", steps, "steps")
    builder.metric("kills", len(moments), "kills")
    builder.metric("resumes", _resumes(killed), "resumes")
    builder.metric("weights_equal", int(not reasons), "1", better="higher")
    for i, step in enumerate(moments, start=1):
        builder.metric(f"kill_{i}_after_step", step, "steps")
    ok = not reasons and _resumes(killed) == len(moments)
    reason = (
        "byte-identical weights" if ok else "; ".join(reasons) or "not every kill led to a resume"
    )
    return builder.finish(
        directory,
        status="completed" if ok else "failed",
        end_reason=reason,
        exit_code=0 if ok else 6,
    )


def _resumes(run_dir: Path) -> int:
    return sum(line["event"] == "resumed" for line in RunDir(run_dir).lines("events.jsonl"))
