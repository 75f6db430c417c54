"""Import a model as a run: a run directory with a step-0 checkpoint and fresh optimizer state."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from stackproof.config import RunConfig
from stackproof.data.tokenizer import Tokenizer
from stackproof.evaluate.stopping import make_stop_rule
from stackproof.evidence.file_lock import aside, refuse_occupied
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.files import remedy, sync
from stackproof.spec.records import Record
from stackproof.train import checkpoint
from stackproof.train import optimizer as opt
from stackproof.train.rng import seed_default_generators
from stackproof.train.run_dir import RunDir
from stackproof.train.state import TrainState


def first_state(cfg: RunConfig, model: nn.Module) -> TrainState:
    """The state of a run at step 0, with data position 0."""
    seed_default_generators(cfg.seed)
    sampler = SimpleNamespace(state_dict=lambda: {"start": 0, "base": {}})
    return TrainState(
        cfg=cfg,
        model=model,
        optimizer=opt.make_optimizer(model, cfg.optim),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        data_loader=SimpleNamespace(cursor=0, sampler=sampler),
        stopper=make_stop_rule(cfg.stop),
        probe=opt.ParameterProbe(model),
        device=torch.device("cpu"),
        features=model.hidden_states,
    )


def write_run(
    run_dir: Path,
    cfg: RunConfig,
    model: nn.Module,
    tokenizer: Tokenizer,
    builder: RecordBuilder,
    source: Mapping[str, Any],
    **ending: Any,
) -> Record:
    """Write the run directory, its record last; `ending` is passed to the record.
    After a failure `run_dir` does not exist. Raises EnvironmentUnfit if it cannot be written.
    """
    refuse_occupied(run_dir, "--out")
    try:
        with aside(run_dir) as folder:
            temporary = RunDir(folder)
            record = _write(temporary, cfg, model, tokenizer, builder, source, **ending)
            sync(folder)
            if run_dir.exists():
                run_dir.rmdir()
            os.replace(folder, run_dir)
            sync(run_dir.parent)
    except OSError as e:
        raise EnvironmentUnfit(
            f"the run directory could not be written: {e}",
            next_step=f"{remedy(e)}, or choose another --out",
        ) from e
    return record


def _write(
    temporary: RunDir,
    cfg: RunConfig,
    model: nn.Module,
    tokenizer: Tokenizer,
    builder: RecordBuilder,
    source: Mapping[str, Any],
    **ending: Any,
) -> Record:
    """All files of the run directory, its record last."""
    temporary.create()
    tokenizer.save(temporary.path / "tokenizer.json")
    temporary.write_run(builder, device="cpu", imported_from=dict(source))
    state = first_state(cfg, model)
    document = checkpoint.state_document(
        state,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        gates={},
        record=builder.id,
    )
    folder = checkpoint.save(temporary.checkpoints, state, document)
    builder.outputs = [
        artefact(folder / f, root=temporary.path) for f in (*checkpoint.FILES, "manifest.json")
    ]
    builder.outputs.append(artefact(temporary.path / "tokenizer.json", root=temporary.path))
    record = builder.finish(temporary.path, **ending)
    temporary.seal()
    return record
