"""Builds the sampling order of a run from its curriculum and the sources of its data set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from stackproof.config import (
    BanditCurriculum,
    Built,
    DataConfig,
    Mixture,
    RunConfig,
    StaticCurriculum,
)
from stackproof.data.bandit import BanditSampler
from stackproof.data.manifest import FILE, read_manifest
from stackproof.data.sampler import MixtureSampler, ShuffledSampler, Source, shares
from stackproof.spec.errors import ConfigError, DataError


def sources_of(
    entries: Mapping[str, Mapping[str, Any]], spans: Mapping[str, tuple[int, int]]
) -> list[Source]:
    """Sources of a sampler, from those of a manifest and their windows in the stream; a source
    without a shard has no window.
    """
    return [
        Source(name, *spans.get(name, (0, 0)), *(float(e[k]) for k in ("weight", "cap", "floor")))
        for name, e in entries.items()
    ]


def declared_sources(cfg: DataConfig) -> list[Source]:
    """The sources in a configuration, known before reading text; with one window each."""
    match cfg.corpus:
        case Mixture(sources=sources):
            entries = {s.name: s.model_dump() for s in sources}
        case Built(path=path):
            entries = {e["name"]: e for e in read_manifest(Path(path, FILE))["sources"]}
        case _:
            return []
    return sources_of(entries, dict.fromkeys(entries, (0, 1)))


def run_sampler(
    cfg: RunConfig, dataset: Any, *, seed: int
) -> ShuffledSampler | MixtureSampler | BanditSampler:
    """The sampling order of a run over its data set."""
    seq_len = cfg.model.max_seq_len
    sources = sources_of(dataset.sources, dataset.train.spans(seq_len))
    return make_sampler(
        cfg.curriculum, sources, seed=seed, rows_per_step=cfg.train.tokens_per_step // seq_len
    )


def make_sampler(
    cfg: StaticCurriculum | BanditCurriculum,
    sources: Sequence[Source],
    *,
    seed: int,
    rows_per_step: int,
) -> ShuffledSampler | MixtureSampler | BanditSampler:
    """The declared order; for a single source, a shuffle without mixing.
    Raises ConfigError for unknown names or shares that cannot be satisfied.
    """
    sources = apply_shares(cfg, sources)
    if len(sources) == 1 and isinstance(cfg, StaticCurriculum):
        return ShuffledSampler(sources[0].n_windows, seed, sources[0].name)
    for source in sources:
        if source.cap > 0 and not source.n_windows:
            raise DataError(
                f"source {source.name} holds no window, and its cap is {source.cap:g}",
                next_step=f"give it more text, or --set curriculum.caps.{source.name}=0",
            )
    warmup_rows = cfg.warmup_steps * rows_per_step
    match cfg:
        case StaticCurriculum():
            return MixtureSampler(
                sources, seed, warmup_rows=warmup_rows, warmup_sources=cfg.warmup_sources
            )
        case BanditCurriculum():
            return BanditSampler(sources, seed, cfg, warmup_rows=warmup_rows)
        case _:
            assert_never(cfg)


def apply_shares(
    cfg: StaticCurriculum | BanditCurriculum, sources: Sequence[Source]
) -> list[Source]:
    """Sources with their values overridden by the configuration.
    Raises ConfigError for an unknown source.
    """
    names = [s.name for s in sources]
    tables = {
        "weights": cfg.weights,
        "caps": cfg.caps,
        "floors": cfg.floors,
        "warmup_sources": dict.fromkeys(cfg.warmup_sources, 0),
    }
    for key, table in tables.items():
        if unknown := [n for n in table if n not in names]:
            raise ConfigError(
                f"curriculum.{key} names a source that is not there",
                value=unknown[0],
                allowed=", ".join(names),
                next_step="correct the name",
            )
    made = [
        replace(
            s,
            weight=cfg.weights.get(s.name, s.weight),
            cap=cfg.caps.get(s.name, s.cap),
            floor=cfg.floors.get(s.name, s.floor),
        )
        for s in sources
    ]
    shares(made)
    return made


# --- continuing under another curriculum ----------------------------------------------------------

SHARES = ("weight", "cap", "floor")


def sampler_at(
    cfg: RunConfig, dataset: Any, state: dict[str, Any]
) -> ShuffledSampler | MixtureSampler | BanditSampler:
    """The order of an earlier run, at the state in its checkpoint."""
    order = run_sampler(cfg, dataset, seed=0)
    order.load_state_dict(state)
    return order


def rebased(order: ShuffledSampler | MixtureSampler | BanditSampler, cursor: int) -> dict[str, Any]:
    """State from which another curriculum continues with the windows that this order has not drawn
    in the current epoch.

    It holds the position, and the number of samples drawn from each source so far.
    """
    counts = order.counts(cursor).tolist()
    return {"start": cursor, "base": {s.name: n for s, n in zip(order.sources, counts) if n}}


def changes(
    former: RunConfig, cfg: RunConfig, dataset: Any, state: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Old and new value of every share by source, and of every other key of
    the curriculum that differs.
    """
    old = {s.name: s for s in sampler_at(former, dataset, state).sources}
    new = {s.name: s for s in run_sampler(cfg, dataset, seed=0).sources}
    shares = [
        {
            "source": name,
            "share": share,
            "old": getattr(old.get(name), share, None),
            "new": getattr(new.get(name), share, None),
        }
        for name in dict.fromkeys((*old, *new))
        for share in SHARES
    ]
    before, after = (
        c.curriculum.model_dump(mode="json", exclude={"weights", "caps", "floors"})
        for c in (former, cfg)
    )
    keys = [
        {"key": f"curriculum.{k}", "old": before.get(k), "new": after.get(k)}
        for k in dict.fromkeys((*before, *after))
        if before.get(k) != after.get(k)
    ]
    return {"shares": shares, "keys": keys}
