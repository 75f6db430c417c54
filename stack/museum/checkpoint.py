"""Plants in saving, loading and resuming."""

import time
from dataclasses import replace

import torch

from stackproof.model import transformer
from stackproof.museum.plant import plant, swap
from stackproof.spec.errors import CheckpointError
from stackproof.train import checkpoint

PATIENCE_S = 5.0  # a slow disk; enough for one update of a small model


@plant(
    "checkpoint.live-tensor-changed",
    gate="checkpoint.contract",
    title="The writer stores other weights than the live ones",
    story=(
        "An averaged copy, or a tensor that another thread is already updating, reaches the file "
        "instead of the weights of this step. Loading works, hashes match what was written, and "
        "the run goes on from somewhere it has never been."
    ),
    sources=(
        "https://github.com/ByteDance-Seed/VeOmni/issues/1176",
        "https://github.com/harubaru/waifu-diffusion/issues/31",
    ),
)
def live_tensor_changed():
    original = checkpoint.model_tensors

    def averaged(model):
        tensors = original(model)
        first = next(iter(tensors))
        return tensors | {first: tensors[first] * 0.999}

    with swap(checkpoint, "model_tensors", averaged):
        yield


@plant(
    "checkpoint.snapshot-aliases-live",
    gate="checkpoint.contract",
    title="The copy that is written behind training is no copy",
    story=(
        "A checkpoint is written while training goes on, from what should be a copy of the state. "
        "The copy shares memory with the live tensors. By the time the disk is ready the next "
        "update has moved some of them, and the file holds a state that never was: the step "
        "number of one update, the weights of another. It loads, its hashes match, and a resumed "
        "run is only slightly wrong."
    ),
    sources=(
        "https://github.com/ByteDance-Seed/VeOmni/issues/1176",
        "https://github.com/pytorch/tutorials/issues/3584",
    ),
)
def snapshot_aliases_live():
    write = checkpoint.write

    def late(root, snapshot):
        live = snapshot.content.tensors
        moments = live["state.safetensors"]
        seen, began = {n: t.clone() for n, t in moments.items()}, time.monotonic()
        while (
            all(torch.equal(t, seen[n]) for n, t in moments.items())
            and time.monotonic() - began < PATIENCE_S
        ):
            time.sleep(0.001)
        by_then = {
            file: {n: t.clone() for n, t in tensors.items()} for file, tensors in live.items()
        }
        return write(root, replace(snapshot, content=replace(snapshot.content, tensors=by_then)))

    with swap(checkpoint, "copies", lambda tensors: tensors), swap(checkpoint, "write", late):
        yield


@plant(
    "checkpoint.rng-not-saved",
    gate="checkpoint.contract",
    title="The random state is not in the file",
    story=(
        "Weights and moments are saved, the state of the random generator is not. A resumed run "
        "draws other dropout masks. It is a different run wearing the same checkpoint."
    ),
    sources=("founding note: the twenty-second training run",),
)
def rng_not_saved():
    with swap(checkpoint, "default_rng_state", lambda: {}):
        yield


@plant(
    "checkpoint.tensor-dropped",
    gate="checkpoint.contract",
    title="A tensor is missing from the file",
    story=(
        "A tensor taken for a shared one is left out while saving. The loader fills the gap with "
        "fresh random numbers and the model answers like a beginner, but it does answer."
    ),
    sources=(
        "https://github.com/safetensors/safetensors/issues/265",
        "https://github.com/pytorch/torchtitan/issues/3764",
    ),
)
def tensor_dropped():
    original = checkpoint.model_tensors

    def one_short(model):
        tensors = original(model)
        tensors.pop(sorted(tensors)[-1])
        return tensors

    with swap(checkpoint, "model_tensors", one_short):
        yield


@plant(
    "checkpoint.torn-write",
    gate="checkpoint.durability",
    title="Written straight to its final name",
    story=(
        "The checkpoint is written in place and `latest` is moved first. A kill in the middle "
        "leaves half a file over the only good one. A graceful exception in a test never shows "
        "it, a power cut does."
    ),
    sources=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/688",
        "https://github.com/PrimeIntellect-ai/prime-rl/issues/2992",
    ),
)
def torn_write():
    original = checkpoint.save

    def in_place(root, state, document):
        root.mkdir(parents=True, exist_ok=True)
        folder = root / f"step-{state.step:08d}"
        (root / "latest").write_text(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_bytes(b"{}")
        return original(root, state, document)

    with swap(checkpoint, "save", in_place):
        yield


@plant(
    "checkpoint.disk-full-swallowed",
    gate="checkpoint.durability",
    title="A full disk is only a warning",
    story=(
        "Saving is wrapped in a broad except that logs and goes on, so that one failed save does "
        "not end a long run. The disk stays full, every later save fails as well, and the night's "
        "work ends with the process."
    ),
    sources=("https://github.com/harvard-edge/cs249r_book/issues/2068",),
)
def disk_full_swallowed():
    original = checkpoint.save

    def swallowing(root, state, document):
        try:
            return original(root, state, document)
        except CheckpointError:
            return root

    with swap(checkpoint, "save", swallowing):
        yield


@plant(
    "checkpoint.hash-not-checked",
    gate="checkpoint.durability",
    title="Hashes are written but never read",
    story=(
        "Every file carries its hash, and the loader does not look. Neither torch nor safetensors "
        "notices a flipped exponent bit, so one weight is off by a power of two and the file "
        "loads without complaint."
    ),
    sources=("https://arxiv.org/abs/2102.11245",),
)
def hash_not_checked():
    with swap(checkpoint, "_verify_file", lambda path, entry, *, by_tensor: None):
        yield


@plant(
    "checkpoint.missing-keys-ignored",
    gate="checkpoint.durability",
    title="Missing state is filled with defaults",
    story=(
        "The loader takes what it finds and uses defaults for the rest. A checkpoint without its "
        "loss scale resumes at the default scale, skips some steps and goes on. Nothing says that "
        "anything was missing."
    ),
    sources=(
        "founding note: the twenty-second training run",
        "https://github.com/torchgeo/torchgeo/issues/4036",
    ),
)
def missing_keys_ignored():
    original = checkpoint._read_json

    def forgiving(path):
        document = original(path)
        return (
            dict.fromkeys(checkpoint.STATE_KEYS) | document
            if path.name == "state.json"
            else document
        )

    with swap(checkpoint, "_read_json", forgiving):
        yield


@plant(
    "checkpoint.rng-lost",
    gate="checkpoint.resume-equivalence",
    title="Resume loses the random state",
    story=(
        "The state is in the file and nobody puts it back. Dropout after the resume repeats masks "
        "of the start. Without dropout, or with a tolerance on the loss, the seam cannot be seen."
    ),
    sources=("founding note: the twenty-second training run",),
)
def rng_lost():
    with swap(checkpoint, "set_default_rng_state", lambda states: None):
        yield


@plant(
    "checkpoint.batch-order-restarted",
    gate="checkpoint.resume-equivalence",
    title="Resume starts the data from the beginning",
    story=(
        "The loader is built anew and its position is not restored. The first samples are seen "
        "twice and the last ones never, and the loss even improves a little, which looks like "
        "progress."
    ),
    sources=(
        "founding note: the twenty-second training run",
        "https://github.com/huggingface/accelerate/issues/2016",
    ),
)
def batch_order_restarted():
    original = checkpoint.restore

    def from_the_start(state, loaded):
        original(state, loaded)
        state.reader.cursor = 0

    with swap(checkpoint, "restore", from_the_start):
        yield


@plant(
    "checkpoint.step-off-by-one",
    gate="checkpoint.resume-equivalence",
    title="The resumed run repeats a step number",
    story=(
        "The step is saved before it is counted. Every resume repeats one update number, so the "
        "learning rate lags by one and the run ends one update late. Any tolerance on the loss "
        "lets it through."
    ),
    sources=(
        "founding note: the twenty-second training run",
        "https://github.com/InternLM/InternEvo/issues/351",
    ),
)
def step_off_by_one():
    original = checkpoint.restore

    def one_less(state, loaded):
        original(state, loaded)
        state.step -= 1

    with swap(checkpoint, "restore", one_less):
        yield


@plant(
    "checkpoint.moments-lost",
    gate="checkpoint.resume-equivalence",
    title="Resume forgets the optimizer's moments",
    story=(
        "Only the weights come back. AdamW starts with empty moments, takes a few large steps and "
        "recovers. The curve shows a small bump that is easily blamed on the data."
    ),
    sources=("https://github.com/pytorch/torchtitan/issues/809",),
)
def moments_lost():
    def forget(state, tensors):
        state.optimizer.state.clear()

    with swap(checkpoint, "_restore_optimizer", forget):
        yield


@plant(
    "checkpoint.loss-scale-lost",
    gate="checkpoint.resume-equivalence",
    title="Resume restarts the loss scale",
    story=(
        "The half-precision loss scale begins at its default after every resume. The first "
        "updates overflow and are retried until the scale has found its place again. In bf16 and "
        "fp32 there is nothing to see."
    ),
    sources=("founding note: the twenty-second training run",),
)
def loss_scale_lost():
    original = checkpoint.restore

    def default_scale(state, loaded):
        original(state, loaded)
        state.scaler = torch.amp.GradScaler(state.device.type, enabled=True, init_scale=2.0**10)

    with swap(checkpoint, "restore", default_scale):
        yield


@plant(
    "checkpoint.memory-lost",
    gate="checkpoint.resume-equivalence",
    title="Resume forgets what was best",
    story=(
        "Weights and moments come back, what the run had learnt about itself does not: the best "
        "held-out loss, the rounds without a gain, the running mean. Every resume gives the stop "
        "rule its patience back, and the next evaluation is the best so far."
    ),
    sources=("founding note: ship-two-001",),
)
def memory_lost():
    original = checkpoint.restore

    def forgetful(state, loaded):
        stopper, best = state.stopper.state_dict(), dict(state.best)
        dropped = original(state, loaded)
        state.stopper.load_state_dict(stopper)
        state.best, state.ema_loss_nats = best, None
        return dropped

    with swap(checkpoint, "restore", forgetful):
        yield


@plant(
    "checkpoint.tie-broken-on-load",
    gate="checkpoint.resume-equivalence",
    title="Head and embedding come back as two tensors",
    story=(
        "The loader fills every name with a tensor of its own, and the weight that head and "
        "embedding share is now two. They are equal, so the loss after the resume is right to the "
        "last bit. From the next update on they drift apart, and each is saved as the other."
    ),
    sources=(
        "https://github.com/NVIDIA-NeMo/Automodel/issues/2571",
        "https://github.com/huggingface/accelerate/issues/1204",
    ),
)
def tie_broken_on_load():
    original, shared = checkpoint.restore, transformer.Transformer.head_weight
    copies = {}

    def untied(state, loaded):
        dropped = original(state, loaded)
        copies[id(state.model)] = state.model.embed.weight.detach().clone()
        return dropped

    head = property(lambda self: copies.get(id(self), shared.fget(self)))
    with swap(checkpoint, "restore", untied), swap(transformer.Transformer, "head_weight", head):
        yield


@plant(
    "checkpoint.prefix-ignored",
    gate="checkpoint.resume-equivalence",
    title="Nothing in the file has the right name, and nobody minds",
    story=(
        "A wrapper puts its prefix before every name that is saved. The loader is told not to be "
        "strict, finds none of its own names, loads nothing and returns. What goes on is a model "
        "with fresh weights and the moments of a trained one."
    ),
    sources=(
        "https://github.com/torchgeo/torchgeo/issues/4036",
        "https://github.com/pytorch/pytorch/issues/141256",
    ),
)
def prefix_ignored():
    def not_strict(model, tensors):
        wrapped = {f"wrapped.{name}": tensor for name, tensor in tensors.items()}
        own = checkpoint.model_tensors(model)
        for name in own.keys() & wrapped.keys():
            own[name].copy_(wrapped[name])

    with swap(checkpoint, "load_model", not_strict):
        yield


@plant(
    "checkpoint.average-left-in",
    gate="checkpoint.resume-equivalence",
    title="The averaged weights stay in the model",
    story=(
        "For the save, the running average of the weights is put into the model, and the line "
        "that puts the live ones back is missing. From then on training goes on from the average. "
        "How often a run saves now decides what it learns."
    ),
    sources=("https://github.com/harubaru/waifu-diffusion/issues/31",),
)
def average_left_in():
    original = checkpoint.save

    def averaging(root, state, document):
        with torch.no_grad():
            for tensor in checkpoint.model_tensors(state.model).values():
                tensor.mul_(0.999)
        return original(root, state, document)

    with swap(checkpoint, "save", averaging):
        yield


@plant(
    "checkpoint.decay-restored-wrong",
    gate="checkpoint.resume-equivalence",
    title="A resumed optimizer decays by another factor",
    story=(
        "Learning rates are put back before the first update, other numbers of the groups after "
        "it. The first update of every resume uses the decay the optimizer was built with. "
        "Whoever compares learning rates over the seam sees nothing."
    ),
    sources=("https://github.com/NVIDIA-NeMo/Automodel/issues/3882",),
)
def decay_restored_wrong():
    original = checkpoint.restore

    def of_the_constructor(state, loaded):
        dropped = original(state, loaded)
        for group in state.optimizer.param_groups:
            group["weight_decay"] *= 0.5
        return dropped

    with swap(checkpoint, "restore", of_the_constructor):
        yield
