"""Assembles the subject of a run."""

import torch

from stackproof.config import RunConfig
from stackproof.contracts.stopping import PairedSpread
from stackproof.contracts.subject import Subject
from stackproof.data.prepare import Dataset
from stackproof.data.subject import BuiltCorpus, RunCurriculum, RunDataLoader, RunTokenizer
from stackproof.subject.checkpoints import RunCheckpoints
from stackproof.subject.declared import RunDeclared
from stackproof.subject.evaluation import RunEvaluation, RunStopping
from stackproof.subject.experts import RunExperts
from stackproof.subject.kernels import RunHalfPrecision, RunKernels
from stackproof.subject.model import RunModel
from stackproof.subject.run import wrapping
from stackproof.subject.sampling import RunSampling
from stackproof.subject.training import RunTraining
from stackproof.train.rng import stream_seed
from stackproof.train.state import TrainState, build_state, make_data_loader


def subject_of(
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    *,
    state: TrainState | None = None,
    n_eval_batches: int | None = None,
) -> Subject:
    """What the preflight gates of a run judge. Nothing else is computed before a gate needs it.

    `state` is the run's own, before its first update; None builds one. `n_eval_batches` is the
    number of held-out batches of a resumed run; None: as many as the stop rule needs.
    """
    parts, state = (cfg, dataset, device), state or build_state(cfg, dataset, device)
    training, evaluation = RunTraining(*parts, state), RunEvaluation(*parts)
    spread = PairedSpread(training, evaluation, cfg.eval.batch_size)
    return Subject(
        declared=RunDeclared(cfg, dataset.tokenizer.vocab_size),
        corpus=BuiltCorpus(dataset),
        data_loader=RunDataLoader(
            dataset.train,
            cfg.model.max_seq_len,
            cfg.seed,
            lambda: make_data_loader(wrapping(cfg), dataset),
        ),
        curriculum=RunCurriculum(cfg, dataset, stream_seed(cfg.seed, "order")),
        tokenizer=RunTokenizer(dataset.tokenizer),
        model=RunModel(*parts, state.model),
        experts=RunExperts(*parts),
        training=training,
        checkpoints=RunCheckpoints(*parts),
        kernels=RunKernels(*parts, state),
        half_precision=RunHalfPrecision(*parts),
        evaluation=evaluation,
        stopping=RunStopping(cfg, dataset, spread, n_eval_batches),
        sampling=RunSampling(*parts),
    )
