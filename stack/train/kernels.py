"""The kernels of a run: chosen when it begins, named by its record, used again by a resume or
a rerun.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from stackproof.config import RunConfig
from stackproof.data.prepare import cache_directory
from stackproof.kernels import choice, dispatch, measured

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
