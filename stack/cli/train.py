"""`stack train`."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from stackproof.cli.output import Json, emit, stdout
from stackproof.cli.paths import BUILDS_ONE, DATA_SET, MAKES_ONE, RUN, folder_at
from stackproof.spec.errors import EnvironmentUnfit, UsageError

EXAMPLES = [
    "stack train",
    "stack train pocket-code --set train.max_steps=200",
    "stack train --set data.corpus.kind=files --set data.corpus.paths='[\"notes/\"]'",
    "stack train --resume runs/pocket-1",
    "stack train --fork runs/pocket-1 --set optim.lr=1e-3",
    "stack train --data data/mix --set curriculum.kind=bandit",
    "stack train --continue-from runs/pocket-1 --set curriculum.caps.wikitext=0.2",
    "stack train --depth 3 --dry-run",
]


REACHED_SHARE = (
    0.5  # share of the matrix-product rate; small models spend the rest on memory traffic
)


def register(app: typer.Typer) -> None:
    app.command("train", epilog="Examples: " + " · ".join(EXAMPLES))(train)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE | run.toml]", help="A recipe's name or a TOML file."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: a.b=v. Repeatable.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Folder of the run. Default: runs/<recipe>-<n>."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Continue the run in this folder, bit for bit.")
    ] = None,
    fork: Annotated[
        Path | None,
        typer.Option("--fork", help="Start a child run from this run's checkpoint, with changes."),
    ] = None,
    continue_from: Annotated[
        Path | None,
        typer.Option(
            "--continue-from",
            "--polish",
            help="Continued pre-training: continue this run under another mixture, with "
            "its history.",
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            min=1,
            max=64,
            help="Instead of a recipe: number of layers, from which all other sizes are derived.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Train on a folder written by stack data build.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option("--tracker", help="Mirror metrics to a tracker: tensorboard. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved configuration and its arithmetic, then stop."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train a model with its gates and write a record.

    Without arguments it trains a model of about a million parameters on the documentation of the
    installed Python, offline, in a few minutes.
    """
    parent = fork or continue_from
    if sum(map(bool, (resume, fork, continue_from))) > 1:
        raise UsageError(
            "--resume, --fork and --continue-from exclude each other",
            next_step=(
                "--resume keeps the configuration, --continue-from changes the mixture, --fork may "
                "change anything"
            ),
        )
    if (resume or parent) and (recipe or data or depth):
        raise UsageError(
            "a resumed, forked or continued run takes its configuration from its folder",
            value=recipe or str(data or f"--depth {depth}"),
            next_step="drop it; use --set",
        )
    if recipe and depth:
        raise UsageError(
            "--depth and a recipe exclude each other",
            value=f"{recipe} and --depth {depth}",
            next_step="drop one of them",
        )
    for flag, folder in (
        ("--resume", resume),
        ("--fork", fork),
        ("--continue-from", continue_from),
    ):
        if folder is not None:
            folder_at(folder, flag, allowed=RUN, next_step=MAKES_ONE)
    if data is not None:
        folder_at(data, "--data", allowed=DATA_SET, next_step=BUILDS_ONE)
    sets = (
        *(("data.corpus.kind=built", f"data.corpus.path={dumps(str(data))}") if data else ()),
        *(set_ or ()),
    )
    if dry_run:
        return _dry_run(recipe, depth, data, sets, device, parent or resume, json)
    from stackproof.cli.console import ProgressReporter
    from stackproof.replay.bundle import ReproRecorder
    from stackproof.train import loop, start
    from stackproof.train.callbacks import TRACKERS
    from stackproof.train.run_dir import parent_run

    if unknown := [name for name in tracker or () if name not in TRACKERS]:
        raise UsageError(
            "--tracker is unknown",
            value=unknown[0],
            allowed=", ".join(TRACKERS),
            next_step="correct the name",
        )
    callbacks = [
        ProgressReporter(quiet=json),
        ReproRecorder(),
        *(TRACKERS[name]() for name in tracker or ()),
    ]
    if resume:
        if run_dir:
            raise UsageError(
                "--resume continues in its own folder",
                value=str(run_dir),
                next_step="drop --run-dir, or use --fork",
            )
        changed, overrides = _resolve(start.read_config(resume), None, sets, device)
        given = (resume, overrides, changed, callbacks)
        record = start.completed(*given) or loop.train(start.resume(*given))
        directory = resume
    else:
        base, file = (
            (start.read_config(parent_run(parent)), None) if parent else _base(recipe, depth, data)
        )
        cfg, overrides = _resolve(base, file, sets, device)
        from stackproof.train.run_dir import default_run_dir

        directory = run_dir or default_run_dir(cfg.recipe, cfg.seed)
        run = start.fresh(
            cfg, overrides, directory, callbacks, parent=parent, continued=bool(continue_from)
        )
        record = loop.train(run)
    document = {
        "run_dir": str(directory),
        "record": record.id,
        "status": record.status,
        "exit_code": record.exit_code,
        "metrics": {name: m.value for name, m in record.metrics.items()},
        "gates": [{"id": g.id, "verdict": g.verdict} for g in record.gates],
    }
    emit(document, json)


def _base(recipe: str | None, depth: int | None, data: Path | None):
    """The base configuration (the recipe of a run file, the named recipe, or that of a depth), and
    the run file.
    """
    from stackproof.config import read_run_file
    from stackproof.recipes import recipe as named
    from stackproof.recipes.depth import corpus_of
    from stackproof.recipes.depth import depth as from_depth

    if depth:
        return from_depth(depth, corpus_of(data) if data else None), None
    if recipe and (recipe.endswith(".toml") or Path(recipe).is_file()):
        return named(read_run_file(Path(recipe)).get("recipe", "pocket")), Path(recipe)
    return named(recipe or "pocket"), None


def _resolve(base, file: Path | None, sets: tuple[str, ...], device: str | None):
    from stackproof.config import load_config

    return load_config(
        base, run_file=file, sets=sets, fixed={"device": (device, "--device")} if device else None
    )


def _dry_run(
    recipe: str | None,
    depth: int | None,
    data: Path | None,
    sets: tuple[str, ...],
    device: str | None,
    parent: Path | None,
    as_json: bool,
) -> None:
    """The configuration and the quantities computed from it. Reads no data and builds no model."""

    if parent:
        from stackproof.train.start import read_config

        base, file = read_config(parent), None
    else:
        base, file = _base(recipe, depth, data)
    cfg, overrides = _resolve(base, file, sets, device)
    if cfg.data.corpus.kind in ("mixture", "built"):
        from stackproof.data.curriculum import apply_shares, declared_sources

        apply_shares(cfg.curriculum, declared_sources(cfg.data))
    derived = _derived(cfg)
    document = {
        "config": cfg.to_dict(),
        "overrides": [o.model_dump(by_alias=True) for o in overrides],
        "derived": derived,
    }
    if emit(document, as_json):
        return
    origins = {o.key: o.source for o in overrides}
    for key, value in _lines(document["config"]):
        stdout.print(
            f"{key} = {value}" + (f"    # from {origins[key]}" if key in origins else ""),
            markup=False,
        )
    for key, value in derived.items():
        stdout.print(
            f"# {key}: {value if isinstance(value, str) else format(value, ',')}", markup=False
        )
    if cfg.data.tokenizer.kind == "bpe":
        stdout.print(
            "# a corpus too small for this number of merges gives a smaller vocabulary and fewer "
            "parameters",
            markup=False,
        )


def _derived(cfg) -> dict[str, float | str]:
    """Counts, memory and, if torch is installed, an estimate of the time: the probed rate of this
    machine times the share that the default recipe reaches.
    """
    from stackproof.spec.formulas import flops_per_token, parameter_count
    from stackproof.train.memory import predict_bytes

    derived = {
        "tokens": cfg.train.max_steps * cfg.train.tokens_per_step,
        "accumulation": cfg.accumulation(),
    }
    vocab_size = _vocab_size(cfg)
    if vocab_size is None:
        return derived
    model = cfg.model.model_dump()
    per_token, n_params = (
        flops_per_token(model, vocab_size, cfg.model.max_seq_len),
        parameter_count(model, vocab_size),
    )
    derived |= {
        "vocab_size": vocab_size,
        "n_params": n_params,
        "tokens_per_parameter": round(derived["tokens"] / n_params, 2),
    }
    derived |= {
        "flops_per_token": per_token,
        "flops": per_token * derived["tokens"],
        "checkpoint_bytes": 12 * n_params,
    }
    derived |= {f"{part}_bytes": n for part, n in predict_bytes(cfg, vocab_size).items()}
    try:
        from stackproof.train.device import probe_peak_flops, resolve_device
    except ModuleNotFoundError:
        return derived
    device = resolve_device(cfg.device)
    rate = probe_peak_flops(device)
    derived |= {
        "probed_flops_per_s": round(rate),
        "eta_s": round(derived["flops"] / (REACHED_SHARE * rate)),
    }
    return derived | (
        {"this_machine_refuses": refusal} if (refusal := _refusal(cfg, vocab_size, device)) else {}
    )


def _refusal(cfg, vocab_size: int, device) -> str:
    """Why this machine cannot run the configuration; empty if it can."""
    from stackproof.train.device import refuse_emulated
    from stackproof.train.memory import require_room
    from stackproof.train.state import AUTOCAST

    try:
        require_room(cfg, vocab_size, device)
        refuse_emulated(AUTOCAST[cfg.train.dtype], device, "train.dtype")
    except EnvironmentUnfit as e:
        return f"{e.what}: {e.value}; {e.allowed}"
    return ""


def _vocab_size(cfg) -> int | None:
    """Size of the vocabulary; None if the configuration does not define it."""
    match cfg.data.tokenizer.kind:
        case "bpe":
            return cfg.data.tokenizer.vocab_size
        case "byte":
            return 257
    return None


def _lines(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves = []
    for name, value in tree.items():
        leaves += (
            _lines(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )
    return leaves
