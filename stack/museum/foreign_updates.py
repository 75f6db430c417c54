"""Plants in a training script that is not ours, where it updates, evaluates and saves;
see `stackproof.museum.script`.
"""

import torch

from stackproof.museum import script
from stackproof.museum.plant import plant, swap


@plant(
    "optim.foreign-parameter-missing",
    gate="optim.ownership",
    title="A layer is not in the optimizer",
    story=(
        "The optimizer is built from a list of modules, and one that was added later is not in "
        "it. It keeps its random weights for the whole run. The rest learns around it, and the "
        "loss is a little higher than it could be."
    ),
    sources=("https://github.com/facebookresearch/fairseq/issues/4702",),
)
def parameter_missing():
    def forgetful(model):
        return torch.optim.AdamW(
            [p for n, p in model.named_parameters() if p.requires_grad and "qkv" not in n], lr=1e-3
        )

    with swap(script, "make_optimizer", forgetful):
        yield


@plant(
    "optim.foreign-decay-on-norms",
    gate="optim.decay-groups",
    title="Gains and biases decay like matrices",
    story=(
        "One group for all parameters is the shortest way to build an optimizer. Weight decay "
        "then pulls the gains of norms towards zero, against the loss, at every step. Nothing "
        "breaks; it is a slightly worse model."
    ),
    sources=("https://arxiv.org/abs/1711.05101",),
)
def decay_on_norms():
    def one_group(model):
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
        )

    with swap(script, "make_optimizer", one_group):
        yield


@plant(
    "optim.foreign-stale-gradients",
    gate="optim.gradient-kept",
    title="Gradients are never emptied",
    story=(
        "The line that empties gradients is behind a condition that is no longer true. Every "
        "update carries all gradients before it, like momentum without decay. With clipping the "
        "norm looks normal, and training is slow and then unstable."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/206",),
)
def stale_gradients():
    def kept(model):
        return None

    with swap(script, "after_update", kept):
        yield


@plant(
    "optim.foreign-gradient-zeroed",
    gate="optim.gradient-kept",
    title="One tensor's gradient is wiped before the update",
    story=(
        "A hook that replaces NaN by zero, or a freeze that was meant for another layer, empties "
        "one tensor's gradient between the last backward pass and the update. The norm hardly "
        "changes, and the layer only decays."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/206",),
)
def gradient_zeroed():
    original = script.before_update

    def wiped(model):
        original(model)
        model.qkv.weight.grad.zero_()

    with swap(script, "before_update", wiped):
        yield


@plant(
    "optim.foreign-frozen-moves",
    gate="optim.moves",
    title="A frozen parameter moves",
    story=(
        "A parameter is frozen, and something else writes to it: an average of weights, a decay "
        "applied by hand, an optimizer that still holds its momentum. The base model under a "
        "fine-tune is then no longer the base model."
    ),
    sources=("https://github.com/pytorch/ao/issues/1124",),
)
def frozen_moves():
    original = script.before_update

    def decayed(model):
        original(model)
        model.place.weight.data.mul_(0.999)

    with swap(script, "before_update", decayed):
        yield


@plant(
    "optim.foreign-branch-detached",
    gate="optim.moves",
    title="A branch is cut off from the gradient",
    story=(
        "A value is detached for a measurement, and the detached one is used further on. The "
        "branch before it has no gradient any more. Its weights stand in the optimizer and never "
        "move, and the model learns without it."
    ),
    sources=("https://github.com/facebookresearch/fairseq/issues/4702",),
)
def branch_detached():
    def cut(x):
        return x.detach()

    with swap(script, "mixed", cut):
        yield


@plant(
    "optim.foreign-uphill",
    gate="optim.moves",
    title="The optimizer climbs",
    story=(
        "An optimizer written after a paper adds the step where its paper subtracts it. With a "
        "small rate the loss stands near that of guessing for hundreds of steps before anyone "
        "calls it a divergence."
    ),
    sources=("https://github.com/torch/optim/pull/52",),
)
def uphill():
    class Written(torch.optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=group["lr"])

    def climbing(model):
        return Written(
            [p for p in model.parameters() if p.requires_grad], {"lr": 1e-3, "weight_decay": 0.0}
        )

    with swap(script, "make_optimizer", climbing):
        yield


@plant(
    "optim.foreign-never-steps",
    gate="optim.gradient-kept",
    title="After the first update there is no other",
    story=(
        "The step stands behind the condition that gradients are complete, and the counter behind "
        "that condition is off by one. Losses are logged for every batch, gradients add up for "
        "ever, and the weights are those of the first update."
    ),
    sources=("https://github.com/huggingface/diffusers/issues/10553",),
)
def never_steps():
    original = script.update

    def once(optimizer):
        if not optimizer.state:
            original(optimizer)

    with (
        swap(script, "update", once),
        swap(script, "STEPS", 40),
        swap(script, "after_update", lambda model: None),
    ):
        yield


@plant(
    "optim.foreign-evaluation-writes",
    gate="optim.moves",
    title="An evaluation changes the weights",
    story=(
        "For a faster evaluation the weights are cast to half precision and back, or an average "
        "is swapped in and the way back forgets one tensor. Training goes on from other weights "
        "than it had reached, and every evaluation costs a little of them."
    ),
    sources=("https://github.com/pytorch/ao/issues/1124",),
)
def evaluation_writes():
    original = script.evaluate

    def rounded(model, batch):
        model.qkv.weight.data = model.qkv.weight.data.half().float()
        return original(model, batch)

    with swap(script, "evaluate", rounded):
        yield


@plant(
    "schedule.foreign-per-micro-step",
    gate="schedule.declared-rate",
    title="The schedule ticks at every micro-step",
    story=(
        "The scheduler stands inside the loop over micro-batches. With accumulation over eight it "
        "ends its decay after an eighth of the run, and the rest is trained at the lowest rate. "
        "The loss curve looks like a plateau."
    ),
    sources=("https://github.com/huggingface/accelerate/issues/963",),
)
def per_micro_step():
    def tick(scheduler):
        scheduler.optimizer._opt_called = True
        scheduler.step()

    with swap(script, "micro_step_done", tick):
        yield


@plant(
    "schedule.foreign-rate-zero",
    gate="schedule.declared-rate",
    title="The learning rate is zero",
    story=(
        "An integer division in the warm-up gives 0 until the warm-up has ended, or the number of "
        "steps was counted in epochs and the decay has already ended. The loop runs, logs and "
        "saves, and nothing is learned."
    ),
    sources=("https://github.com/huggingface/accelerate/issues/963",),
)
def rate_zero():
    def zero(update):
        return 0.0

    with swap(script, "rate_at", zero):
        yield


@plant(
    "evaluation.foreign-dropout-on",
    gate="evaluation.mode",
    title="Held-out batches are scored with dropout",
    story=(
        "The evaluation forgets to switch the model's mode. Every score is a little too bad and a "
        "little random, early stopping acts on noise, and the best checkpoint is the luckiest one."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/206",),
)
def dropout_on():
    def loud(model, batch):
        with torch.no_grad():
            return float(model(**script.inputs_of(batch)).sum())

    with swap(script, "evaluate", loud):
        yield


@plant(
    "evaluation.foreign-stays-in-evaluation",
    gate="evaluation.mode",
    title="Training goes on in evaluation mode",
    story=(
        "The evaluation switches the mode and does not switch it back. From the first evaluation "
        "on the model trains without dropout. The training loss drops at that very step, which "
        "looks like progress."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/206",),
)
def stays_in_evaluation():
    def left_in_eval(model, batch):
        model.eval()
        with torch.no_grad():
            return float(model(**script.inputs_of(batch)).sum())

    with swap(script, "evaluate", left_in_eval):
        yield


@plant(
    "checkpoint.foreign-tensor-changed",
    gate="checkpoint.reload",
    title="A saved tensor is not the live one",
    story=(
        "Weights are rounded to half precision on the way into the file, or a wrapper's copy is "
        "saved in place of the live tensor. The folder loads without a word and is a slightly "
        "different model."
    ),
    sources=("https://github.com/safetensors/safetensors/issues/265",),
)
def tensor_changed():
    original = script.saved

    def rounded(model, optimizer):
        kept = original(model, optimizer)
        kept["model"]["qkv.weight"] = kept["model"]["qkv.weight"].bfloat16().float()
        return kept

    with swap(script, "saved", rounded):
        yield


@plant(
    "checkpoint.foreign-moments-lost",
    gate="checkpoint.state-restored",
    title="A run goes on without its moments",
    story=(
        "The checkpoint holds the weights, and the optimizer starts anew. The first updates after "
        "the resume are as large as those of a fresh run and undo hundreds of steps; the loss "
        "shows a bump at every restart."
    ),
    sources=("https://github.com/huggingface/accelerate/issues/2016",),
)
def moments_lost():
    original = script.loaded

    def without_moments(kept, model, optimizer):
        original(kept, model, optimizer)
        optimizer.state.clear()

    with swap(script, "loaded", without_moments):
        yield
