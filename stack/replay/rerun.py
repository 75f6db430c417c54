"""Repeats the training run of a record and compares the result with the record."""

from pathlib import Path

from stackproof.config import recorded_config
from stackproof.replay.bundle import ReproRecorder
from stackproof.spec.errors import IntegrityError
from stackproof.spec.records import Record
from stackproof.spec.renamed_keys import current_override
from stackproof.train.loop import train
from stackproof.train.start import fresh
from stackproof.train.trainer import Callback


def rerun(record: Record, run_dir: Path | None, callback: Callback) -> dict:
    """Repeat a run with the kernels in its record; compare weights by hash and losses by value.

    Raises IntegrityError for a record of another kind than train, EnvironmentUnfit if a kernel
    cannot run here.
    """
    if record.kind != "train":
        raise IntegrityError(
            f"record {record.id} is of kind {record.kind}",
            allowed="train, trace, compare",
            next_step="repeat its command by hand",
        )
    directory = run_dir or Path("runs") / f"rerun-{record.id}"
    cfg, callbacks = recorded_config(record.config), [callback, ReproRecorder()]
    overrides = [current_override(o) for o in record.overrides]
    again = train(fresh(cfg, overrides, directory, callbacks, recorded_in=record.environment))
    names = ("val_loss_nats", "val_bits_per_byte", "train_loss_nats", "tokens_seen", "n_params")
    compared = [{"what": n, "recorded": record.metric(n), "now": again.metric(n)} for n in names]
    weights = [
        {o.name: o.sha256 for o in r.outputs}.get("model.safetensors") for r in (record, again)
    ]
    compared.append({"what": "model.safetensors", "recorded": weights[0], "now": weights[1]})
    for row in compared:
        row["equal"] = row["recorded"] == row["now"]
    return {
        "ok": all(row["equal"] for row in compared),
        "record": record.id,
        "rerun": again.id,
        "run_dir": str(directory),
        "compared": compared,
    }
