"""Runs the real command line in its own process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


class Stack:
    """`stack …` in a folder, with a private data cache and one thread."""

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        self.environment = os.environ | {"STACKPROOF_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def __call__(self, *arguments: str, timeout: float = 240, **environment: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "stack", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def popen(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "stack", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def cli_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-cache")


@pytest.fixture
def stack(tmp_path, cli_cache):
    return Stack(tmp_path, cli_cache)


@pytest.fixture(scope="session")
def tiny_sets(text_file):
    """Overrides that make any recipe train in a second."""
    return tiny(text_file)


def tiny(text_file: Path, **changes: str) -> list[str]:
    """`--set` arguments of a run of a few seconds on real text."""
    values = {
        "data.corpus.kind": "files",
        "data.corpus.paths": f'["{text_file}"]',
        "data.split.validation_frac": "0.2",
        "data.tokenizer.vocab_size": "384",
        "model.d_model": "32",
        "model.n_layers": "2",
        "model.head_dim": "8",
        "model.d_ff": "64",
        "model.max_seq_len": "64",
        "model.dropout": "0.1",
        "train.tokens_per_step": "512",
        "train.micro_batch_size": "4",
        "train.max_steps": "24",
        "schedule.warmup_steps": "4",
        "eval.every": "8",
        "eval.batches": "4",
        "stop.expected_gain_nats": "0.5",
        "sample.every": "8",
        "sample.max_new_tokens": "24",
        "checkpoint.every": "8",
    } | {k.replace("__", "."): v for k, v in changes.items()}
    return [a for k, v in values.items() for a in ("--set", f"{k}={v}")]
