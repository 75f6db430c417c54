"""Plants in the model that hide from short rows, from evaluation mode,
or from a look at one tensor at a time.
"""

import torch
import torch.nn.functional as F

from stackproof.model import build, init, reading, rotary, transformer
from stackproof.museum.plant import plant, swap


@plant(
    "model.far-keys-unseen",
    gate="model.reference-differential",
    title="Keys far away are not seen",
    story=(
        "A kernel reads a fixed number of keys: a table of masks that was made for shorter rows, "
        "an index that overflows. Up to that length it is exact, and tests are short. Beyond it "
        "every query forgets the beginning of its text, without an error or a NaN."
    ),
    sources=(
        "https://github.com/vllm-project/vllm-ascend/issues/15503",
        "https://github.com/pytorch/pytorch/issues/162588",
    ),
)
def far_keys_unseen():
    original = reading.Reading.visible

    def near(self):
        seen = original(self)
        return seen | {"window": seen["window"] or 128}

    with swap(reading.Reading, "visible", near):
        yield


@plant(
    "model.layers-drawn-alike",
    gate="model.init-law",
    title="Every layer begins with the same numbers",
    story=(
        "The generator is seeded once per tensor and not once per model. Each tensor has the "
        "right mean and spread, so a table of both looks perfect. All layers begin as copies of "
        "one, and a part of their capacity is spent on parting."
    ),
    sources=(
        "https://github.com/netket/netket/issues/241",
        "https://github.com/marian-nmt/marian-dev/issues/77",
    ),
)
def layers_drawn_alike():
    original = build.initialise

    @torch.no_grad()
    def alike(model, cfg, generator):
        original(model, cfg, generator)
        for name, parameter in model.named_parameters():
            row = init.row_of(cfg, name)
            if row.law == "normal":
                parameter.normal_(0.0, row.value, generator=torch.Generator().manual_seed(7))

    with swap(build, "initialise", alike):
        yield


@plant(
    "model.branches-drawn-wide",
    gate="model.init-law",
    title="Branches begin as wide as everything else",
    story=(
        "The table of initialisation loses the factor by depth for what is added to the residual "
        "stream. Whoever checks weights against that table finds them as it says. Deep models "
        "start with a stream that grows from layer to layer."
    ),
    sources=("https://github.com/Lightning-AI/litgpt/issues/887",),
)
def branches_drawn_wide():
    original = init.init_table

    def wide(cfg):
        return original(cfg.model_copy(update={"n_layers": 1}))

    with swap(init, "init_table", wide):
        yield


@plant(
    "model.dropout-undeclared",
    gate="model.training-forward",
    title="Dropout that no one declared",
    story=(
        "A port keeps the dropout on embeddings that the original had, as a function call. Every "
        "branch drops its declared share, so a look at the branches is satisfied. The model "
        "trains on noisier inputs than its configuration says and is evaluated on clean ones."
    ),
    sources=(
        "https://github.com/BogiHsu/Tacotron2-PyTorch/issues/8",
        "https://arxiv.org/abs/1207.0580",
    ),
)
def dropout_undeclared():
    def dropped(self, x_BTD, position_BT):
        return F.dropout(x_BTD, 0.1, self.training)

    with swap(rotary.Rotary, "added", dropped):
        yield


@plant(
    "model.scaled-in-training",
    gate="model.training-forward",
    title="A factor in training mode alone",
    story=(
        "A head for training is fused with its loss and forgets a factor that the head for "
        "inference has. Each is tested against itself. What is trained is one model, what is "
        "evaluated, sampled and exported another, a little too sure of itself."
    ),
    sources=("https://github.com/linkedin/Liger-Kernel/issues/254",),
)
def scaled_in_training():
    original = transformer.Transformer.features

    def scaled(self, *inputs):
        x_BTD, report = original(self, *inputs)
        return (0.9 * x_BTD if self.training else x_BTD), report

    with swap(transformer.Transformer, "features", scaled):
        yield
