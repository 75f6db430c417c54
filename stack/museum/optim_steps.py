"""Plants in what a whole train step does besides the optimizer's own rule."""

from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


def stepped_twice():
    original = steps.apply_gradients

    def twice(state, grads, norm):
        original(state, grads, norm)
        state.optimizer.step()

    with swap(steps, "apply_gradients", twice):
        yield


def gradient_turned_after_clipping():
    original = opt.clip_gradients

    def clipped_and_turned(grads, norm, max_norm):
        original(grads, norm, max_norm)
        if len(grads) > 3:
            touch()
            grads[3].neg_()

    with swap(opt, "clip_gradients", clipped_and_turned, counted=False):
        yield


def moments_set_at_run_time():
    original = opt.set_lr

    def and_betas(optimizer, lr_of_peak):
        original(optimizer, lr_of_peak)
        for group in (g for g in optimizer.param_groups if "betas" in g):
            group["betas"] = (0.85, 0.95)

    with swap(opt, "set_lr", and_betas):
        yield
