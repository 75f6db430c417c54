"""Plants in the model that hide from short rows, from evaluation mode,
or from a look at one tensor at a time.
"""

import torch
import torch.nn.functional as F

from stackproof.model import build, forward_context, init, positions, transformer
from stackproof.museum.plant import swap


def far_keys_unseen():
    original = forward_context.ForwardContext.visible

    def near(self):
        seen = original(self)
        return seen | {"window": seen["window"] or 128}

    with swap(forward_context.ForwardContext, "visible", near):
        yield


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


def branches_drawn_wide():
    original = init.init_table

    def wide(cfg):
        return original(cfg.model_copy(update={"n_layers": 1}))

    with swap(init, "init_table", wide):
        yield


def dropout_undeclared():
    def dropped(self, x_BTD, position_BT):
        return F.dropout(x_BTD, 0.1, self.training)

    with swap(positions.Rotary, "added", dropped):
        yield


def scaled_in_training():
    original = transformer.Transformer.hidden_states

    def scaled(self, *inputs):
        x_BTD, report = original(self, *inputs)
        return (0.9 * x_BTD if self.training else x_BTD), report

    with swap(transformer.Transformer, "hidden_states", scaled):
        yield
