"""Gates in a stock `transformers.Trainer`, and a record of their verdicts.

pip install 'stackproof[hf]' python examples/huggingface.py [--out runs/huggingface] [--steps 24]

A small Llama with random weights learns the standard library's documentation, byte by byte, in
seconds on a CPU and without a network. The run stops half-way and resumes from its checkpoint, so
that every gate runs. Each half writes a record to OUT: `first/` and `resumed/`. Comments mark the
two lines that add the gates.
"""

import argparse
import os
import pydoc_data.topics
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stackproof.contracts.callbacks.huggingface import GateCallback  # the first of two

LENGTH = 96


def rows(tokenizer: ByT5Tokenizer, n: int) -> list[dict]:
    """Rows of ids with different lengths, each ended by the end-of-text token."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    draw, found, at = torch.Generator().manual_seed(0), [], 0
    for length in torch.randint(LENGTH // 2, LENGTH, (n,), generator=draw).tolist():
        found.append(
            {
                "input_ids": tokenizer(text[at : at + length], truncation=True, max_length=LENGTH)[
                    "input_ids"
                ]
            }
        )
        at += length
    return found


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Ids, mask and labels (B, T); padding has mask 0 and label -100."""
    longest = max(len(r["input_ids"]) for r in batch)
    ids = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in batch])
    mask = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(out: Path, steps: int, *, stop_at: int | None, record: str) -> GateCallback:
    """The whole script. With `record="resumed"` it continues from the last checkpoint."""
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    shape = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        **shape,
        **special,
    )
    arguments = TrainingArguments(
        str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=steps // 4,
        save_strategy="steps",
        save_steps=steps // 4,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        logging_steps=steps // 4,
        seed=0,
    )
    data = rows(tokenizer, 8 * steps + 16)
    gates = GateCallback(record=out / record)  # the second of two
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=data[16:],
        eval_dataset=data[:16],
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[gates],
    )
    if stop_at is not None:
        trainer.add_callback(_stop(stop_at))
        trainer.train()
    else:
        trainer.train(resume_from_checkpoint=True)
    return gates


def _stop(step: int):
    """Ends training after a step, as for a job that runs out of time."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step
            return control

    return Stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    parser.add_argument(
        "--steps", type=int, default=24, help="optimizer steps of both halves together; at least 8"
    )
    options = parser.parse_args()
    if options.steps < 8:
        parser.error("--steps is at least 8, so that each half saves and evaluates")
    train(options.out, options.steps, stop_at=options.steps // 2, record="first")
    gates = train(options.out, options.steps, stop_at=None, record="resumed")
    if int(os.environ.get("RANK", "0")):  # under torchrun, rank 0 prints for all
        return
    for gate_id, verdict in sorted(gates.verdicts().items()):
        print(f"{gate_id:28} {verdict.outcome:8} {verdict.message}")
    print(
        f"\nrecords: {options.out / 'first'} and {options.out / 'resumed'}; stack evidence show "
        f"{options.out / 'resumed'}"
    )


if __name__ == "__main__":
    main()
