"""Clean runs of a stock Trainer script: nothing fires, nothing is changed,
and each gate has looked.
"""

import json

import pytest
import torch

from tests.contracts.callbacks.stock import (
    EOS,
    PAD,
    GateCallback,
    collate,
    gpt2,
    llama,
    rows,
    script,
)

ALWAYS = {
    "data.learnable-batch",
    "runtime.mode",
    "loss.logit-gradient",
    "loss.first",
    "model.causal",
    "model.isolation",
    "model.tied-head",
    "optim.clip-norm",
    "optim.decay-groups",
    "optim.gradient-kept",
    "optim.movement",
    "optim.parameter-groups",
    "runtime.finite",
    "runtime.loss-not-constant",
    "schedule.rate",
}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}
CLEAN = {
    "plain": (llama, {}),
    "accumulation": (llama, {"gradient_accumulation_steps": 4, "max_steps": 7}),
    "dropout": (lambda: gpt2(drop=0.2), {"gradient_accumulation_steps": 3}),
    "no dropout": (lambda: gpt2(drop=0.0), {}),
    "untied": (lambda: llama(tie_word_embeddings=False), {}),
    "two epochs, warm-up, cosine, decay": (
        llama,
        {
            "max_steps": -1,
            "num_train_epochs": 2,
            "warmup_steps": 3,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.1,
        },
    ),
    "no clipping": (llama, {"max_grad_norm": 0.0}),
    "label smoothing": (llama, {"label_smoothing_factor": 0.1}),
    "gradient checkpointing": (lambda: gpt2(drop=0.0), {"gradient_checkpointing": True}),
    "bfloat16 autocast": (llama, {"bf16": True, "gradient_accumulation_steps": 2}),
    "SGD": (llama, {"optim": "sgd", "learning_rate": 0.1}),
}


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_fires_on_clean_runs(tmp_path, name):
    model, plan = CLEAN[name]
    callback, error = script(tmp_path, model(), **EVALUATES | plan)
    assert error is None and callback.first_failures() == {}
    looked = {g for g, v in callback.verdicts().items() if v.outcome == "pass"}
    assert looked >= ALWAYS, ALWAYS - looked
    assert abs(callback.verdicts()["loss.logit-gradient"].measured["weight_max"] - 1) < (
        5e-3 if plan.get("bf16") else 1e-4
    )


def test_left_padding_prompts_and_frozen_parts_are_clean(tmp_path):
    def left(batch):
        made = collate(batch, "left")
        first = made["attention_mask"].cumsum(1) <= 3
        return made | {"labels": made["labels"].masked_fill(first, -100)}

    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    callback, error = script(tmp_path, model, collator=left, gradient_accumulation_steps=2)
    assert error is None and callback.first_failures() == {}


def test_a_model_in_bfloat16_is_clean_and_its_clipping_is_not_judged(tmp_path):
    callback, error = script(
        tmp_path, llama().to(torch.bfloat16), gradient_accumulation_steps=2, **EVALUATES
    )
    assert error is None and callback.first_failures() == {}
    assert callback.verdicts()["optim.clip-norm"].outcome == "not_run"


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_is_clean(tmp_path, model, at):
    plan = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 8,
        "gradient_accumulation_steps": 3,
    }
    first, error = script(tmp_path, model(), **plan)
    assert error is None and first.verdicts()["checkpoint.reloads"].passed
    again, error = script(tmp_path, model(1), resume=str(tmp_path / f"checkpoint-{at}"), **plan)
    assert error is None and again.first_failures() == {}
    verdict = again.verdicts()["checkpoint.state-restored"]
    assert verdict.passed and verdict.measured["compared"] == 2


def test_training_is_bit_for_bit_what_it_is_without_the_callback(tmp_path):
    plan = {
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
    }
    watched, plain = gpt2(), gpt2()
    assert script(tmp_path / "a", watched, **plan)[1] is None
    script(tmp_path / "b", plain, callback=_Nothing(), **plan)
    for (name, one), other in zip(watched.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(one, other), name


class _Nothing(GateCallback):
    """Stands in the same place and does nothing."""

    def on_train_begin(self, *args, **kwargs):
        pass


def test_in_mode_log_nothing_is_raised_and_every_verdict_is_written(tmp_path):
    def masked(batch):
        made = collate(batch)
        return made | {"labels": torch.where(made["input_ids"] == EOS, PAD - 100, made["labels"])}

    callback, error = script(
        tmp_path, callback=GateCallback(mode="log"), collator=masked, data=rows(12)
    )
    lines = [json.loads(line) for line in (tmp_path / "gates.jsonl").read_text().splitlines()]
    assert error is None and callback.first_failures() == {"data.learnable-batch": 1}
    red = [line for line in lines if line["verdict"] == "fail"]
    assert [line["step"] for line in red] == [1, 2, 3, 4] and red[0]["measured"]["n_stops"] == 2
    assert {line["gate"] for line in lines if line["verdict"] == "pass"} >= {
        "model.causal",
        "optim.parameter-groups",
    }


def test_the_trainer_is_left_as_it_was(tmp_path):
    model = llama()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    callback, error = script(tmp_path, model)
    assert (
        error is None
        and sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        == before
    )
    assert callback.verdicts()["checkpoint.state-restored"].outcome == "not_run"
