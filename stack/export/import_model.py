"""Import a model as a run: a run directory with a step-0 checkpoint and fresh optimizer state."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from stackproof.config import RunConfig
from stackproof.data.tokenizer import Tokenizer
from stackproof.evaluate.stopping import make_stop_rule
from stackproof.evidence.file_lock import refuse_occupied
from stackproof.spec.building import RecordBuilder, artefact
from stackproof.spec.records import Record
from stackproof.train import checkpoint
from stackproof.train import optimizer as opt
from stackproof.train.rng import seed_dropout
from stackproof.train.run_dir import RunDir
from stackproof.train.state import TrainState


def first_state(cfg: RunConfig, model: nn.Module) -> TrainState:
    """The state of a run at step 0, with data position 0."""
    seed_dropout(cfg.seed)
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
    After a failure `run_dir` does not exist.
    """
    refuse_occupied(run_dir, "--out")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = RunDir(run_dir.parent / f".writing-{run_dir.name}-{os.getpid()}")
    shutil.rmtree(temporary.path, ignore_errors=True)
    try:
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
        if run_dir.exists():
            run_dir.rmdir()
        os.replace(temporary.path, run_dir)
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)
    return record
