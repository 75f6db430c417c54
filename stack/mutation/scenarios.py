"""The configurations that mutants are tried on, and the commands of each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stackproof.config import RunConfig, load_config
from stackproof.museum.collection import museum_config
from stackproof.mutation.trial import Command, Scenario
from stackproof.spec.records import Record
from stackproof.train import start
from stackproof.train.loop import train as train_run

# By name: values that differ from the run of the museum, a mixture with a bandit, BPE, packed rows,
# dropout, Muon and accumulation; and what is done beside training and evaluation.
SHORT = {"train.max_steps": 12, "eval.every": 6, "checkpoint.every": 6, "sample.every": 4}
PLAIN = {"curriculum.kind": "static", "data.dedup.kind": "exact"}
ADAMW = {"optim.kind": "adamw", "optim.lr": 3e-3}
CONFIGURATIONS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "museum": ({}, ()),
    "resumed": (SHORT | {"checkpoint.async_save": True}, ("resume",)),
    "bfloat16": (
        SHORT
        | PLAIN
        | ADAMW
        | {
            "train.dtype": "bfloat16",
            "train.activation_checkpointing": "blocks",
            "data.tokenizer.kind": "byte",
            "data.packing.kind": "concatenated",
            "model.attention.window": 48,
        },
        (),
    ),
    "experts": (
        SHORT | PLAIN | ADAMW | {"model.ffn.kind": "moe", "data.tokenizer.kind": "char"},
        (),
    ),
    "differential": (
        SHORT
        | PLAIN
        | {
            "model.attention.kind": "differential",
            "model.norm.kind": "layernorm",
            "model.tied_head": False,
            "train.micro_batch_size": 4,
            "schedule.kind": "wsd",
        },
        (),
    ),
    "exported": (SHORT | PLAIN | {"model.dropout": 0.0}, ("export",)),
}

Verb = Callable[[list[str]], object]  # performs a command line; raises what it raises


def scenarios(texts: Path, verb: Verb, names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names; their corpora are in `texts`."""
    made = []
    for name in names:
        changes, further = CONFIGURATIONS[name]
        fixed = {key: (value, f"scenario {name}") for key, value in changes.items()}
        cfg, _ = load_config(museum_config(texts), fixed=fixed)
        own = {"resume": _resume, "export": partial(_export, verb)}
        commands: dict[str, Command] = {"train": _train}
        commands |= {command: own[command] for command in further}
        commands["evaluate"] = partial(_evaluate, verb)
        made.append(Scenario(name, cfg, commands))
    return made


def _train(folder: Path, cfg: RunConfig, only: Sequence[str] | None) -> list[str]:
    return _red(train_run(start.fresh(cfg, (), folder / "run", only=only)))


def _resume(folder: Path, cfg: RunConfig, only: Sequence[str] | None) -> list[str]:
    """Continue at the checkpoint in the middle. The steps are computed a second time."""
    at = cfg.checkpoint.every
    return _red(train_run(start.resume(folder / "run", (), cfg, at=at)))


def _evaluate(verb: Verb, folder: Path, cfg: RunConfig, only: Sequence[str] | None) -> list[str]:
    verb(["evaluate", str(folder / "run"), "--json", "--run-dir", str(folder / "evaluated")])
    return []


def _export(verb: Verb, folder: Path, cfg: RunConfig, only: Sequence[str] | None) -> list[str]:
    out, record = str(folder / "exported"), str(folder / "export-record")
    verb(["export", str(folder / "run"), "--out", out, "--run-dir", record, "--json"])
    return []


def _red(record: Record) -> list[str]:
    """Gates that failed in a run which they did not halt."""
    return [g.id for g in record.gates if g.verdict == "fail"]
