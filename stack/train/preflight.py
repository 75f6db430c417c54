"""What runs before step 1: the preflight gates."""

from collections.abc import Callable

import torch

from stackproof.config import RunConfig
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.prepare import Dataset
from stackproof.subject.assemble import subject_of


def preflight(
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    keeper: Gatekeeper,
    progress: Callable[..., None],
    *,
    n_eval_batches: int | None,
) -> int:
    """Run every preflight gate. torch's random state is the same afterwards.
    Returns the number of held-out batches to use.

    Raises DataError if the held-out split is too short, and GateFailed for the first red gate that
    halts, after all gates were run.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        subject = subject_of(cfg, dataset, device, n_eval_batches=n_eval_batches)
        n_eval_batches = subject.stopping.n_eval_batches
        keeper.preflight(subject, progress)
    return n_eval_batches
