"""What runs before step 1: the preflight gates."""

from collections.abc import Callable

import torch

from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.prepare import Dataset
from stackproof.subject.assemble import subject_of
from stackproof.train.state import TrainState


def preflight(
    state: TrainState,
    dataset: Dataset,
    keeper: Gatekeeper,
    progress: Callable[..., None],
    *,
    n_eval_batches: int | None,
) -> int:
    """Run every preflight gate on the state of a run, before its first update. Torch's random state
    and the run's own are the same afterwards. Returns the number of held-out batches to use.

    Raises DataError if the held-out split is too short, and GateFailed for the first red gate that
    halts, after all gates were run.
    """
    device, settings = state.device, {"state": state, "n_eval_batches": n_eval_batches}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        subject = subject_of(state.cfg, dataset, device, **settings)
        n_eval_batches = subject.stopping.n_eval_batches
        keeper.preflight(subject, progress)
    return n_eval_batches
