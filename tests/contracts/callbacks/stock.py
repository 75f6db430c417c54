"""A stock script around a real `transformers.Trainer`: two tiny models with random weights and a
small data set in memory.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from stackproof.contracts.callbacks.huggingface import GateCallback  # noqa: E402
from stackproof.spec.errors import GateFailed  # noqa: E402

VOCAB, PAD, BOS, EOS = 64, 0, 1, 2


def rows(n: int = 24, *, ragged: bool = True, seed: int = 1) -> list[dict]:
    """Rows of drawn ids, each between BOS and EOS."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 14, (n,), generator=draw).tolist() if ragged else [10] * n
    return [
        {"input_ids": [BOS, *torch.randint(4, VOCAB, (k,), generator=draw).tolist(), EOS]}
        for k in lengths
    ]


def collate(batch: list[dict], side: str = "right") -> dict:
    """Ids, mask and labels (B, T); padding has mask 0 and label -100."""
    longest = max(len(r["input_ids"]) for r in batch)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in batch:
        ids, pads = row["input_ids"], longest - len(row["input_ids"])
        for name, values, fill in (
            ("input_ids", ids, PAD),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", ids, -100),
        ):
            out[name].append(values + [fill] * pads if side == "right" else [fill] * pads + values)
    return {name: torch.tensor(values) for name, values in out.items()}


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    special = {
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "max_position_embeddings": 48,
    }
    return LlamaForCausalLM(
        LlamaConfig(**shape | special | {"tie_word_embeddings": True} | changes)
    )


def gpt2(seed: int = 0, drop: float = 0.1, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    drops = {"resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=48,
            **drops | special | changes,
        )
    )


def arguments(folder, **changes) -> TrainingArguments:
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    plan = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "seed": 3}
    return TrainingArguments(str(folder), **quiet | plan | changes)


def script(
    folder,
    model=None,
    *,
    trainer_class=Trainer,
    callback=None,
    extra=(),
    resume=None,
    data=None,
    collator=collate,
    more=None,
    **plan,
):
    """Train once. Returns (callback, what was raised or None)."""
    callback = callback or GateCallback()
    trainer = trainer_class(
        model if model is not None else llama(),
        arguments(folder, **plan),
        train_dataset=data or rows(),
        eval_dataset=rows(6, seed=9),
        data_collator=collator,
        callbacks=[callback, *extra],
        **(more or {}),
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except GateFailed as e:
        return callback, e
    return callback, None


def caught(outcome, gate_id: str, step: int, also: tuple[str, ...] = ()) -> dict:
    """Asserts that this gate, and no other but `also`, stopped the run at this step;
    returns what it measured.
    """
    callback, error = outcome
    assert error is not None, "nothing fired"
    assert callback.first_failures() == dict.fromkeys((gate_id, *also), step), str(error)
    assert error.gate_id in (gate_id, *also)
    return dict(callback.verdicts()[gate_id].measured)
