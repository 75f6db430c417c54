"""Bugs put into a stock Trainer script: which gate stops it, at which step,
on which measured value.
"""

import math
import pathlib
import types

import pytest
import torch

from tests.contracts.callbacks.stock import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    GateCallback,
    Trainer,
    caught,
    collate,
    gpt2,
    llama,
    rows,
    script,
)

nn, F = torch.nn, torch.nn.functional


class Loss(Trainer):
    """A trainer whose loss is its own function of logits and labels (B, T)."""

    loss_is_scaled_for_ga = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = self.value(outputs.logits, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def mean(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- 1, 7, 8: the loss ----------------------------------------------------------------------------


def test_labels_that_are_not_shifted(tmp_path):
    class Unshifted(Loss):
        def value(self, logits, labels, n):
            return mean(logits, labels)

    measured = caught(script(tmp_path, trainer_class=Unshifted), "loss.logit-gradient", 1)
    assert measured["off_target_frac"] > 0.9 and measured["offset"] == 0


def test_labels_that_are_shifted_twice(tmp_path):
    def shifted(batch):
        made = collate(batch)
        labels = made["labels"]
        made["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
        return made

    measured = caught(script(tmp_path, collator=shifted), "loss.logit-gradient", 1)
    assert measured["off_target_frac"] > 0.9 and measured["offset"] == 2


def test_padding_that_is_learned(tmp_path):
    class Padded(Loss):
        def value(self, logits, labels, n):
            return mean(logits[:, :-1], labels[:, 1:].clamp_min(PAD))

    measured = caught(script(tmp_path, trainer_class=Padded), "loss.logit-gradient", 2)
    assert measured["masked_learned"] > 0


def test_a_collator_that_labels_padding(tmp_path):
    def labelled(batch):
        made = collate(batch)
        return made | {"labels": made["input_ids"].clone()}

    measured = caught(script(tmp_path, collator=labelled), "data.learnable-batch", 2)
    assert measured["n_padding_labels"] > 0


def test_a_mean_of_micro_batch_means(tmp_path):
    class Means(Loss):
        loss_is_scaled_for_ga = False

        def value(self, logits, labels, n):
            return mean(logits[:, :-1], labels[:, 1:])

    measured = caught(
        script(tmp_path, trainer_class=Means, gradient_accumulation_steps=4),
        "loss.logit-gradient",
        1,
    )
    assert measured["weight_min"] < 0.98 < 1.02 < measured["weight_max"]


def test_a_loss_that_is_not_divided_by_the_accumulation(tmp_path):
    class Undivided(Loss):
        loss_is_scaled_for_ga = True

        def value(self, logits, labels, n):
            return mean(logits[:, :-1], labels[:, 1:])

    outcome = script(
        tmp_path, trainer_class=Undivided, gradient_accumulation_steps=4, data=rows(ragged=False)
    )
    assert caught(outcome, "loss.logit-gradient", 1)["weight_min"] == pytest.approx(4, rel=1e-3)


# --- 2: the model ---------------------------------------------------------------------------------


def test_a_causal_mask_that_is_missing(tmp_path, monkeypatch):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, inner=inner, **k: inner(
            *a, **k | {"attention_mask": None}
        )
    measured = caught(script(tmp_path, model), "model.causal", 0, also=("model.isolation",))
    assert measured["leak_rel"] > 1e-3


def test_a_model_that_peeks_at_its_labels(tmp_path):
    model = llama()
    inner = model.forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        if labels is not None:
            embedded = embedded + self.get_input_embeddings()(labels.clamp_min(0).roll(-1, 1))
        return inner(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels, **kwargs)

    model.forward = types.MethodType(forward, model)
    assert caught(script(tmp_path, model), "model.causal", 0)["labels_leak_rel"] > 1e-3


def test_padding_that_is_seen(tmp_path):
    model = llama()
    inner = model.model.forward
    model.model.forward = lambda *a, attention_mask=None, **k: inner(*a, **k)
    assert caught(script(tmp_path, model), "model.isolation", 0)["padding_rel"] > 1e-3


def test_a_head_that_has_come_loose(tmp_path):
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert caught(script(tmp_path, model), "model.tied-head", 0) == {
        "tied": False,
        "declared": True,
    }


# --- 3, 4: the optimizer --------------------------------------------------------------------------


def test_a_frozen_parameter_that_moves(tmp_path):
    model = llama()
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)

    class Drifts(Trainer):
        def training_step(self, *args, **kwargs):
            with torch.no_grad():
                frozen.view(-1)[7] += 1e-4 if self.state.global_step == 2 else 0.0
            return super().training_step(*args, **kwargs)

    outcome = script(tmp_path, model, trainer_class=Drifts)
    assert caught(outcome, "optim.movement", 3)["changed_between"] == 1


def test_a_parameter_that_is_not_in_the_optimizer(tmp_path):
    model = llama()
    left_out = [p for n, p in model.named_parameters() if "layers.1.mlp.up_proj" not in n]
    optimizer = torch.optim.AdamW(left_out, lr=1e-3)
    measured = caught(
        script(tmp_path, model, more={"optimizers": (optimizer, None)}), "optim.parameter-groups", 0
    )
    assert measured["missing"] == 1 and measured["strangers"] == 0


def test_weight_decay_on_gains_is_written_down(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    callback, error = script(tmp_path, model, more={"optimizers": (optimizer, None)})
    assert error is None and callback.first_failures() == {"optim.decay-groups": 0}
    assert callback.verdicts()["optim.decay-groups"].measured["decayed_vectors"] == 5


def test_gradients_that_are_left_from_before(tmp_path):
    model = llama()
    model.zero_grad = lambda *a, **k: None
    assert caught(script(tmp_path, model), "optim.gradient-kept", 2)["stale_norm"] > 0.01


def test_an_update_that_does_nothing(tmp_path):
    class Idle(Trainer):
        def create_optimizer(self, *args, **kwargs):
            made = super().create_optimizer(*args, **kwargs)
            made.step = lambda closure=None: None
            return made

    measured = caught(
        script(tmp_path, trainer_class=Idle, warmup_steps=1, max_steps=8), "optim.movement", 5
    )
    assert measured["longest_still"] == 4 and measured["moved_frac"] == 0


def test_gradients_that_are_not_clipped(tmp_path):
    class Unclipped(Trainer):
        def _clip_grad_norm(self, model):
            return torch.tensor(0.1)

    measured = caught(
        script(tmp_path, trainer_class=Unclipped, max_grad_norm=0.1), "optim.clip-norm", 1
    )
    assert measured["clipped_grad_norm"] == measured["grad_norm"] > 0.5


# --- 5, 6, 10: numbers and batches ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["logits", "loss"])
def test_a_nan_that_the_logger_hides(tmp_path, where):
    class Poisoned(Loss):
        loss_is_scaled_for_ga = False

        def value(self, logits, labels, n):
            bad = math.nan if self.state.global_step == 2 and self.model.training else 1.0
            return mean(logits[:, :-1] * (bad if where == "logits" else 1.0), labels[:, 1:]) * (
                bad if where == "loss" else 1.0
            )

    measured = caught(
        script(tmp_path, trainer_class=Poisoned, logging_nan_inf_filter=True),
        "runtime.finite",
        3,
        also=("optim.clip-norm",),
    )
    assert measured["loss_nats"] == "nan"


def test_a_nan_that_is_made_a_number_in_the_gradient(tmp_path):
    class Masked(Loss):
        loss_is_scaled_for_ga = False

        def value(self, logits, labels, n):
            bad = math.nan if self.state.global_step == 1 else 1.0
            return torch.nan_to_num(mean((logits * bad)[:, :-1], labels[:, 1:]))

    model = llama()
    for p in model.parameters():
        p.register_hook(torch.nan_to_num)
    assert (
        caught(script(tmp_path, model, trainer_class=Masked), "runtime.finite", 2)["loss_nats"]
        == "nan"
    )


def test_a_batch_whose_labels_are_all_masked(tmp_path):
    def third_is_empty(batch, seen=[0]):  # noqa: B006
        made, seen[0] = collate(batch), seen[0] + 1
        return made | {"labels": torch.full_like(made["labels"], -100)} if seen[0] == 3 else made

    assert (
        caught(script(tmp_path, collator=third_is_empty), "data.learnable-batch", 3)["n_valid"] == 0
    )


def test_ids_beyond_the_embedding(tmp_path):
    data = rows()
    for row in data:
        row["input_ids"][2] = VOCAB + 5
    assert caught(script(tmp_path, data=data), "data.learnable-batch", 1)["max_id"] == VOCAB + 5


def test_rows_beyond_the_positions(tmp_path):
    data = [{"input_ids": [BOS, *([7, 9, 8, 5] * 12), EOS]} for _ in range(24)]
    assert caught(script(tmp_path, data=data), "data.learnable-batch", 1)["length"] == 50


class Words:
    """A tokenizer as far as a trainer asks it: its size and special ids."""

    def __init__(self, size=VOCAB, pad=PAD, eos=EOS):
        self.size, self.pad_token_id, self.eos_token_id, self.bos_token_id = size, pad, eos, BOS
        self.model_input_names = ["input_ids"]

    def __len__(self):
        return self.size

    def save_pretrained(self, folder):
        return ()


def test_a_tokenizer_with_more_ids_than_rows(tmp_path):
    outcome = script(tmp_path, more={"processing_class": Words(VOCAB + 1)})
    assert caught(outcome, "tokenizer.identity", 0)["tokenizer_size"] == VOCAB + 1


def test_a_stop_token_that_is_masked_as_padding(tmp_path):
    def masks_padding(batch):
        made = collate(batch)
        ids = torch.where(made["attention_mask"] == 0, EOS, made["input_ids"])
        return made | {"input_ids": ids, "labels": torch.where(ids == EOS, -100, ids)}

    outcome = script(
        tmp_path,
        llama(pad_token_id=EOS),
        collator=masks_padding,
        more={"processing_class": Words(pad=EOS)},
    )
    measured = caught(outcome, "data.learnable-batch", 1)
    assert measured["n_stops"] == 2 and measured["n_stops_learned"] == 0


def test_another_vocabulary_of_the_same_size(tmp_path):
    pattern = [{"input_ids": [BOS, *([5, 6, 7, 8, 9, 10] * 2), EOS]} for _ in range(24)]
    model = llama()
    assert (
        script(tmp_path, model, data=pattern, max_steps=80, learning_rate=1e-2, num_train_epochs=9)[
            1
        ]
        is None
    )
    permuted = [{"input_ids": [BOS, *(60 - i for i in r["input_ids"][1:-1]), EOS]} for r in pattern]
    measured = caught(script(tmp_path, model, data=permuted), "loss.first", 1)
    assert measured["loss_nats"] > measured["random_nats"] + 1


# --- 9: the mode ----------------------------------------------------------------------------------


def test_dropout_that_stays_on_in_evaluation(tmp_path):
    model = gpt2()
    model.eval = lambda: model.train(True)
    measured = caught(
        script(tmp_path, model, eval_strategy="steps", eval_steps=2), "runtime.mode", 2
    )
    assert measured["phase"] == "evaluation" and measured["wrong_modules"] > 0


def test_dropout_that_nobody_can_switch_off(tmp_path):
    model = llama()
    inner = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: F.dropout(inner(ids), 0.1, training=True)
    only = GateCallback(only=("runtime.mode",))
    outcome = script(tmp_path, model, callback=only, eval_strategy="steps", eval_steps=2)
    assert caught(outcome, "runtime.mode", 2)["repeat_abs"] > 1e-3


def test_training_that_stays_in_evaluation_mode(tmp_path):
    model = gpt2()
    model.train = lambda mode=True: nn.Module.train(model, False)
    measured = caught(script(tmp_path, model), "runtime.mode", 1)
    assert measured["phase"] == "training"


# --- the schedule ---------------------------------------------------------------------------------


def test_a_schedule_that_ticks_every_micro_step(tmp_path):
    class Ticks(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.lr_scheduler.step()
            return loss

    outcome = script(
        tmp_path, trainer_class=Ticks, gradient_accumulation_steps=2, lr_scheduler_type="cosine"
    )
    assert caught(outcome, "schedule.rate", 1)["ticks"] == 2


def test_a_rate_that_stays_zero(tmp_path):
    assert caught(script(tmp_path, learning_rate=0.0), "schedule.rate", 2)["zero_updates"] == 2


# --- 11, 12: saving and going on ------------------------------------------------------------------


def test_tied_weights_that_come_back_as_two(tmp_path):
    class Loosens(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            path = pathlib.Path(output_dir) / "config.json"
            path.write_text(
                path.read_text().replace(
                    '"tie_word_embeddings": true', '"tie_word_embeddings": false'
                )
            )

    outcome = script(tmp_path, trainer_class=Loosens, save_strategy="steps", save_steps=2)
    measured = caught(outcome, "checkpoint.reloads", 2)
    assert measured["live_tied"] and not measured["reloaded_tied"] and measured["differing"] == 1


def test_a_tensor_that_is_saved_as_another(tmp_path):
    class Rounds(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(
                output_dir, {n: t.bfloat16().float() for n, t in self.model.state_dict().items()}
            )

    outcome = script(tmp_path, trainer_class=Rounds, save_strategy="steps", save_steps=2)
    assert caught(outcome, "checkpoint.reloads", 2)["differing"] >= 10


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}


def test_a_resume_without_optimizer_state(tmp_path):
    assert script(tmp_path, gpt2(), **SAVES)[1] is None
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    outcome = script(tmp_path, gpt2(), resume=str(tmp_path / "checkpoint-2"), **SAVES)
    assert caught(outcome, "checkpoint.state-restored", 2)["differing"] >= 3 * 28


def test_a_resume_that_starts_the_data_again(tmp_path):
    assert script(tmp_path, gpt2(), **SAVES)[1] is None
    outcome = script(
        tmp_path, gpt2(), resume=str(tmp_path / "checkpoint-2"), ignore_data_skip=True, **SAVES
    )
    assert caught(outcome, "checkpoint.state-restored", 2)["differing"] >= 1


def test_a_resume_right_after_a_killed_run_that_starts_the_data_again(tmp_path):
    assert script(tmp_path, gpt2(), **SAVES | {"max_steps": 2})[1] is None
    outcome = script(
        tmp_path, gpt2(), resume=str(tmp_path / "checkpoint-2"), ignore_data_skip=True, **SAVES
    )
    assert caught(outcome, "checkpoint.state-restored", 2) == {"differing": 1, "compared": 1}


def test_a_resume_without_its_random_state(tmp_path):
    assert script(tmp_path, gpt2(), **SAVES)[1] is None
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    outcome = script(tmp_path, gpt2(), resume=str(tmp_path / "checkpoint-2"), **SAVES)
    assert caught(outcome, "checkpoint.state-restored", 2)["differing"] == 1
