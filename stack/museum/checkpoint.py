"""Plants in saving that are more than changed text."""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stackproof.museum.plant import swap
from stackproof.train import checkpoint, sharded_checkpoint

PATIENCE_S = 5.0  # a slow disk; enough for one update of a small model


def wait_for_a_change(moments: Mapping[str, Tensor]) -> None:
    """Wait until training has moved one of the tensors that are about to be written."""
    seen, began = {n: t.clone() for n, t in moments.items()}, time.monotonic()
    while (
        all(torch.equal(t, seen[n]) for n, t in moments.items())
        and time.monotonic() - began < PATIENCE_S
    ):
        time.sleep(0.001)


def snapshot_aliases_live():
    write = checkpoint.write

    def late(root, snapshot, judge):
        live = snapshot.content.tensors
        wait_for_a_change(live["state.safetensors"])
        by_then = {
            file: {n: t.clone() for n, t in tensors.items()} for file, tensors in live.items()
        }
        return write(
            root, replace(snapshot, content=replace(snapshot.content, tensors=by_then)), judge
        )

    with swap(checkpoint, "copies", lambda tensors: tensors), swap(checkpoint, "write", late):
        yield


def parts_alias_live():
    write = sharded_checkpoint.write

    def late(root, snapshot, judge):
        live = snapshot.tensors
        wait_for_a_change({n: t for n, t in live.items() if n.startswith("optim.")})
        by_then = {n: t.clone() for n, t in live.items()}
        return write(root, replace(snapshot, tensors=by_then), judge)

    with (
        swap(sharded_checkpoint, "copies", lambda tensors: tensors),
        swap(sharded_checkpoint, "write", late),
    ):
        yield
