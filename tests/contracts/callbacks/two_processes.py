"""Stock scripts in two processes: python -m torch.distributed.run --nproc-per-node
2 two_processes.py FOLDER.

Each process writes FOLDER/RANK.json: by script, the first failures, whether the run was halted, and
the outcome of every gate.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.contracts.callbacks.stock import GateCallback, Trainer, llama, script

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])
SAVES = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


class MovesOnOne(Trainer):
    """After the second step one process alone changes a weight."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1 and self.args.process_index == 1:
            with torch.no_grad():
                self.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
        return super().training_step(*args, **kwargs)


class Unshifted(Trainer):
    """Every logit is compared with its own token."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class OwnWeights(TrainerCallback):
    """Gives each process weights of its own after the trainer has made them equal."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and args.process_index == 1:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)


CASES = {
    "clean": {"plan": SAVES | {"gradient_accumulation_steps": 2}},
    "moved on one": {"trainer_class": MovesOnOne, "plan": SAVES},
    "other weights": {"extra": (OwnWeights(),), "plan": SAVES},
    "unshifted": {"trainer_class": Unshifted, "plan": {}},
}
said = {}
for name, case in CASES.items():
    callback = GateCallback(record=FOLDER / name / "record")
    plan = {"ddp_backend": "gloo"} | case.pop("plan")
    _, error = script(FOLDER / name, llama(), callback=callback, **case, **plan)
    outcomes = {g: v.outcome for g, v in callback.verdicts().items()}
    said[name] = {
        "red": callback.first_failures(),
        "raised": error is not None,
        "outcomes": outcomes,
    }
(FOLDER / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
