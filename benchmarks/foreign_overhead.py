"""What the gates cost in a trainer that is not ours: the same stock scripts with and without them,
in turn, in one process.

python benchmarks/foreign_overhead.py [--device cpu|cuda] [--rounds 5] [--steps 20] [--run-dir DIR]
Two scripts: a `transformers.Trainer` with GateCallback, and a loop written by hand inside `gated`.
Every round trains the same model from the same weights on the same rows four times; the first
WARM_UP steps of each are not counted. Writes a record of kind benchmark.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from stackproof.contracts.callbacks.huggingface import GateCallback
from stackproof.contracts.callbacks.plain import gated
from stackproof.spec.building import RecordBuilder
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment

CLAIM = (
    "Step time of a stock transformers.Trainer and of a hand-written loop with the gates over "
    "that without them, alternating."
)
NOT_COVERED = (
    "evaluation, saving and resuming, where gates look as well",
    (
        "other models; the gates' time per step grows with parameters and with tokens times "
        "vocabulary, a step with their product"
    ),
    "more than one process, and loss functions that never build the logits",
    "memory",
)
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ROWS, LENGTH, WARM_UP, MAX_NORM = 8, 128, 4, 1.0
Steps = list[float]


class Clock(TrainerCallback):
    """Notes when each step begins."""

    def __init__(self):
        self.begun: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.begun.append(now())


def now() -> float:
    """Seconds; on a GPU after all that was launched is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def model_on(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, max_position_embeddings=LENGTH, tie_word_embeddings=True)
    ).to(device)


def rows(n_steps: int) -> list[dict]:
    """Full rows of drawn ids; labels are the ids."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPE["vocab_size"], (n_steps * ROWS, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def stock_trainer(
    device: str, n_steps: int, folder: str, watched: bool
) -> tuple[float, Steps, float]:
    """(seconds before step 1, seconds of each later step, seconds a step spends in the
    gates) of `Trainer.train`.
    """
    clock, gates = Clock(), GateCallback()
    arguments = TrainingArguments(
        folder,
        max_steps=n_steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-4,
        max_grad_norm=MAX_NORM,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=10,
    )
    callbacks = [clock, gates] if watched else [clock]
    trainer = Trainer(model_on(device), arguments, train_dataset=rows(n_steps), callbacks=callbacks)
    trainer.log = lambda *args, **kwargs: None
    started = now()
    trainer.train()
    return (
        clock.begun[0] - started,
        between(clock.begun),
        gates.cost().per_step_s if watched else 0.0,
    )


def own_loop(device: str, n_steps: int, folder: str, watched: bool) -> tuple[float, Steps, float]:
    """The same of a loop as anyone writes it."""
    model = model_on(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    batches = torch.stack([r["input_ids"] for r in rows(n_steps)]).to(device).split(ROWS)
    begun: list[float] = []

    def train() -> None:
        for ids in batches:
            begun.append(now())
            model(input_ids=ids, labels=ids).loss.backward()
            clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    started = now()
    if not watched:
        train()
        return begun[0] - started, between(begun), 0.0
    with gated(model, optimizer, max_grad_norm=MAX_NORM) as gate:
        train()
    return begun[0] - started, between(begun), gate.cost().per_step_s


SCRIPTS: dict[str, Callable] = {"trainer": stock_trainer, "loop": own_loop}


def between(moments: list[float]) -> Steps:
    """Time from one step's begin to the next one's, without the warm-up."""
    return [b - a for a, b in zip(moments, moments[1:])][WARM_UP:]


def measure(name: str, builder: RecordBuilder, device: str, rounds: int, n_steps: int) -> None:
    """Alternate one script with itself watched, and state what came out."""
    before: dict[bool, list[float]] = {True: [], False: []}
    medians: dict[bool, list[float]] = {True: [], False: []}
    inside: list[float] = []
    for round_number in range(rounds + 1):  # the first round warms up
        for watched in (False, True) if round_number % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                start_s, steps, inside_s = SCRIPTS[name](device, n_steps, folder, watched)
            if round_number:
                before[watched].append(start_s)
                medians[watched].append(statistics.median(steps))
                inside += [inside_s] if watched else []
    ratios = [a / b for a, b in zip(medians[True], medians[False])]
    counted = rounds * (n_steps - 1 - WARM_UP)
    builder.metric(
        f"{name}_step_s_without_gates",
        statistics.median(medians[False]),
        "s",
        n=counted,
        better="lower",
    )
    builder.metric(
        f"{name}_step_s_with_gates",
        statistics.median(medians[True]),
        "s",
        n=counted,
        better="lower",
    )
    for suffix, value in (
        ("", statistics.median(ratios)),
        ("_min", min(ratios)),
        ("_max", max(ratios)),
    ):
        builder.metric(f"{name}_step_time_ratio{suffix}", value, "1", n=rounds, better="lower")
    builder.metric(
        f"{name}_gate_s_per_step", statistics.median(inside), "s", n=rounds, better="lower"
    )
    builder.metric(
        f"{name}_gate_frac",
        statistics.median(i / s for i, s in zip(inside, medians[False])),
        "1",
        n=rounds,
        better="lower",
    )
    builder.metric(
        f"{name}_s_before_step_1_without_gates",
        statistics.median(before[False]),
        "s",
        n=rounds,
        better="lower",
    )
    builder.metric(
        f"{name}_s_before_step_1_with_gates",
        statistics.median(before[True]),
        "s",
        n=rounds,
        better="lower",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=20, help="optimizer steps of each script, warm-up included"
    )
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < WARM_UP + 3:
        parser.error(
            f"at least 1 round and {WARM_UP + 3} steps are needed, else nothing is left to count"
        )
    config = {
        "benchmark": "foreign-overhead",
        "model": SHAPE,
        "rows": ROWS,
        "length": LENGTH,
        "warm_up_steps": WARM_UP,
    }
    config |= {"rounds": options.rounds, "steps": options.steps}
    builder = RecordBuilder(
        kind="benchmark", spec=load_spec(), config=config, claim=CLAIM, not_covered=NOT_COVERED
    )
    builder.command = ["python", "benchmarks/foreign_overhead.py", *sys.argv[1:]]
    builder.environment = environment(options.device)
    directory = options.run_dir or Path("runs") / builder.id
    directory.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        measure(name, builder, options.device, options.rounds, options.steps)
    builder.metric("parameters", sum(p.numel() for p in model_on("cpu").parameters()), "1")
    record = builder.finish(
        directory,
        status="completed",
        end_reason=f"{options.rounds} alternating rounds",
        exit_code=0,
    )
    for name, metric in record.metrics.items():
        print(f"{name:44} {metric.value:.6g} {metric.unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
