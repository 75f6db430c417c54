"""The configurations that mutants are tried on, and the commands of each."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stackproof.config import RunConfig, load_config
from stackproof.museum.collection import museum_config
from stackproof.mutation.trial import Command, Scenario

BASE = "pocket"  # the recipe that run files name
RUN, MIDDLE, LAST = "{folder}/run", 6, 12
SUITE = """
name = "two"
max_new_tokens = 8

[[domain]]
name = "grammar"
[[domain.prompts]]
id = "statement"
text = "The pass statement"
answer = "The pass statement is a null operation."
checks = [{ kind = "regex", pattern = "null|nothing" }]

[[domain]]
name = "objects"
[[domain.prompts]]
id = "lists"
text = "A list is"
answer = "A list is a mutable sequence."
checks = [{ kind = "contains-fact", needs = [["sequence", "mutable"]] }]
"""
SHORT = {
    "train.max_steps": LAST,
    "eval.every": MIDDLE,
    "checkpoint.every": MIDDLE,
    "sample.every": 4,
    "sample.max_new_tokens": 16,
}
PLAIN = {"curriculum.kind": "static", "data.dedup.kind": "exact"}
ADAMW = {"optim.kind": "adamw", "optim.lr": 3e-3}
EVALUATE = ("evaluate", RUN, "--run-dir", "{folder}/evaluated")
SAMPLE = ("sample", RUN, "--max-new-tokens", "16", "--top-p", "0.9", "--json")


class Configuration(NamedTuple):
    """What differs from the run of the museum: a mixture with a bandit, BPE, packed rows, dropout,
    Muon and accumulation; and the commands after training, with "{folder}" and "{texts}" for the
    folders of the trial and of the corpora. One that is not `drawn` is tried only by its name.
    """

    changes: Mapping[str, Any]
    further: Sequence[Sequence[str]] = (EVALUATE,)
    drawn: bool = True


CONFIGURATIONS: Mapping[str, Configuration] = {
    "museum": Configuration(
        {}, (EVALUATE, ("trace", "stats", RUN, "--run-dir", "{folder}/traced"))
    ),
    "resumed": Configuration(
        PLAIN | {"data.tokenizer.kind": "byte", "checkpoint.async_save": True},
        (("train", "--resume", RUN, "--at", str(MIDDLE)), EVALUATE),
    ),
    "bfloat16": Configuration(
        PLAIN
        | ADAMW
        | {
            "train.dtype": "bfloat16",
            "data.packing.kind": "concatenated",
            "data.split.kind": "tail",
            "model.attention.window": 48,
            "model.positions.kind": "learned",
            "model.ffn.kind": "gelu",
        },
    ),
    "experts": Configuration(
        ADAMW
        | {
            "model.ffn.kind": "moe",
            "train.activation_checkpointing": "blocks",
            "train.micro_batch_size": 1,
        },
    ),
    "differential": Configuration(
        PLAIN
        | {
            "data.tokenizer.kind": "char",
            "model.attention.kind": "differential",
            "model.norm.kind": "layernorm",
            "model.tied_head": False,
            "train.micro_batch_size": 4,
            "schedule.kind": "wsd",
        },
    ),
    "exported": Configuration(
        PLAIN | ADAMW | {"model.dropout": 0.0},
        (
            ("export", RUN, "--out", "{folder}/exported", "--run-dir", "{folder}/export-record"),
            ("evaluate", RUN, "--suite", "{texts}/suite.toml", "--run-dir", "{folder}/audited"),
            SAMPLE,
        ),
    ),
    # A compilation takes longer than all that the others do.
    "compiled": Configuration(PLAIN | ADAMW | {"train.compile": True}, drawn=False),
}
DRAWN = tuple(name for name, own in CONFIGURATIONS.items() if own.drawn)

Verb = Callable[[Sequence[str]], object]  # performs a command line; raises what it raises


def scenarios(texts: Path, verb: Verb, names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names; their corpora are in `texts`, and so are their run files."""
    (texts / "suite.toml").write_text(SUITE)
    made = []
    for name in names:
        file = texts / f"{name}.toml"
        file.write_text(run_file(configuration(name, texts)))
        lines = (("train", str(file), "--run-dir", RUN), *CONFIGURATIONS[name].further)
        commands: dict[str, Command] = {}
        for words in lines:
            commands[_name_of(words)] = partial(_performed, verb, words, texts)
        made.append(Scenario(name, commands))
    return made


def configuration(name: str, texts: Path) -> RunConfig:
    """The configuration of a scenario. Raises ConfigError if no run can have its changes."""
    changes = SHORT | CONFIGURATIONS[name].changes
    fixed = {key: (value, f"scenario {name}") for key, value in changes.items()}
    return load_config(museum_config(texts), fixed=fixed)[0]


def _name_of(words: Sequence[str]) -> str:
    return "resume" if "--resume" in words else "audit" if "--suite" in words else words[0]


def _performed(verb: Verb, words: Sequence[str], texts: Path, folder: Path) -> None:
    verb([word.format(folder=folder, texts=texts) for word in words])


def run_file(cfg: RunConfig) -> str:
    """A configuration as a TOML run file, on top of the recipe BASE."""
    tree = cfg.to_dict() | {"recipe": BASE}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in tree.items())


def _toml(value: Any) -> str:
    match value:
        case dict():
            inner = (f"{name} = {_toml(v)}" for name, v in value.items() if v is not None)
            return f"{{ {', '.join(inner)} }}"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
