"""Plants in the learning-rate schedule."""

from types import SimpleNamespace

from stackproof.museum.plant import plant, swap
from stackproof.train import optimizer as opt
from stackproof.train import schedule
from stackproof.train import step as steps


@plant(
    "schedule.no-warmup",
    gate="schedule.trace",
    title="No warm-up",
    story=(
        "The learning rate starts at its peak. The first updates throw the weights into a poor "
        "basin. The loss recovers within minutes and stays a little worse for the rest of the "
        "run, which only a second run would show."
    ),
    sources=("founding note: ANDREA-120M",),
)
def no_warmup():
    with swap(schedule, "warmup_factor", lambda step, schedule: 1.0):
        yield


@plant(
    "schedule.per-micro-step",
    gate="schedule.trace",
    title="The schedule ticks per micro-step",
    story=(
        "The scheduler is advanced inside the accumulation loop. With four micro-steps the "
        "warm-up ends four times too early and the rate reaches its floor in the first quarter of "
        "the run. Without accumulation nothing is wrong."
    ),
    sources=(
        "https://github.com/huggingface/accelerate/issues/963",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/1476",
    ),
)
def per_micro_step():
    original = steps.lr_at

    def too_fast(step, *, peak, schedule, max_steps):
        return original(min(2 * step, max_steps), peak=peak, schedule=schedule, max_steps=max_steps)

    with swap(steps, "lr_at", too_fast):
        yield


@plant(
    "schedule.group-left-behind",
    gate="schedule.trace",
    title="One optimizer of two has no schedule",
    story=(
        "The matrices go to Muon and the rest to AdamW, but the scheduler was built for one of "
        "the two. The other trains at its peak from the first step to the last. The logged "
        "learning rate is the right one."
    ),
    sources=(
        "https://github.com/tenstorrent/tt-metal/issues/56027",
        "https://github.com/EleutherAI/sparsify/pull/62",
    ),
)
def group_left_behind():
    original = opt.set_lr

    def first_part_only(optimizer, lr_of_peak):
        original(SimpleNamespace(param_groups=optimizer.param_groups[:1]), lr_of_peak)

    with swap(opt, "set_lr", first_part_only):
        yield


@plant(
    "schedule.decay-never-begins",
    gate="schedule.trace",
    title="The rate stays at its peak",
    story=(
        "The stable phase is right, but its end is computed from the number of planned epochs and "
        "not from the steps. The decay that should bring the last and largest gain never starts, "
        "and the curve only looks a little flat at the end."
    ),
    sources=("https://arxiv.org/abs/2405.18392",),
)
def decay_never_begins():
    with swap(schedule, "decay_begins", lambda schedule, max_steps: 10 * max_steps):
        yield
