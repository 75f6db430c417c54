"""`stack inspect`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from stackproof.cli.options import Checkpoint, Json
from stackproof.cli.output import emit, print_facts, print_line, print_table
from stackproof.cli.paths import model_at
from stackproof.spec.errors import CheckpointError, IntegrityError, StackproofError, UsageError
from stackproof.spec.rank_log import FIGURES, FILE, RankTable, rank_table

app = Typer()


@app.command()
def inspect(
    model: Checkpoint,
    verify: Annotated[
        bool,
        Option(
            "--verify",
            help="Compare every file of a run directory with its hash: checkpoints, logs, record.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show architecture, tensors, counts and checksum of a checkpoint. Exit code 5 if it is
    INVALID, or if --verify finds a changed, missing or added file.
    """
    from stackproof.spec.formulas import parameter_count
    from stackproof.train import checkpoint

    if verify:
        return _verify(model_at(model), json)
    document = _described(checkpoint.find(model_at(model)))
    if document["checksum"] == "VALID":
        document["n_params_formula"] = parameter_count(document["model"], document["vocab_size"])
    if table := _ranks_of(model_at(model)):
        document |= {"mesh": dict(table.mesh), "ranks": table.rows()}
    if not emit(document, json):
        print_facts("Checkpoint", document, "tensors", "model", "mesh", "ranks")
        if table:
            _print_ranks(table)
        if "tensors" in document:
            rows = [
                [t["name"], "×".join(map(str, t["shape"])), t["dtype"], f"{t['numel']:,}"]
                for t in document["tensors"]
            ]
            print_table("Tensors", ["name", "shape", "dtype", "parameters"], rows)
    if document["checksum"] == "INVALID":
        raise CheckpointError(
            "checksum INVALID: " + document["problem"],
            value=document["value"],
            next_step="stack train --resume DIR --at STEP takes an older step folder",
        )


def _ranks_of(model: Path) -> RankTable | None:
    """The ranks of the run that a run directory, or a checkpoint in one, belongs to; None for a run
    of one process. Raises IntegrityError if their log has another form.
    """
    from stackproof.train.run_dir import RunDir, parent_run

    directory = RunDir(parent_run(model))
    try:
        return rank_table(directory.lines(FILE))
    except (ValueError, TypeError, LookupError) as e:
        raise IntegrityError(
            f"{directory.path / FILE} cannot be read",
            value=f"{type(e).__name__}: {e}",
            allowed="the lines that a run has written",
            next_step="restore the file",
        ) from e


def _print_ranks(table: RankTable) -> None:
    """The mesh, and a row of each rank."""
    mesh = " × ".join(f"{name} {size}" for name, size in table.mesh.items())
    rows = [
        [
            row["rank"],
            f"{row['replicate']}, {row['shard']}, {row['tensor']}",
            row.get("device_name") or row.get("cpu", row["device"]),
            *(f"{row[name]:.3g}" if name in row else "–" for name in FIGURES),
        ]
        for row in table.rows()
    ]
    figures = ["step, s", "own, s", "communication", "exposed", "peak, bytes"]
    columns = ["rank", "place", "device", *figures]
    print_table(f"Mesh: {mesh}", columns, rows)
    if not table.n_profiled:
        print_line(
            "– : no step was profiled. The first one comes after half of parallel.compare_every "
            "steps; --set parallel.compare_every=N profiles earlier"
        )


def _verify(run: Path, json: bool) -> None:
    """Report every difference between the files of a run directory and their hashes.
    Raises CheckpointError if there is one, UsageError for another folder.
    """
    from stackproof.spec import checksums
    from stackproof.train.run_dir import RunDir

    if not (run / "run.json").exists() and not (run / checksums.FILE).exists():
        raise UsageError(
            "--verify needs a run directory",
            value=str(run),
            allowed="a folder with run.json",
            next_step="stack inspect MODEL verifies one checkpoint",
        )
    sealed = (run / checksums.FILE).is_file()
    problems = list(dict.fromkeys(_problems(run)))
    document = {"path": str(run), "ended": sealed, "files": len(RunDir(run).files())}
    if not emit(document | {"ok": not problems, "problems": problems}, json):
        for problem in problems:
            print_line(problem, "red")
        state = "ended" if sealed else "has not ended, so that its logs may grow"
        verdict = f"{len(problems)} problem(s)" if problems else "all hashes hold"
        print_line(f"{run}: {document['files']} files of a run that {state}: {verdict}")
    if problems:
        raise CheckpointError(
            f"{run} is not as it was written: {problems[0]}",
            value=f"{len(problems)} problem(s)",
            allowed="every file with the bytes of its hash",
            next_step=f"restore them; stack train --resume {run} --at STEP takes an intact step",
        )


def _problems(run: Path) -> Iterator[str]:
    """What is wrong with the files of a run directory: its checksums, checkpoints, logs, run.json
    and record.
    """
    from stackproof.spec import checksums
    from stackproof.train import checkpoint, checkpoint_folders
    from stackproof.train.run_dir import RunDir

    directory = RunDir(run)
    if (run / checksums.FILE).exists():
        try:
            yield from checksums.changed(run, directory.files())
        except IntegrityError as e:
            yield e.what
    for path in directory.odd_entries():
        yield f"{path} is no regular file with a printable name"
    for folder in checkpoint_folders.step_folders(directory.checkpoints):
        names = {p.name for p in folder.iterdir()}
        try:
            known = {path.name for path in checkpoint.files_of(folder)}
            for name in sorted(names - known):
                yield f"{folder / name} is no file of a checkpoint"
            state = checkpoint.verify(folder)
            if not _is_file_of(state["tokenizer_sha256"], run / "tokenizer.json"):
                yield f"{run / 'tokenizer.json'} is not the tokenizer of {folder.name}"
            if state["run"] and folder == checkpoint_folders.pointed(
                directory.checkpoints, "latest"
            ):
                directory.require_logs(state["run"]["logs"])
        except StackproofError as e:
            yield e.what
    for pointer in ("latest", "best"):
        try:
            folder = checkpoint_folders.pointed(directory.checkpoints, pointer)
        except CheckpointError as e:
            yield e.what
            continue
        if folder and not folder.is_dir():
            yield f"{directory.checkpoints / pointer} names {folder.name}, which is not there"
    yield from _of_end(run)


def _of_end(run: Path) -> Iterator[str]:
    """What contradicts the way in which a run ended: one that ended before step 1 has no run.json,
    and the record of one that completed comes with checksums.
    """
    from stackproof.spec import checksums
    from stackproof.spec.records import read_record
    from stackproof.train.run_dir import RunDir

    sealed = (run / checksums.FILE).exists()
    if not sealed or (run / "run.json").exists():
        try:
            RunDir(run).read_run()
        except CheckpointError as e:
            yield e.what
    record = run / "metadata.json"
    if not sealed and record.exists():
        try:
            ended = read_record(record).succeeded
        except IntegrityError as e:
            yield e.what
        else:
            if ended:
                yield f"{run / checksums.FILE} is missing; a resume compares and writes it"


def _is_file_of(sha256: str, path: Path) -> bool:
    from stackproof.spec.canonical import sha256_file

    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def _described(folder: Path) -> dict:
    """Architecture, tensors, counts and checksum of a step folder.
    A damaged folder is reported as INVALID.
    """

    from stackproof.config import recorded_config
    from stackproof.spec.canonical import sha256_file
    from stackproof.spec.errors import CheckpointError
    from stackproof.train import checkpoint, checkpoint_folders

    try:
        loaded = checkpoint.load(folder)
    except CheckpointError as e:
        problem = {"problem": e.what, "value": None if e.value is None else str(e.value)}
        return {"path": str(folder), "checksum": "INVALID", **problem}
    state = loaded.state
    dtype = lambda t: str(t.dtype).removeprefix("torch.")  # noqa: E731
    tensors = [
        {"name": n, "shape": list(t.shape), "dtype": dtype(t), "numel": t.numel()}
        for n, t in loaded.model.items()
    ]
    return {
        "path": str(folder),
        "checksum": "VALID",
        "architecture": recorded_config(state["config"]).model.summary(),
        **{k: state[k] for k in ("step", "tokens_seen", "vocab_size")},
        "model": state["config"]["model"],
        "n_params": sum(t["numel"] for t in tensors),
        "n_tensors": len(tensors),
        "layout": checkpoint.layout_in(folder),
        "bytes": sum(path.stat().st_size for path in checkpoint.files_of(folder)),
        "sha256": sha256_file(checkpoint.weights_file(folder)),
        "best": checkpoint_folders.pointed(folder.parent, "best") == folder,
        "tensors": tensors,
    }
