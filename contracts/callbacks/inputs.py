"""The batches that enter a model, as events.

B batch, T tokens
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.callbacks import batch, probe
from stackproof.contracts.callbacks.settings import TrainerSettings
from stackproof.contracts.events import ModelInput, ModuleModes, RowHashes


class InputReader:
    """Reads each batch before the forward pass. `batch` is the one that the trainer drew last; its
    mask and labels are used where the model is not given any.
    """

    def __init__(self, model: nn.Module, settings: TrainerSettings):
        self.model, self.settings = model, settings
        self.batch: Mapping[str, Any] = {}
        self.max_length = probe.max_length_of(model)
        embedding = probe.embedding_of(model)
        self.embedding_rows = int(embedding.weight.shape[0]) if embedding is not None else 0
        self.has_dropout = bool(probe.dropout_names(model))

    def training(
        self, step: int, module: nn.Module, named: Mapping[str, Any], ids_BT: Tensor
    ) -> tuple[ModelInput, RowHashes, ModuleModes]:
        """The events of one training batch; `named` are the arguments of the call of `module`."""
        places = named.get("position_ids")
        places = places if isinstance(places, Tensor) else None
        mask, labels = self.mask_and_labels(ids_BT, named)
        pad_id = self.settings.pad_id
        if mask is None and named.get(probe.MASK) is not None:
            # A mask of another shape marks padding that is not read here.
            pad_id, places = None, None
        numbers = batch.read(
            ids_BT, mask, labels, places, pad_id=pad_id, eos_id=self.settings.eos_id
        )
        idle = self.has_dropout and not module.training
        return (
            batch.model_input(
                numbers,
                step=step,
                max_length=self.max_length,
                embedding_rows=self.embedding_rows,
            ),
            batch.row_hashes(numbers.rows, step=step, phase="training"),
            ModuleModes(step, "training", ("",) if idle else ()),
        )

    def modes_of_evaluation(self, step: int) -> ModuleModes:
        """Modules that are in training mode during an evaluation."""
        wrong = tuple(n for n, m in self.model.named_modules() if m.training)
        return ModuleModes(step, "evaluation", wrong)

    def evaluation(
        self, step: int, module: nn.Module, named: Mapping[str, Any], ids_BT: Tensor
    ) -> RowHashes | None:
        """The rows of one held-out batch; None for short rows and for steps of generation."""
        generates = named.get("past_key_values") is not None
        if module.training or generates or ids_BT.shape[1] < batch.SHORT:
            return None
        rows = batch.read_rows(ids_BT, _fitting(named.get(probe.MASK), ids_BT))
        return batch.row_hashes(rows, step=step, phase="evaluation")

    def mask_and_labels(
        self, ids_BT: Tensor, named: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mask and labels of a batch: those that the model is given, else those of the batch that
        the trainer drew, if its ids are the same.
        """
        mask, labels = named.get(probe.MASK), probe.labels_of(named)
        own = probe.ids_of(self.batch) if self.batch else None
        same = own is not None and own.shape == ids_BT.shape
        if same and torch.equal(own.to(ids_BT.device), ids_BT):
            mask = self.batch.get(probe.MASK) if mask is None else mask
            labels = probe.labels_of(self.batch) if labels is None else labels
        return _fitting(mask, ids_BT), _fitting(labels, ids_BT)


def _fitting(value: Any, ids_BT: Tensor) -> Tensor | None:
    """A tensor with one entry for each id, on the device of the ids; None for anything else."""
    fits = isinstance(value, Tensor) and value.shape == ids_BT.shape
    return value.to(ids_BT.device) if fits else None
