"""Plants in the learning-rate schedule."""

from types import SimpleNamespace

from stackproof.museum.plant import swap
from stackproof.train import optimizer as opt
from stackproof.train import schedule
from stackproof.train import step as steps


def no_warmup():
    with swap(schedule, "warmup_factor", lambda step, schedule: 1.0):
        yield


def per_micro_step():
    original = steps.lr_at

    def too_fast(step, *, peak, schedule, max_steps):
        return original(min(2 * step, max_steps), peak=peak, schedule=schedule, max_steps=max_steps)

    with swap(steps, "lr_at", too_fast):
        yield


def group_left_behind():
    original = opt.set_lr

    def first_part_only(optimizer, lr_of_peak):
        original(SimpleNamespace(param_groups=optimizer.param_groups[:1]), lr_of_peak)

    with swap(opt, "set_lr", first_part_only):
        yield


def decay_never_begins():
    with swap(schedule, "decay_begins", lambda schedule, max_steps: 10 * max_steps):
        yield
