"""Plants in the learning-rate schedule."""

from stack.museum.plant import plant, swap
from stack.train import schedule
from stack.train import step as steps


@plant(
    "schedule.no-warmup",
    gate="schedule.trace",
    title="No warm-up",
    story="The learning rate starts at its peak. The first updates throw the weights into a poor basin. The loss recovers within minutes "
    "and stays a little worse for the rest of the run, which only a second run would show.",
    sources=("founding note: ANDREA-120M",),
)
def no_warmup():
    original = schedule.cosine_lr

    def at_peak(step, *, peak, schedule, max_steps):
        return peak if step <= schedule.warmup_steps else original(step, peak=peak, schedule=schedule, max_steps=max_steps)

    with swap(schedule, "cosine_lr", at_peak):
        yield


@plant(
    "schedule.per-micro-step",
    gate="schedule.trace",
    title="The schedule ticks per micro-step",
    story="The scheduler is advanced inside the accumulation loop. With four micro-steps the warm-up ends four times too early and the "
    "rate reaches its floor in the first quarter of the run. Without accumulation nothing is wrong.",
    sources=("https://github.com/huggingface/accelerate/issues/963", "https://github.com/Lightning-AI/pytorch-lightning/issues/1476"),
)
def per_micro_step():
    original = steps.lr_at

    def too_fast(step, optim, schedule, max_steps):
        return original(min(2 * step, max_steps), optim, schedule, max_steps)

    with swap(steps, "lr_at", too_fast):
        yield
