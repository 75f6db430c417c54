"""The same callback in a trainer of TRL, whose loss never builds the logits."""

import pytest

from tests.contracts.callbacks.stock import (
    VOCAB,
    GateCallback,
    Trainer,
    arguments,
    gpt2,
    llama,
    rows,
    script,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from transformers import PreTrainedTokenizerFast  # noqa: E402

from stackproof.spec.errors import GateFailed  # noqa: E402


def tokenizer(size: int = VOCAB):
    words = {
        w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def fine_tune(folder, model, *, callback=None, evaluated=False, resume=None, **plan):
    text = [{"text": " ".join(f"w{i}" for i in r["input_ids"][1:-1])} for r in rows()]
    callback = callback or GateCallback()
    data = datasets.Dataset.from_list(text)
    config = trl.SFTConfig(
        **{
            k: v
            for k, v in arguments(folder).to_dict().items()
            if k in ("report_to", "use_cpu", "disable_tqdm", "seed")
        }
        | {
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "bf16": False,
        }
        | plan
    )
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=data,
        eval_dataset=data.select(range(6)) if evaluated else None,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except GateFailed as e:
        return callback, e
    return callback, None


@pytest.mark.parametrize(
    "plan", [{}, {"gradient_accumulation_steps": 3}, {"packing": True, "max_length": 32}], ids=str
)
def test_supervised_fine_tuning_is_clean(tmp_path, plan):
    callback, error = fine_tune(tmp_path, llama(), **plan)
    assert error is None and callback.first_failures() == {}
    assert (
        callback.verdicts()["loss.logit-gradient"].passed
        and callback.verdicts()["tokenizer.identity"].passed
    )


def test_another_objective_is_not_judged_and_says_so(tmp_path):
    class Preference(Trainer):
        pass

    Preference.__module__ = "trl.trainer.preference"
    callback, error = script(tmp_path, trainer_class=Preference)
    verdict = callback.verdicts()["loss.logit-gradient"]
    assert error is None and verdict.outcome == "not_run" and "Preference" in verdict.message
    assert callback.verdicts()["optim.movement"].passed


def test_a_plant_is_caught_there_too(tmp_path):
    model = gpt2()
    model.zero_grad = lambda *a, **k: None
    callback, error = fine_tune(tmp_path, model)
    assert error.gate_id == "optim.gradient-kept" and callback.first_failures() == {
        "optim.gradient-kept": 2
    }


@pytest.mark.parametrize("passes", [1, 3])
def test_a_trainer_that_goes_over_one_buffer_again_says_so(tmp_path, passes):
    callback = GateCallback(mode="log")
    prompts = [{"prompt": " ".join(f"w{i}" for i in range(4 + n, 16 + n))} for n in range(8)]
    plan = {
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "num_iterations": passes,
    }
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
        "learning_rate": 1e-3,
        "seed": 3,
    }
    trl.GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=trl.GRPOConfig(str(tmp_path), **quiet | plan),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer(),
        callbacks=[callback],
    ).train()
    verdict = callback.verdicts()["data.fresh-rows"]
    assert verdict.outcome == ("pass" if passes == 1 else "not_run")
    assert passes == 1 or "num_iterations = 3" in verdict.message
