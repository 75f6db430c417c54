"""`stack train`."""

import math
import os
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from stackproof.cli.options import Json, Plugins, Sets, examples
from stackproof.cli.output import emit, note, print_line
from stackproof.cli.paths import BUILDS_ONE, DATA_SET, MAKES_ONE, RUN, folder_at
from stackproof.config import trackers
from stackproof.distributed import output, started
from stackproof.distributed.mesh import mesh_sizes
from stackproof.spec.canonical import leaves
from stackproof.spec.errors import EnvironmentUnfit, UsageError
from stackproof.spec.records import Record

app = Typer()
EXAMPLES = examples(
    "stack train",
    "stack train pocket-code --set train.max_steps=200",
    "stack train --set data.corpus.kind=files --set data.corpus.paths='[\"notes/\"]'",
    "stack train --resume runs/pocket-1",
    "stack train pocket --run-dir runs/night --auto-resume",
    "stack train --fork runs/pocket-1 --set optim.lr=1e-3",
    "stack train --data data/mix --set curriculum.kind=bandit",
    "stack train --continue-from runs/pocket-1 --set curriculum.caps.wikitext=0.2",
    "stack train --depth 3 --dry-run",
    "stack train gpt2-124m --nproc 1024 --dry-run --assume memory_bytes=40e9",
)
# Quantities of a dry run that several processes have otherwise, beside those of memory.
OF_ONE_PROCESS = ("accumulation", "eta_s", "this_machine_refuses")
REACHED_SHARE = (
    0.5  # share of the matrix-product rate; small models spend the rest on memory traffic
)


@app.command(epilog=EXAMPLES)
def train(
    recipe: Annotated[
        str | None, Argument(metavar="[RECIPE | run.toml]", help="A recipe's name or a TOML file.")
    ] = None,
    set_: Sets = None,
    run_dir: Annotated[
        Path | None, Option(help="Folder of the run. Default: runs/<recipe>-<n>.")
    ] = None,
    resume: Annotated[
        Path | None, Option(help="Continue the run in this folder, bit for bit.")
    ] = None,
    at: Annotated[
        int | None,
        Option(min=0, help="With --resume: the step to continue from. Default: the latest."),
    ] = None,
    auto_resume: Annotated[
        bool,
        Option(
            "--auto-resume",
            help="Continue the run that --run-dir holds, or begin it. For jobs that a scheduler "
            "starts again.",
        ),
    ] = False,
    fork: Annotated[
        Path | None, Option(help="Start a child run from this run's checkpoint, with changes.")
    ] = None,
    continue_from: Annotated[
        Path | None,
        Option(
            "--continue-from",
            "--polish",
            help="Continued pre-training: continue this run under another mixture, with "
            "its history.",
        ),
    ] = None,
    depth: Annotated[
        int | None,
        Option(
            min=1,
            max=64,
            help="Instead of a recipe: number of layers, from which all other sizes are derived.",
        ),
    ] = None,
    data: Annotated[
        Path | None, Option(help="Train on a folder written by stack data build.")
    ] = None,
    plugin: Plugins = None,
    device: Annotated[str | None, Option(help="auto, cpu or cuda.")] = None,
    nproc: Annotated[
        int,
        Option(min=1, help="Processes on this machine; parallel.* divides the run among them."),
    ] = 1,
    restarts: Annotated[
        int,
        Option(min=0, help="With --nproc: how often to start again after a process was lost."),
    ] = 0,
    tracker: Annotated[
        list[str] | None, Option(help="Mirror metrics to a tracker: tensorboard. Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Print the resolved configuration and its arithmetic, then stop. With --nproc "
            "also the memory, communication and predicted step time of each rank.",
        ),
    ] = False,
    assume: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            help="With --nproc and --dry-run: what the prediction assumes of the machines, such as "
            "memory_bytes=80e9. Repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> int | None:
    """Train a model with its gates and write a record.

    Without arguments it trains a model of about a million parameters on the documentation of the
    installed Python, offline, in a few minutes.
    """
    parent = fork or continue_from
    if sum(map(bool, (resume, fork, continue_from))) > 1:
        raise UsageError(
            "--resume, --fork and --continue-from exclude each other",
            next_step="--resume keeps the configuration, --continue-from changes the mixture, "
            "--fork may change anything",
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
    if auto_resume and (resume or not run_dir):
        raise UsageError(
            "--auto-resume continues or begins the run of --run-dir",
            value=f"--resume {resume}" if resume else "no --run-dir",
            next_step="drop --resume" if resume else "add --run-dir DIR",
        )
    if at is not None and not resume:
        raise UsageError(
            "--at chooses a checkpoint of --resume",
            value=f"--at {at}",
            next_step="add --resume DIR; --fork takes the folder of a step",
        )
    runs = {"--resume": resume, "--fork": fork, "--continue-from": continue_from}
    for flag, folder in runs.items():
        if folder is not None:
            folder_at(folder, flag, allowed=RUN, next_step=MAKES_ONE)
    if unknown := [name for name in tracker or () if name not in trackers.NAMES]:
        raise UsageError(
            "--tracker is unknown",
            value=unknown[0],
            allowed=", ".join(trackers.NAMES),
            next_step="correct the name",
        )
    if started.n_started() > 1 and (folder := resume or run_dir):
        output.divide_output(folder, started.rank(), started.restarts() + 1)
    sets = tuple(set_ or ())
    if data is not None:
        folder_at(data, "--data", allowed=DATA_SET, next_step=BUILDS_ONE)
        sets = ("data.corpus.kind=built", f"data.corpus.path={dumps(str(data))}", *sets)
    cfg, overrides = _resolve(recipe, depth, data, resume, parent, sets=sets, device=device)
    if assume and not (dry_run and nproc > 1):
        raise UsageError(
            "--assume is for the plan of a run on several ranks",
            value=f"--assume {assume[0]}",
            next_step="add --dry-run and --nproc N with N of at least 2, or drop it",
        )
    if restarts and nproc == 1:
        raise UsageError(
            "--restarts is for processes that --nproc starts",
            value=f"--restarts {restarts}, --nproc 1",
            next_step="add --nproc N with N of at least 2, or drop it; torchrun has --max-restarts",
        )
    if dry_run:
        return _dry_run(cfg, overrides, nproc, assume or (), json)
    from stackproof.data import plugins
    from stackproof.train.run_dir import RunDir, default_run_dir

    if resume and run_dir:
        raise UsageError(
            "--resume continues in its own folder",
            value=str(run_dir),
            next_step="drop --run-dir, or use --fork",
        )
    if started.is_worker() and not (resume or run_dir):
        raise UsageError(
            "the processes of a run need one folder, and each would choose its own",
            next_step="add --run-dir DIR, a folder that all of them share",
        )
    directory = resume or run_dir or default_run_dir(cfg.recipe, cfg.seed)
    if nproc > 1 and not started.is_worker():
        if not (resume or auto_resume):  # its restarts continue what they find
            RunDir(directory).refuse_occupied()
        named = () if resume or run_dir else ("--run-dir", str(directory))
        return _launched(cfg, nproc, (*sys.argv[1:], *named), directory, restarts)
    named = (*(plugin or ()), *plugins.chosen(cfg.data, overrides))
    with plugins.permitted(named, origin=str(resume or parent or plugins.UNNAMED)):
        lineage = {"parent": parent, "continued": bool(continue_from)}
        continues = {"resume": resume, "at": at, "auto": auto_resume}
        with output.traceback_kept(directory, started.rank() if started.n_started() > 1 else None):
            record = _run(cfg, overrides, directory, continues, tracker or (), json, lineage)
    if record is None:
        return
    document = {"run_dir": str(directory), "record": record.id}
    document |= {"status": record.status, "exit_code": record.exit_code}
    document["metrics"] = {name: m.value for name, m in record.metrics.items()}
    document["gates"] = [{"id": g.id, "verdict": g.verdict} for g in record.gates]
    emit(document, json)


def _launched(
    cfg: Any, nproc: int, arguments: Sequence[str], directory: Path, restarts: int
) -> int:
    """Run the command in several processes: its exit code. Raises EnvironmentUnfit before one is
    started if they cannot all have the device; cores that are too few are only noted.
    """
    from stackproof.distributed.launch import launch
    from stackproof.distributed.process_group import require_devices
    from stackproof.train.device import resolve_device

    mesh_sizes(cfg, nproc)
    n_cores = os.cpu_count() or 1
    if resolve_device(cfg.device).type == "cuda":
        require_devices(nproc)
    elif nproc > n_cores:
        note(f"{nproc} processes on {n_cores} cores: they wait for each other's cores")
    return launch(arguments, nproc, directory, max_restarts=restarts, note=note)


def _run(
    cfg: Any,
    overrides: Any,
    directory: Path,
    continues: dict[str, Any],
    tracker: Sequence[str],
    quiet: bool,
    lineage: dict[str, Any],
) -> Record | None:
    """Train as one of the processes of a run. Returns the record, on rank 0."""
    from stackproof.cli.console import ProgressReporter
    from stackproof.distributed.process_group import joined
    from stackproof.replay.bundle import ReproRecorder
    from stackproof.train import loop, restart, start
    from stackproof.train.callbacks import TRACKERS
    from stackproof.train.device import resolve_device

    device = resolve_device(cfg.device)
    with joined(cfg, device, directory) as ranks:
        callbacks = []
        if ranks.is_main:
            if (n := ranks.sizes.world_size) > 1:
                library = "nccl" if device.type == "cuda" else "gloo"
                note(f"on {n} ranks: {ranks.sizes} ({device.type}, {library})")
            watching = (TRACKERS[name]() for name in tracker)
            callbacks = [ProgressReporter(quiet=quiet), ReproRecorder(), *watching]
        resume, at = continues["resume"], continues["at"]
        if ranks.restarted and resume:
            at = None
        elif not resume:
            with ranks.together():
                goes_on = ranks.is_main and (continues["auto"] or ranks.launcher.has_begun())
                begun = goes_on and restart.is_begun(directory, cfg, lineage["parent"])
            if ranks.from_main(begun):
                resume, overrides = directory, restart.not_yet_stated(directory, overrides)
        if not resume:
            return loop.train(
                start.fresh(cfg, overrides, directory, callbacks, ranks=ranks, **lineage)
            )
        given = (resume, overrides, cfg, callbacks)
        done = start.completed(*given, ranks=ranks) if at is None else None
        return done or loop.train(start.resume(*given, ranks=ranks, at=at))


def _resolve(
    recipe: str | None,
    depth: int | None,
    data: Path | None,
    resume: Path | None,
    parent: Path | None,
    *,
    sets: tuple[str, ...],
    device: str | None,
) -> tuple[Any, Any]:
    """The configuration with its overrides: that of a run, of a run file with its recipe, of a
    named recipe, or of a depth.
    """
    from stackproof.config import load_config, read_run_file
    from stackproof.recipes import recipe as named
    from stackproof.recipes.depth import corpus_of
    from stackproof.recipes.depth import depth as from_depth

    file = None
    if resume or parent:
        from stackproof.train.start import parent_config, read_config

        base = read_config(resume) if resume else parent_config(parent)
    elif depth:
        base = from_depth(depth, corpus_of(data) if data else None)
    elif recipe and (recipe.endswith(".toml") or Path(recipe).is_file()):
        file = Path(recipe)
        base = named(read_run_file(file).get("recipe", "pocket"))
    else:
        base = named(recipe or "pocket")
    fixed = {"device": (device, "--device")} if device else None
    return load_config(base, run_file=file, sets=sets, fixed=fixed)


def _dry_run(cfg: Any, overrides: Any, nproc: int, assumed: Sequence[str], as_json: bool) -> None:
    """Print the configuration and the quantities computed from it, also those of each of several
    ranks. Reads no data, and builds no model but one without values.
    """
    if nproc > 1:
        mesh_sizes(cfg, nproc)
    if cfg.data.corpus.kind in ("mixture", "built"):
        from stackproof.data.curriculum import apply_shares, declared_sources

        apply_shares(cfg.curriculum, declared_sources(cfg.data))
    derived = _derived(cfg)
    ranks = {}
    if nproc > 1 and (vocab_size := _vocab_size(cfg)) is not None:
        from stackproof.cli.rank_plan import planned

        probed = derived.get("probed_flops_per_s", 0.0)  # without torch, no plan either
        ranks = {"ranks": planned(cfg, vocab_size, nproc, assumed, probed)}
    document = {
        "config": cfg.to_dict(),
        "overrides": [o.model_dump(by_alias=True) for o in overrides],
        "derived": derived | ranks,
    }
    if emit(document, as_json):
        return
    from stackproof.cli.rank_plan import print_plan, quantity

    origins = {o.key: o.source for o in overrides}
    for key, value in leaves(document["config"]):
        print_line(f"{key} = {value}" + (f"    # from {origins[key]}" if key in origins else ""))
    for key, value in derived.items():
        of_one = key in OF_ONE_PROCESS or (key.endswith("_bytes") and key != "checkpoint_bytes")
        whose = " of one process on this machine" if ranks and of_one else ""
        print_line(f"# {key}{whose}: {quantity(key, value)}")
    if ranks:
        print_plan(ranks["ranks"])
    if cfg.data.tokenizer.kind == "bpe":
        print_line(
            "# a corpus too small for this number of merges gives a smaller vocabulary and fewer "
            "parameters"
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
    if (vocab_size := _vocab_size(cfg)) is None:
        return derived
    model = cfg.model.model_dump()
    per_token = flops_per_token(model, vocab_size, cfg.model.max_seq_len)
    n_params = parameter_count(model, vocab_size)
    derived |= {
        "vocab_size": vocab_size,
        "n_params": n_params,
        "tokens_per_parameter": round(derived["tokens"] / n_params, 2),
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
    eta_s = math.ceil(derived["flops"] / (REACHED_SHARE * rate))
    derived |= {"probed_flops_per_s": round(rate), "eta_s": eta_s}
    refusal = _refusal(cfg, vocab_size, device)
    return derived | ({"this_machine_refuses": refusal} if refusal else {})


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
