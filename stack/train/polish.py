"""Continuing a run under another mixture: weights, optimizer, schedule and loss history stay;
samples and curriculum state are archived.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackproof.config import RunConfig, validate
from stackproof.data import curriculum
from stackproof.data.order import Order, Source
from stackproof.data.prepare import Dataset
from stackproof.spec.building import artefact, write_atomically
from stackproof.spec.canonical import canonical_json, sha256_file
from stackproof.spec.errors import ConfigError
from stackproof.spec.records import Artefact, Override
from stackproof.train import checkpoint
from stackproof.train.rundir import RunDir

POLISHABLE_KEYS = ("curriculum", "train.log_every", "checkpoint.keep", "gates.waive")
SHARES = ("weight", "cap", "floor")


def refuse(cfg: RunConfig, overrides: Sequence[Override], loaded: checkpoint.Loaded) -> None:
    """Raises ConfigError for a change of anything but the curriculum and what is kept or shown, for
    no change, and for a finished run.
    """
    if loaded.state["step"] >= cfg.train.max_steps:
        raise ConfigError(
            "the run has taken all of its steps, so another mixture would change nothing",
            value=f"step {loaded.state['step']} of {cfg.train.max_steps}",
            next_step=(
                "--polish a checkpoint of an earlier step (DIR/checkpoints/step-…), or --fork "
                "with more train.max_steps"
            ),
        )
    refused = [
        o
        for o in overrides
        if not any(o.key == k or o.key.startswith(k + ".") for k in POLISHABLE_KEYS)
    ]
    if refused:
        raise ConfigError(
            f"polishing changes the mixture alone, and {refused[0].key} is something else",
            value=f"{refused[0].value} from {refused[0].source}",
            allowed=f"{', '.join(POLISHABLE_KEYS)}",
            next_step="stack train --fork DIR changes anything, without the history",
        )
    if cfg.curriculum == validate(loaded.state["config"]).curriculum:
        raise ConfigError(
            "the mixture stays as it is",
            next_step="--set curriculum.… says what changes; --resume changes nothing",
        )


def rebased(loaded: checkpoint.Loaded, dataset: Dataset) -> dict[str, Any]:
    """Where the curriculum of a checkpoint stands: the position,
    and how many samples of each source came before it.

    A new curriculum that starts there goes on with windows nobody has seen in this epoch.
    """
    order = order_of(loaded, dataset)
    counts = order.counts(loaded.state["cursor"]).tolist()
    return {
        "start": loaded.state["cursor"],
        "base": {s.name: n for s, n in zip(order.sources, counts) if n},
    }


def order_of(loaded: checkpoint.Loaded, dataset: Dataset) -> Order:
    """The order a checkpoint was drawing in."""
    order = curriculum.run_order(validate(loaded.state["config"]), dataset, seed=0)
    order.load_state_dict(loaded.state["curriculum"])
    return order


def share_table(old: Sequence[Source], new: Sequence[Source]) -> list[dict[str, Any]]:
    """One row per source and share: what it was and what it is."""
    before, after = ({s.name: s for s in arms} for arms in (old, new))
    return [
        {
            "source": name,
            "share": share,
            "old": getattr(before.get(name), share, None),
            "new": getattr(after.get(name), share, None),
        }
        for name in dict.fromkeys((*before, *after))
        for share in SHARES
    ]


def key_table(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keys of the curriculum, the shares by source aside, that differ."""
    keys = [k for k in dict.fromkeys((*old, *new)) if k not in ("weights", "caps", "floors")]
    return [
        {"key": f"curriculum.{k}", "old": old.get(k), "new": new.get(k)}
        for k in keys
        if old.get(k) != new.get(k)
    ]


def carry_over(
    parent: Path, directory: RunDir, loaded: checkpoint.Loaded, cfg: RunConfig, dataset: Dataset
) -> list[Artefact]:
    """Copy the histories up to the checkpoint, archive samples and curriculum state,
    and write the table of changes.

    Returns the written files as the record names them.
    """
    step, source = loaded.state["step"], RunDir(parent_run(parent))
    for name in ("metrics.jsonl", "curriculum.jsonl"):
        directory.copy_history(source, name, step)
    archive = directory.path / "archive"
    archive.mkdir()
    if (source.path / "samples.jsonl").is_file():
        write_atomically(archive / "samples.jsonl", (source.path / "samples.jsonl").read_bytes())
    write_atomically(archive / "curriculum.json", canonical_json(loaded.state["curriculum"]))
    old_cfg, old, new = (
        validate(loaded.state["config"]),
        order_of(loaded, dataset),
        curriculum.run_order(cfg, dataset, seed=0),
    )
    document = {
        "parent": loaded.state["record"],
        "step": step,
        "model_sha256": sha256_file(loaded.path / "model.safetensors"),
        "shares": share_table(old.sources, new.sources),
        "keys": key_table(
            old_cfg.curriculum.model_dump(mode="json"), cfg.curriculum.model_dump(mode="json")
        ),
        "archived": {p.name: sha256_file(p) for p in sorted(archive.iterdir())},
    }
    write_atomically(directory.path / "polish.json", canonical_json(document))
    return [
        artefact(p, root=directory.path)
        for p in (directory.path / "polish.json", *sorted(archive.iterdir()))
    ]


def parent_run(parent: Path) -> Path:
    """The run directory of what was given: itself, its checkpoints folder, or a step folder."""
    return next(
        (p for p in (parent, parent.parent, parent.parent.parent) if (p / "run.json").is_file()),
        parent,
    )
