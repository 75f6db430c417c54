"""The kernels of a run: chosen when it begins, named by its record,
used again by whoever resumes or repeats it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from stackproof.config import RunConfig
from stackproof.data.prepare import Dataset, cache_directory
from stackproof.kernels import choice, dispatch, measured
from stackproof.kernels.compare import ChosenCall, seen_calls
from stackproof.train import losses
from stackproof.train import step as steps
from stackproof.train.state import declared_autocast, make_reader

ANEW = "use a machine that has it, or stack train --fork DIR, which chooses kernels for this one"


@contextmanager
def kernels_of(
    cfg: RunConfig, device: torch.device, recorded: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Use the kernels of a run on its device until the block ends.

    With `recorded`, the environment of a record or of run.json, those that it names; otherwise
    those of `train.kernels`, where auto also looks at the comparison made on this machine.
    Raises EnvironmentUnfit where one of them cannot run here.
    """
    if recorded is not None:
        choices = choice.of_record(recorded, device, ANEW)
    else:
        choices = choice.of_config(
            cfg.train.kernels,
            device,
            dtype=cfg.train.dtype,
            compiled=cfg.train.compile,
            measurement=measured.read(cache_directory(), choice.device_name(device)),
        )
    with dispatch.using_choices(choices, device):
        yield


def kernel_calls(
    cfg: RunConfig, dataset: Dataset, device: torch.device, build: Callable[[], nn.Module]
) -> Callable[[], list[ChosenCall]]:
    """The calls of operations that one micro-batch of the run makes, loss included, at its own
    shapes and in its own precision.
    """

    def calls() -> list[ChosenCall]:
        wrapping = cfg.model_copy(
            update={"data": cfg.data.model_copy(update={"on_exhausted": "wrap"})}
        )
        model, batch = build().train(), make_reader(wrapping, dataset).draw()
        with torch.no_grad(), declared_autocast(cfg, device), seen_calls() as found:
            x_BTD, _ = model.hidden_states(*steps.on_device(batch, device))
            losses.linear_cross_entropy_sum(x_BTD, model.head_weight, batch.labels.to(device))
        return found

    return calls
