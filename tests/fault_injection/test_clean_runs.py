"""Runs without a fault raise no alarm: drawn configurations, lengths and ends, on a quiet machine
and on a crowded one.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stackproof.config import load_config
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import ConfigError, Stopped
from stackproof.train import loop, start
from stackproof.train.trainer import Callback
from tests.fault_injection.nine_steps import resume, waived
from tests.fault_injection.scale import SEED, STRESS, chance, scaled

N_RUNS, BUSY_PROCESSES = scaled(3, 100), 8
VALUES = {
    "train.dtype": ("float32", "float32", "bfloat16"),  # not every CPU has units for float16
    "train.activation_checkpointing": ("none", "blocks"),
    "train.micro_batch_size": (1, 2, 4),
    "train.tokens_per_step": (2 * 288, 4 * 288),
    "data.packing.kind": ("concatenated", "best-fit"),
    "data.tokenizer.kind": ("bpe", "byte", "char"),
    "data.dedup.kind": ("exact", "near"),
    "curriculum.kind": ("static", "bandit"),
    "model.attention.kind": ("softmax", "differential"),
    "model.attention.window": (None, 48),
    "model.attention.qk_norm": (False, True),
    "model.norm.kind": ("rmsnorm", "layernorm"),
    "model.positions.kind": ("rotary", "learned"),
    "model.ffn.kind": ("swiglu", "gelu", "moe"),
    "model.tied_head": (True, False),
    "model.dropout": (0.0, 0.1),
    "model.depth.kind": ("full", "full", "mixture-of-depths"),
    "optim.kind": ("adamw", "muon"),
    "schedule.kind": ("cosine", "wsd"),
    "schedule.warmup_steps": (1, 8),
    "checkpoint.async_save": (False, True),
    "eval.every": (3, 7),
    "sample.every": (4, 9),
    "checkpoint.every": (5, 8),
    "trace.every": (0, 6),
}
# An early stop that no short run comes to by itself; the gate of stop rules would be red, rightly.
EARLY = {
    "stop.kind": "patience",
    "stop.patience": 2,
    "stop.min_evaluations": 2,
    "stop.min_delta_nats": 100.0,
}


class Stop(Callback):
    """Asks for an end after a step, as a scheduler does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, trainer, report) -> None:
        if trainer.state.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def drawn(draw: random.Random, folder) -> tuple:
    """A configuration that is possible, its values that were drawn, and how its run ends."""
    while True:
        values = {key: draw.choice(options) for key, options in VALUES.items()}
        values |= {"train.max_steps": draw.choice((2, 5, 12, 24, 40)), "seed": draw.randrange(999)}
        end = draw.choice(("last step", "last step", "early stop", "signal"))
        sets = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
        if end == "early stop":
            sets += [f"{key}={json.dumps(value)}" for key, value in EARLY.items()]
            sets += waived("evaluation.stop-rule"), "train.max_steps=40"
        try:
            return load_config(museum_config(folder), sets=tuple(sets))[0], values, end
        except ConfigError:
            continue


@contextmanager
def crowd(n: int) -> Iterator[None]:
    """Other processes that compute without a pause."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("number", range(N_RUNS))
def test_a_run_without_a_fault_raises_no_alarm(museum_folder, tmp_path, private_cache, number):
    draw = chance(f"clean {number}")
    cfg, values, end = drawn(draw, museum_folder)
    busy = BUSY_PROCESSES if STRESS and number % 2 else 0
    told, run = f"SEED={SEED} run {number}, {end}, {busy} busy: {values}", tmp_path / "run"
    with crowd(busy):
        if end == "signal":
            step = draw.randrange(1, cfg.train.max_steps)
            with pytest.raises(Stopped):
                loop.train(start.fresh(cfg, (), run, [Stop(step)]))
            record = resume(run)
        else:
            record = loop.train(start.fresh(cfg, (), run))
    wanted = "early_stopped" if end == "early stop" else "completed"
    red = {g.id: g.message for g in record.gates if g.verdict == "fail" and not g.waiver}

    assert record.status == wanted and not red, (told, red)
