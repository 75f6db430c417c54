"""Faults that nobody had put into the museum before they were tried on a stock Trainer: which gate
stops them, and which none does.

What no gate sees is listed in docs/anywhere.md.
"""

import pytest
import torch
from transformers import TrainerCallback

from tests.contracts.callbacks.stock import (
    VOCAB,
    Trainer,
    caught,
    collate,
    gpt2,
    llama,
    rows,
    script,
)
from tests.contracts.callbacks.test_huggingface_plants import Loss, mean

nn = torch.nn
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}


class CastsForEvaluation(Trainer):
    """Evaluates in half precision and casts back."""

    def evaluate(self, *args, **kwargs):
        self.model.half().float()
        return super().evaluate(*args, **kwargs)


class DecaysInEvaluation(Trainer):
    """Its evaluation writes to a weight."""

    def prediction_step(self, model, *args, **kwargs):
        with torch.no_grad():
            model.model.norm.weight.mul_(0.99)
        return super().prediction_step(model, *args, **kwargs)


@pytest.mark.parametrize(
    ("trainer", "changed"), [(CastsForEvaluation, 20), (DecaysInEvaluation, 1)]
)
def test_weights_that_change_outside_an_update(tmp_path, trainer, changed):
    measured = caught(script(tmp_path, trainer_class=trainer, **EVALUATES), "optim.movement", 3)
    assert measured["changed_between"] == changed


def test_weights_that_change_after_every_update_are_seen_before_the_next(tmp_path):
    class Noise(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.model.norm.weight.add_(1e-3)

    assert (
        caught(script(tmp_path, extra=(Noise(),), max_steps=17), "optim.movement", 2)[
            "changed_between"
        ]
        == 1
    )


def test_a_train_call_inside_the_evaluation_loop(tmp_path):
    class Switches(Trainer):
        def prediction_step(self, model, *args, **kwargs):
            made = super().prediction_step(model, *args, **kwargs)
            model.train()
            return made

    assert (
        caught(script(tmp_path, gpt2(), trainer_class=Switches, **EVALUATES), "runtime.mode", 2)[
            "phase"
        ]
        == "evaluation"
    )


def test_a_scheduler_that_steps_twice(tmp_path):
    class Twice(Trainer):
        def create_scheduler(self, *args, **kwargs):
            made = super().create_scheduler(*args, **kwargs)
            step = made.step
            made.step = lambda: (step(), step())
            return made

    assert (
        caught(
            script(tmp_path, trainer_class=Twice, lr_scheduler_type="cosine"),
            "schedule.rate",
            2,
        )["ticks"]
        == 2
    )


def test_clipping_that_is_given_copies(tmp_path):
    class Copies(Trainer):
        def _clip_grad_norm(self, model):
            return nn.utils.clip_grad_norm_([p.detach() for p in model.parameters()], 0.1)

    assert (
        caught(script(tmp_path, trainer_class=Copies, max_grad_norm=0.1), "optim.clip-norm", 1)[
            "clipped_grad_norm"
        ]
        > 0.5
    )


def test_an_embedding_that_was_resized_under_an_untied_head(tmp_path):
    model = llama()
    model.resize_token_embeddings(VOCAB + 2)
    model.lm_head = nn.Linear(32, VOCAB + 2, bias=False)
    assert not caught(script(tmp_path, model), "model.tied-head", 0)["tied"]


def test_a_loss_that_is_divided_by_the_accumulation_twice(tmp_path):
    class Divided(Loss):
        loss_is_scaled_for_ga = False

        def value(self, logits, labels, n):
            return mean(logits[:, :-1], labels[:, 1:]) / self.args.gradient_accumulation_steps

    outcome = script(
        tmp_path, trainer_class=Divided, gradient_accumulation_steps=2, data=rows(ragged=False)
    )
    # 0.5, or 6 in 11 of it where the first label of a row counts
    assert caught(outcome, "loss.logit-gradient", 1)["weight_max"] < 0.6


def test_gradients_that_are_emptied_at_every_micro_step(tmp_path):
    class Empties(Trainer):
        def training_step(self, model, *args, **kwargs):
            model.zero_grad()
            return super().training_step(model, *args, **kwargs)

    assert (
        caught(
            script(tmp_path, trainer_class=Empties, gradient_accumulation_steps=3),
            "optim.gradient-kept",
            1,
        )["lost"]
        == 2
    )


def test_one_label_of_each_row_that_is_another_token(tmp_path):
    def wrong(batch):
        made = collate(batch)
        labels = made["labels"].clone()
        labels[:, 3] = (labels[:, 3] + 1) % VOCAB
        return made | {"labels": labels}

    assert (
        0
        < caught(script(tmp_path, collator=wrong), "loss.logit-gradient", 1)["off_target_frac"]
        < 0.5
    )


def test_a_mask_that_stands_on_the_other_side(tmp_path):
    def flipped(batch):
        made = collate(batch, "left")
        return made | {"attention_mask": made["attention_mask"].flip(1)}

    assert (
        caught(script(tmp_path, collator=flipped), "data.learnable-batch", 2)["n_padding_labels"]
        > 0
    )
