"""A script under torchrun with a gate that is red on the last rank alone: `torchrun
--nproc-per-node 2 torchrun_script.py FOLDER`.
"""

import sys
from pathlib import Path

import torch

from tests.contracts.callbacks.rank_jobs import PLAN, UnshiftedOnOne
from tests.contracts.callbacks.stock import GateCallback, arguments, collate, llama, rows

torch.set_num_threads(1)
folder = Path(sys.argv[1])
UnshiftedOnOne(
    llama(),
    arguments(folder, **PLAN),
    train_dataset=rows(),
    data_collator=collate,
    callbacks=[GateCallback(record=folder / "record")],
).train()
