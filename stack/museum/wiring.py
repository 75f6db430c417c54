"""Plants in how a run is wired: what a look at the model leaves behind,
and which folders its pointers name.
"""

import shutil

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import checkpoint, loop


def moments_cleared():
    original = loop.held_out_loss

    def clearing(trainer):
        result = original(trainer)
        trainer.state.optimizer.state.clear()
        return result

    with swap(loop, "held_out_loss", clearing):
        yield


def draws_from_training():
    original = loop.held_out_loss

    def drawing(trainer):
        torch.rand(1)
        return original(trainer)

    with swap(loop, "held_out_loss", drawing):
        yield


def weights_left_averaged():
    original = loop.generate

    def leaving(model, ids, **options):
        drawn = original(model, ids, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.999)
        return drawn

    with swap(loop, "generate", leaving):
        yield


def best_never_moves():
    original = checkpoint.point

    def once(root, name, folder):
        if name == "best" and (root / name).is_file():
            touch()
            return
        original(root, name, folder)

    with swap(checkpoint, "point", once, counted=False):
        yield


def newest_cleared_away():
    def wrong_end(root, keep):
        for folder in sorted(root.glob("step-*"))[keep:]:
            shutil.rmtree(folder)

    with swap(checkpoint, "retain", wrong_end):
        yield
