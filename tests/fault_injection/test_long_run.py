"""Over many steps a run needs as much memory, open files, objects and log bytes per step as at its
start.
"""

import json
import os
from statistics import median

import pytest

from tests.cli.conftest import tiny
from tests.fault_injection.scale import scaled
from tests.processes import NO_PREFLIGHT, Command

METERED = """
import gc, json, os, sys
from pathlib import Path
from stackproof.train import callbacks

class Meter(callbacks.RunLog):
    def on_step_end(self, trainer, report):
        super().on_step_end(trainer, report)
        if report.step % int(sys.argv[-1]):
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        logs = {p.name: p.stat().st_size for p in trainer.output.dir.path.glob("*.jsonl")}
        gc.collect()
        meter = {"step": report.step, "memory": pages * os.sysconf("SC_PAGE_SIZE"),
                 "objects": len(gc.get_objects()), "files": len(os.listdir("/proc/self/fd")),
                 "logs": logs, "wall_s": report.wall_s}
        with open("meter.jsonl", "a") as f:
            f.write(json.dumps(meter) + "\\n")

from stackproof.train import start
start.RunLog = Meter
"""
RUN = METERED + NO_PREFLIGHT.replace("main()", "main(sys.argv[1:-1])")
READINGS = 40
MIB = 2**20


@pytest.mark.slow
def test_memory_open_files_and_log_bytes_per_step_stay_as_they_are(tmp_path, text_file, cli_cache):
    steps = scaled(400, 100_000)
    rare = {f"{n}__every": str(max(25, steps // 400)) for n in ("eval", "checkpoint")}
    # At most 100: what the gate of cadence allows between two samples.
    rare["sample__every"] = str(min(100, steps // 16))
    sizes = {"train__max_steps": str(steps), "train__tokens_per_step": "128"}
    small = {"model__d_model": "16", "model__d_ff": "32", "train__micro_batch_size": "2"}
    arguments = tiny(text_file, **rare, **sizes, **small, **{"stop__kind": '"never"'})
    arguments = [a for i, a in enumerate(arguments) if not _of_the_stop_rule(arguments, i)]
    # A model of this size that learns its few texts by heart has ever larger gradients.
    waiver = '{id = "runtime.trend", reason = "few texts for many steps", expires = "9999-12-31"}'
    arguments += ["--set", f"gates.waive=[{waiver}]"]
    environment = {**os.environ, "STACKPROOF_CACHE": str(cli_cache)}
    every = str(steps // READINGS)
    command = Command(
        "train", *arguments, "--run-dir", "run", every,
        folder=tmp_path, environment=environment, code=RUN,
    )  # fmt: skip
    done = command.wait()
    assert done.code == 0, done.err[-2000:]
    meter = [json.loads(line) for line in (tmp_path / "meter.jsonl").read_text().splitlines()]
    assert len(meter) == READINGS
    # The first quarter warms caches up. The medians are 62 % of the steps apart.
    early, late = meter[READINGS // 4 : READINGS // 2], meter[-READINGS // 4 :]
    objects = median(m["objects"] for m in late) - median(m["objects"] for m in early)
    # One object kept per step would be 250 in the short round; measured 0.
    assert objects < 50, f"{objects} Python objects in {steps} steps"
    # Memory outside of Python: a leak of 1 kB per step would be 60 MiB in the long round.
    growth = median(m["memory"] for m in late) - median(m["memory"] for m in early)
    assert growth < 16 * MIB, f"{growth / MIB:.1f} MiB in {steps} steps"
    assert max(m["files"] for m in late) <= max(m["files"] for m in early)
    per_step = [
        (b["logs"]["metrics.jsonl"] - a["logs"]["metrics.jsonl"]) / (b["step"] - a["step"])
        for a, b in ((meter[0], meter[READINGS // 2]), (meter[READINGS // 2], meter[-1]))
    ]
    # Numbers get one or two digits longer.
    assert 0.9 < per_step[1] / per_step[0] < 1.1, per_step
    print(
        f"{steps} steps: memory {growth / MIB:+.1f} MiB, {objects:+.0f} objects, "
        f"{late[-1]['files']} open files, {per_step[1]:.0f} log bytes per step, median step "
        f"{1e3 * median(m['wall_s'] for m in early):.2f} ms early, "
        f"{1e3 * median(m['wall_s'] for m in late):.2f} ms late"
    )


def _of_the_stop_rule(arguments: list[str], i: int) -> bool:
    """Whether an argument sets a value that another stop rule has."""
    shown = arguments[i] if arguments[i] != "--set" else arguments[i + 1]
    return shown.startswith("stop.expected_gain_nats")
