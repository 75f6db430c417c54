"""Ways of training beyond the plain script: clean runs raise no alarm,
and a plant in each is still caught.
"""

from pathlib import Path

import pytest
import torch

from stackproof.contracts.callbacks import digest
from stackproof.contracts.callbacks.plain import gated
from stackproof.spec.errors import GateFailed
from tests.contracts.callbacks.stock import Trainer, caught, collate, llama, rows, script
from tests.contracts.callbacks.test_plain import F, Tiny, batches

ROOT = Path(__file__).resolve().parents[3]
LOOKED = {
    "loss.logit-gradient",
    "optim.gradient-kept",
    "optim.movement",
    "runtime.finite",
    "model.causal",
}
SAVES = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def clean(callback, error=None):
    assert error is None and callback.first_failures() == {}
    looked = {g for g, v in callback.verdicts().items() if v.outcome == "pass"}
    assert looked >= LOOKED, LOOKED - looked


def adapted(**changes):
    peft = pytest.importorskip("peft")
    told = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    return peft.get_peft_model(llama(), peft.LoraConfig(**told | changes))


PLANS = {
    "saves": SAVES,
    "bfloat16, accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", PLANS)
def test_adapters_on_a_frozen_base_with_a_tied_head_are_clean(tmp_path, name):
    callback, error = script(tmp_path, adapted(), **PLANS[name])
    clean(callback, error)
    if name == "saves":
        assert "not a whole model" in callback.verdicts()["checkpoint.reloads"].message


def replicas(monkeypatch, differing: int) -> None:
    """A second process that holds the same weights, but for some tensors."""

    def all_gather(held, own):
        held[0].copy_(own)
        held[1].copy_(own)
        held[1][:differing] += 1

    monkeypatch.setattr(digest, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)


@pytest.mark.parametrize(
    ("model", "outcome"), [(llama, "pass"), (adapted, "not_run")], ids=["whole", "adapter"]
)
def test_equal_replicas_are_no_checkpoint_that_was_loaded_again(
    tmp_path, monkeypatch, model, outcome
):
    replicas(monkeypatch, 0)
    callback, error = script(tmp_path, model(), **SAVES)
    verdict = callback.verdicts()["checkpoint.reloads"]
    assert error is None and verdict.outcome == outcome
    assert ("SavedCheckpoint.reloaded_checksums" in verdict.message) == (outcome == "not_run")


@pytest.mark.parametrize("model", [llama, adapted], ids=["whole", "adapter"])
def test_replicas_that_differ_are_caught_at_the_first_save(tmp_path, monkeypatch, model):
    replicas(monkeypatch, 3)
    outcome = script(tmp_path, model(), **SAVES)
    assert caught(outcome, "checkpoint.reloads", 2)["differing"] == 3


class Plain(torch.nn.Module):
    """A model of ones own around one of the library: without `from_pretrained`."""

    def __init__(self):
        super().__init__()
        self.net = llama(tie_word_embeddings=False)
        self.config = self.net.config

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.net(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_cannot_be_loaded_again_is_not_run(tmp_path):
    callback, error = script(tmp_path, Plain(), **SAVES)
    verdict = callback.verdicts()["checkpoint.reloads"]
    assert error is None and verdict.outcome == "not_run"
    assert "SavedCheckpoint.reloaded_checksums" in verdict.message


def test_a_frozen_base_that_moves_under_its_adapters_is_caught(tmp_path):
    model = adapted()
    base = model.get_base_model().model.layers[0].mlp.up_proj.weight

    class Drifts(Trainer):
        def training_step(self, *args, **kwargs):
            with torch.no_grad():
                base.view(-1)[7] += 1e-4 if self.state.global_step == 2 else 0.0
            return super().training_step(*args, **kwargs)

    outcome = script(tmp_path, model, trainer_class=Drifts)
    assert caught(outcome, "optim.movement", 3)["changed_between"] == 1


def test_a_head_that_an_adapter_copies_is_no_longer_the_embedding(tmp_path):
    assert not caught(script(tmp_path, adapted(modules_to_save=["lm_head"])), "model.tied-head", 0)[
        "tied"
    ]


def test_checkpointed_activations_with_autocast_and_rows_grouped_by_length_are_clean(tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length"}
    plan = {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2}
    clean(*script(tmp_path, **plan, **grouped))


def looped(model, watched, *, zero=True):
    """A loop by hand through `model`, with the gates around `watched`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gated(watched, optimizer) as gate:
        for ids in batches():
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            if zero:
                optimizer.zero_grad()
    return gate


@pytest.mark.parametrize("given", ["what was compiled", "what compiling gave"])
def test_a_compiled_model_is_clean_and_a_plant_in_it_is_caught(given):
    """Compiled by `aot_eager`: the graphs are those of any backend,
    without waiting for a C++ compiler.
    """
    torch.manual_seed(0)
    model = Tiny()
    compiled = torch.compile(model, backend="aot_eager")
    clean(looped(compiled, model if given == "what was compiled" else compiled))
    with pytest.raises(GateFailed, match=r"optim\.gradient-kept.*step 2"):
        looped(compiled, compiled, zero=False)


def accelerated(accumulate: int = 3, clip: float = 1.0, divide: bool = True):
    accelerate = pytest.importorskip("accelerate")
    maker = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    loader = torch.utils.data.DataLoader(rows(ragged=False), batch_size=2, collate_fn=collate)
    model, optimizer, loader, scheduler = maker.prepare(model, optimizer, loader, scheduler)
    with gated(model, optimizer, scheduler=scheduler, max_grad_norm=1.0) as gate:
        for batch in loader:
            with maker.accumulate(model):
                loss = model(**batch).loss
                maker.backward(loss if divide else loss * accumulate)
                if maker.sync_gradients and clip:
                    maker.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return gate


def test_a_loop_of_accelerate_that_accumulates_is_clean():
    gate = accelerated()
    clean(gate)
    assert gate.verdicts()["schedule.rate"].passed and gate.verdicts()["optim.clip-norm"].passed


@pytest.mark.parametrize(
    ("plant", "gate_id"),
    [({"divide": False}, "loss.logit-gradient"), ({"clip": 0}, "optim.clip-norm")],
)
def test_a_plant_in_a_loop_of_accelerate_is_caught(plant, gate_id):
    with pytest.raises(GateFailed) as e:
        accelerated(**plant)
    assert e.value.gate_id == gate_id
