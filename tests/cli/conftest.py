"""Runs the real command line in a process of its own."""

import json
import os
from pathlib import Path

import pytest

from tests.processes import STACK, Command, Done


class Stack:
    """`stack …` in a folder, with a private data cache; `code` stands for it where a test changes
    something in its process.
    """

    def __init__(self, folder: Path, cache: Path, code: str = STACK):
        self.folder, self.code = folder, code
        self.environment = os.environ | {"STACKPROOF_CACHE": str(cache)}

    def __call__(self, *arguments: str, code: str | None = None) -> Done:
        """All that the command said, when it has ended."""
        return self.begin(*arguments, code=code).wait()

    def begin(self, *arguments: str, code: str | None = None) -> Command:
        """The command, running."""
        return Command(
            *arguments, folder=self.folder, environment=self.environment, code=code or self.code
        )


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in an empty folder: exit code,
    and the JSON document it prints.
    """
    from stackproof.cli import main, output

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(output, "_emitted", False)  # one process stands for many
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        return ended.value.code or 0, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="session")
def cli_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-cache")


@pytest.fixture
def stack(tmp_path, cli_cache):
    return Stack(tmp_path, cli_cache)


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
