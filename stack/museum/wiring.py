"""Plants in how a run is wired: what a look at the model leaves behind,
and which folders its pointers name.
"""

import shutil

import torch

from stackproof.museum.plant import plant, swap, touch
from stackproof.train import checkpoint, run


@plant(
    "evaluation.moments-cleared",
    gate="evaluation.leaves-no-trace",
    title="An evaluation clears the optimizer",
    story=(
        "To make room for an evaluation the moments of the optimizer are dropped, and it builds "
        "new ones at the next step. Training goes on as if it had just begun, once per "
        "evaluation. The loss has small teeth that everybody takes for noise."
    ),
    sources=("https://github.com/harubaru/waifu-diffusion/issues/31",),
)
def moments_cleared():
    original = run.Run._evaluate

    def clearing(self):
        stop = original(self)
        self.state.optimizer.state.clear()
        return stop

    with swap(run.Run, "_evaluate", clearing):
        yield


@plant(
    "evaluation.draws-from-training",
    gate="evaluation.leaves-no-trace",
    title="An evaluation draws from training's random numbers",
    story=(
        "An evaluation takes a random number from the generator that dropout draws from. From "
        "there on the run depends on how often it is evaluated, and two runs that differ in "
        "nothing but that cannot be compared."
    ),
    sources=("https://github.com/harubaru/waifu-diffusion/issues/31",),
)
def draws_from_training():
    original = run.Run._evaluate

    def drawing(self):
        torch.rand(1)
        return original(self)

    with swap(run.Run, "_evaluate", drawing):
        yield


@plant(
    "sampling.weights-left-averaged",
    gate="evaluation.leaves-no-trace",
    title="Averaged weights are not taken out again",
    story=(
        "A sample is drawn from smoothed weights, which are put into the model for it, and the "
        "line that puts the others back is missing. From then on training goes on from the "
        "smoothed ones, and the more often somebody looks, the less is learned."
    ),
    sources=("https://github.com/harubaru/waifu-diffusion/issues/31",),
)
def weights_left_averaged():
    original = run.Run._sample

    def leaving(self):
        original(self)
        with torch.no_grad():
            for p in self.state.model.parameters():
                p.mul_(0.999)

    with swap(run.Run, "_sample", leaving):
        yield


@plant(
    "checkpoint.best-never-moves",
    gate="checkpoint.pointers",
    title="Best is whatever came first",
    story=(
        "The comparison behind the best checkpoint is the wrong way round, so that the first "
        "evaluation stays the best for ever. The log shows the lowest loss, the pointer names "
        "another folder, and what is shipped is a model of the first hour."
    ),
    sources=("founding note: ANDREA-120M",),
)
def best_never_moves():
    original = checkpoint.point

    def once(root, name, folder):
        if name == "best" and (root / name).is_file():
            touch()
            return
        original(root, name, folder)

    with swap(checkpoint, "point", once, counted=False):
        yield


@plant(
    "checkpoint.newest-cleared-away",
    gate="checkpoint.pointers",
    title="The cleaning takes the wrong end",
    story=(
        "Old checkpoints are deleted to save space, and the list is sorted the other way round: "
        "the newest go. The pointers stay and name folders that are gone. It is noticed on the "
        "day somebody wants to go on."
    ),
    sources=("founding note: ANDREA-120M",),
)
def newest_cleared_away():
    def wrong_end(root, keep):
        for folder in sorted(root.glob("step-*"))[keep:]:
            shutil.rmtree(folder)

    with swap(checkpoint, "retain", wrong_end):
        yield
