"""Plants in evaluation that are more than changed text."""

from dataclasses import replace

from stackproof.museum.plant import swap
from stackproof.train import loop
from stackproof.train import step as steps

TENSORS = ("input_ids", "labels", "document_ids")


# Keeps the first batches of a run, and takes each step many times.
def one_page_over_and_over():
    """Every step reads the first 64 tokens of each row of the first step, sixteen times over."""
    draw, train_step, page = loop.draw, steps.train_step, []

    def same(trainer):
        batches = draw(trainer)
        if not page:
            page.extend(replace(b, **{k: getattr(b, k)[:, :64] for k in TENSORS}) for b in batches)
        return page

    def again(state, batches):
        for _ in range(15):
            before = state.step, state.tokens_seen, state.ema_loss_nats, state.min_ema_loss_nats
            train_step(state, batches)
            state.step, state.tokens_seen, state.ema_loss_nats, state.min_ema_loss_nats = before
        return train_step(state, batches)

    with swap(loop, "draw", same), swap(steps, "train_step", again):
        yield
