"""Plants in how a run is wired: what a look at the model leaves behind,
and which folders its pointers name.
"""

import shutil

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import checkpoint, run


def moments_cleared():
    original = run.Run._evaluate

    def clearing(self):
        stop = original(self)
        self.state.optimizer.state.clear()
        return stop

    with swap(run.Run, "_evaluate", clearing):
        yield


def draws_from_training():
    original = run.Run._evaluate

    def drawing(self):
        torch.rand(1)
        return original(self)

    with swap(run.Run, "_evaluate", drawing):
        yield


def weights_left_averaged():
    original = run.Run._sample

    def leaving(self):
        original(self)
        with torch.no_grad():
            for p in self.state.model.parameters():
                p.mul_(0.999)

    with swap(run.Run, "_sample", leaving):
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
