"""Plants in what a whole train step does besides the optimizer's own rule."""

from stackproof.museum.plant import plant, swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


@plant(
    "optim.stepped-twice",
    gate="optim.applied-update",
    title="Every update is made twice",
    story=(
        "A wrapper steps the optimizer, and so does the loop. Gradients are still there, so each "
        "batch moves the weights twice, by more than declared. The logged rate is right, the "
        "optimizer by itself is right, and a resumed run does the same."
    ),
    sources=("https://github.com/NVIDIA/physicsnemo/issues/1911",),
)
def stepped_twice():
    original = steps.apply_gradients

    def twice(state, grads, norm):
        original(state, grads, norm)
        state.optimizer.step()

    with swap(steps, "apply_gradients", twice):
        yield


@plant(
    "optim.gradient-turned-after-clipping",
    gate="optim.applied-update",
    title="A gradient is turned between clipping and the update",
    story=(
        "Something works on gradients in place after their norm was taken: noise, a projection, a "
        "sign of another convention. The norm after it is the same, so every figure of the step "
        "is, and one tensor climbs where all others descend."
    ),
    sources=("https://github.com/linkedin/Liger-Kernel/issues/1305",),
)
def gradient_turned_after_clipping():
    original = opt.clip_gradients

    def clipped_and_turned(grads, norm, max_norm):
        original(grads, norm, max_norm)
        if len(grads) > 3:
            touch()
            grads[3].neg_()

    with swap(opt, "clip_gradients", clipped_and_turned, counted=False):
        yield


@plant(
    "optim.moments-set-at-run-time",
    gate="optim.applied-update",
    title="The moments' decay is set anew at every step",
    story=(
        "A schedule for the optimizer writes its own betas into the groups before each step. The "
        "optimizer is built and tested as declared; the one that runs is another."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/309",),
)
def moments_set_at_run_time():
    original = opt.set_lr

    def and_betas(optimizer, lr_of_peak):
        original(optimizer, lr_of_peak)
        for group in (g for g in optimizer.param_groups if "betas" in g):
            group["betas"] = (0.85, 0.95)

    with swap(opt, "set_lr", and_betas):
        yield
