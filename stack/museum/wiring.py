"""Plants in which folders a run keeps and points to."""

import shutil

from stackproof.museum.plant import swap, touch
from stackproof.train import checkpoint


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
