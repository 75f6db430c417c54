"""The first operation that makes a NaN or an infinity is named exactly: operation, module, layer,
line, phase, and what it was given.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackproof.config import (
    DifferentialAttention,
    HardCapacity,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    SoftmaxAttention,
)
from stackproof.model.build import build_model
from stackproof.trace.nonfinite import first_nonfinite, watching
from stackproof.trace.trace import logits_of
from tests.trace import models

SIZES = dict(
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=40,
    max_seq_len=36,
    init_std=0.1,
)
VARIANTS = {
    "plain": {},
    "differential": {"attention": DifferentialAttention(window=5)},
    "experts": {"ffn": MixtureOfExperts(n_experts=4)},
    "depth": {
        "depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.4), every=2),
        "attention": SoftmaxAttention(window=7),
    },
}
IDS = torch.arange(24).reshape(2, 12) % 19


def model_of(**changes) -> nn.Module:
    return build_model(ModelConfig(**{**SIZES, **changes}), 19, seed=3).eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def line(event) -> str:
    """Where and what the line of an event is."""
    first = event.where.lines[0]
    assert first.number > 0 and first.text
    return f"{first.file.split('/')[-1]} {first.function} {first.text}"


# ---- plants in our model


def test_a_weight_that_overflows_in_a_cast_is_named_with_its_module_line_and_range():
    """One value of 1e5 in layer 1's `up`, finite in float32, is none in float16: the cast for that
    product is the first operation.
    """
    model = model_of()
    with torch.no_grad():
        model.layers[1].ffn.up.weight[3, 4] = 1e5

    def call():
        with torch.autocast("cpu", dtype=torch.float16):
            return model(IDS)

    report = first_nonfinite(call, models=model)
    first = report.first
    assert (first.kind, first.what, first.op) == (
        "made",
        "Inf",
        "aten._to_copy.default",
    ) and report.point == "layers.1.ffn.up"
    assert (first.where.module, first.where.layer, first.where.phase) == (
        "layers.1.ffn.up",
        1,
        "forward",
    )
    (given,) = first.inputs
    assert (
        given.held == "parameter layers.1.ffn.up.weight"
        and given.max == 1e5
        and given.first_bad is None
    )
    assert (
        given.shape == (40, 32)
        and given.dtype == "float32"
        and dict(first.scalars)["dtype"] == "torch.float16"
    )
    (out,) = first.outputs
    assert out.n_posinf == 1 and out.first_bad == (3, 4) and out.dtype == "float16"


def test_activations_that_overflow_in_a_product_are_named_not_the_casts_before_or_the_norms_after():
    """Both factors fit into float16, their product does not: layer 2's gated product, whose output
    the next matrix spreads everywhere.
    """
    model = model_of()
    with torch.no_grad():
        model.layers[2].ffn.gate.weight.fill_(20.0)
        model.layers[2].ffn.up.weight.fill_(20.0)
        model.layers[2].ffn_norm.weight.fill_(20.0)

    def call():
        with torch.autocast("cpu", dtype=torch.float16):
            return model(IDS)

    report = first_nonfinite(call, models=model)
    first = report.first
    assert (first.kind, first.what, first.op) == (
        "made",
        "Inf",
        "aten.mul_.Tensor",
    ) and report.point == "layers.2.ffn.swiglu"
    assert (first.where.module, first.where.layer) == (
        "layers.2.ffn",
        2,
    ) and "eager.py _SwiGLU.forward" in line(first)
    a, b = first.inputs
    assert a.n_posinf == b.n_posinf == 0 and 256 < a.max < 65504 and 256 < b.max < 65504, (
        "inputs as they were, though it works in place"
    )
    assert first.where.lines[1].function == "swiglu", "and who called that"


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exploded_weight_is_named_in_every_variant(variant):
    """Weights of 1e25 in layer 1's queries and keys: their scores are the first value beyond
    float32, in the attention of layer 1.
    """
    model = model_of(**VARIANTS[variant])
    with torch.no_grad():
        model.layers[1].attention.q.weight.fill_(1e25)
        model.layers[1].attention.k.weight.fill_(1e25)
    report = first_nonfinite(model, IDS)
    assert (
        report.first.kind == "made"
        and report.first.where.layer == 1
        and report.first.where.module == "layers.1.attention"
    )
    assert (
        "scaled_dot_product" in report.first.op
        or report.first.op.startswith("aten.bmm")
        or report.first.op.startswith("aten.mul")
    )
    given = {v.name: v for v in report.first.inputs}
    mask = given.pop("attn_mask", None)
    assert mask is None or (mask.n_neginf and mask.max == 0.0), (
        "a mask's own infinities are no reason"
    )
    assert (
        all(v.first_bad is None for v in given.values())
        and max(v.max for v in given.values()) > 1e20
    )


def test_a_norm_without_eps_divides_zero_by_zero():
    """A row of zeros reaches layer 0's norm with eps 0: 0/0 in the division, not in the root before
    it nor in the matrix after it.
    """
    model = model_of()
    with torch.no_grad():
        model.embed.weight[5] = 0.0
    for block in model.layers:
        block.attention_norm.eps = 0.0
    first = first_nonfinite(model, IDS).first
    assert (first.kind, first.what, first.op, first.where.module) == (
        "made",
        "NaN",
        "aten.div.Tensor",
        "layers.0.attention_norm",
    )
    assert "eager.py _normalised" in line(first) and "x_BTD / rms_BT1" in line(first)
    assert (
        [v.min for v in first.inputs][1] == 0.0
        and first.outputs[0].first_bad == (0, 5, 0)
        and first.outputs[0].n_nan == 32
    )
    clean = model_of()
    assert first_nonfinite(clean, IDS).first is None


def test_a_logarithm_of_zero_in_a_loss_is_named_outside_the_modules():
    model = model_of()

    def call():
        probs = (model(IDS) * 1000).softmax(-1)
        return -probs.log().gather(-1, IDS[..., None]).mean()

    first = first_nonfinite(call, models=model).first
    assert (first.kind, first.what, first.op, first.where.module, first.where.layer) == (
        "made",
        "Inf",
        "aten.log.default",
        "",
        None,
    )
    assert (
        "probs.log()" in line(first)
        and first.inputs[0].min == 0.0
        and first.outputs[0].n_neginf > 0
    )


def test_the_derivative_of_a_root_at_zero_is_found_in_the_backward_with_the_line_of_the_forward():
    model = model_of()

    def call():
        x = model.layers[1](model.embed(IDS), model.forward_context(IDS))
        return ((x - x.detach()).abs().sum(-1) + 0.0).sqrt().mean()

    report = first_nonfinite(call, models=model, backward=True)
    first = report.first
    assert (first.kind, first.what, first.op) == (
        "made",
        "Inf",
        "aten.div.Tensor",
    ) and first.where.phase == "backward"
    assert (
        first.where.node == "SqrtBackward0"
        and first.where.of == "aten.sqrt.default"
        and ".sqrt().mean()" in line(first)
    )
    assert first.inputs[1].max == 0.0 and first.inputs[0].first_bad is None


def test_a_derivative_inside_a_module_has_the_modules_path_and_a_written_one_its_own_line():
    """Once a derivative of torch's, known by the operation of the forward it belongs to; once one
    in Python, whose own line is shown.
    """
    model = model_of()
    ffn = model.layers[2].ffn
    ffn.forward = lambda x, reading=None, original=ffn.forward: (original(x, reading) * 0).sqrt()
    report = first_nonfinite(lambda: loss_of(model), models=model, backward=True)
    first = report.first
    assert (first.where.phase, first.where.module, first.where.layer) == (
        "backward",
        "layers.2.ffn",
        2,
    )
    assert report.point == "layers.2.ffn.swiglu", (
        "the first point on the way back whose gradient shows it"
    )
    assert (first.where.node, first.where.of, first.what) == (
        "SqrtBackward0",
        "aten.sqrt.default",
        "Inf",
    ) and ".sqrt()" in line(first)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / torch.zeros_like(grad)

    model = model_of()
    ffn = model.layers[2].ffn
    ffn.forward = lambda x, reading=None, original=ffn.forward: Wrong.apply(original(x, reading))
    first = first_nonfinite(lambda: loss_of(model), models=model, backward=True).first
    assert (first.where.phase, first.where.module, first.where.layer) == (
        "backward",
        "layers.2.ffn",
        2,
    )
    assert (
        "Wrong.backward return grad / torch.zeros_like(grad)" in line(first)
        and first.where.node == "WrongBackward"
    )


def test_a_block_that_is_run_again_in_the_backward_keeps_its_places():
    """Activation checkpointing stops its second run by an exception; the stack of modules survives
    that, and nothing is found twice.
    """
    model = model_of().train()
    model.activation_checkpointing = True
    report = first_nonfinite(lambda: loss_of(model), models=model, backward=True)
    assert report.first is None and report.others == ()
    ffn = model.layers[1].ffn
    ffn.forward = lambda x, reading=None, original=ffn.forward: (original(x, reading) * 0).sqrt()
    with watching(model) as seen:
        loss_of(model).backward()
    first = seen.report().first
    assert (first.where.module, first.where.phase, first.where.node) == (
        "layers.1.ffn",
        "backward",
        "SqrtBackward0",
    )
    assert seen.watch.here.running == []


# ---- masks: infinities that are put in


def masked_scores(allowed: torch.Tensor) -> torch.Tensor:
    scores = torch.ones(allowed.shape).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1)


def test_a_row_with_nothing_to_see_is_named_and_a_usual_mask_is_not():
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    report = first_nonfinite(masked_scores, allowed)
    assert report.first is None and [e.kind for e in report.others] == ["put in"]
    allowed[2] = False
    report = first_nonfinite(masked_scores, allowed)
    first = report.first
    assert (first.kind, first.what, first.op) == (
        "made",
        "NaN",
        "aten._softmax.default",
    ) and "scores.softmax(-1)" in line(first)
    assert (
        first.outputs[0].first_bad == (2, 0)
        and first.outputs[0].n_nan == 4
        and first.inputs[0].n_neginf == 9
    )
    assert [e.op for e in report.others] == ["aten.masked_fill.Scalar"]


def test_infinity_minus_infinity_of_a_mask_is_made_where_they_meet():
    def call():
        mask = torch.full((3, 3), float("-inf")).triu(1)
        scores = torch.zeros(3, 3) + mask
        return scores - scores.amax(-1, keepdim=True) * mask

    first = first_nonfinite(call).first
    assert first.what == "NaN" and first.kind == "made"
    assert first.op == "aten.mul.Tensor", "0 · −inf comes before the difference"


def test_what_is_thrown_away_is_no_finding_but_its_derivative_is():
    """The trap of `where`: the logarithm of zero is not chosen,
    and its derivative is 0 · inf all the same.
    """
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    chosen = lambda: torch.where(x > 0, x.log(), 0.0)  # noqa: E731
    report = first_nonfinite(chosen)
    assert report.first is None and [e.op for e in report.others] == ["aten.log.default"]
    first = first_nonfinite(chosen, backward=True).first
    assert (first.op, first.where.phase, first.where.of) == (
        "aten.div.Tensor",
        "backward",
        "aten.log.default",
    ) and first.what == "NaN"


# ---- what came in


def test_a_nan_in_a_weight_is_said_to_have_come_in_with_it():
    model = model_of()
    with torch.no_grad():
        model.layers[1].attention.v.weight[0, 0] = float("nan")
    report = first_nonfinite(model, IDS)
    assert report.already == ("layers.1.attention.v.weight",)
    first = report.first
    assert (first.kind, first.carrier, first.where.module) == (
        "came in",
        "parameter layers.1.attention.v.weight",
        "layers.1.attention.v",
    )


def test_a_nan_written_while_the_trace_runs_is_named_at_the_line_that_writes_it():
    model = model_of()

    def call():
        with torch.no_grad():
            model.layers[0].ffn.down.weight[1, 2] = float("nan")
        return model(IDS)

    first = first_nonfinite(call, models=model).first
    assert first.what == "NaN" and first.kind == "put in" and "= float(" in line(first)


def test_an_infinite_input_is_an_argument_that_came_in_and_a_mask_buffer_is_not_blamed():
    x = torch.tensor([1.0, float("inf")])
    first = first_nonfinite(lambda: x * 2).first
    assert (first.kind, first.what, first.carrier) == ("came in", "Inf", "argument self")

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return (x @ self.weight + self.mask).softmax(-1).log1p() / (x.sum() - 9)

    first = first_nonfinite(Masked(), torch.ones(3, 3)).first
    assert first.op == "aten.div.Tensor" and first.kind == "made"


def test_memory_that_nothing_has_written_is_told_when_it_is_read():
    def call():
        buffer = torch.empty(8)  # the deterministic mode of torch fills it with NaN
        buffer[:7] = 1.0
        return buffer.sum()

    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        first = first_nonfinite(call).first
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)
    assert first is not None and first.what == "NaN" and "buffer" in line(first)


def test_an_update_that_overflows_names_the_parameter():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)

    def call():
        model(torch.full((4, 3), 1e3)).sum().backward()
        optimizer.step()

    first = first_nonfinite(call, models=model).first
    assert first.where.phase == "update" and first.kind == "made" and first.what == "Inf"
    assert any("parameter" in v.held for v in first.outputs)


# ---- any module, and what an error leaves


def test_a_hugging_face_model_is_watched_with_its_own_paths():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    clean = first_nonfinite(
        lambda: model(IDS, attention_mask=mask, labels=IDS).loss, models=model, backward=True
    )
    assert clean.first is None and clean.operations > 300
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight.fill_(1e25)
        model.model.layers[2].mlp.up_proj.weight.fill_(1e25)
    report = first_nonfinite(lambda: model(IDS).logits, models=model)
    first = report.first
    assert (
        report.point == "layers.2.ffn.swiglu"
        and first.op == "aten.mul.Tensor"
        and first.where.module == "model.layers.2.mlp"
        and first.where.layer == 2
    )
    assert first.where.lines[0].file == "transformers/models/llama/modeling_llama.py"


def test_sparse_gradients_second_derivatives_and_mapped_functions_are_watched_too():
    table = nn.Embedding(5, 3, sparse=True)
    ids = torch.tensor([1, 2])
    assert first_nonfinite(lambda: table(ids).sum(), models=table, backward=True).first is None
    first = first_nonfinite(
        lambda: (table(ids) - table(ids).detach()).sum(0).abs().sqrt(), models=table, backward=True
    ).first
    assert first.where.node == "SqrtBackward0" and table.weight.grad.is_sparse

    x = torch.zeros(2, requires_grad=True)

    def twice():
        (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sqrt().sum(), x)

    first = first_nonfinite(twice).first
    assert (first.where.phase, first.where.of) == (
        "backward",
        "aten.sqrt.default",
    ) and "twice return" in line(first)
    first = first_nonfinite(
        lambda: torch.func.vmap(lambda v: (v - v) / (v - v))(torch.ones(3))
    ).first
    assert (first.op, first.what, first.kind) == ("aten.div.Tensor", "NaN", "made")


def test_modules_that_nobody_named_go_by_their_class():
    net = nn.Sequential(nn.Linear(4, 4), nn.Softplus())

    def call():
        return net(torch.ones(2, 4)) / 0.0

    first = first_nonfinite(call).first
    assert first.where.module == "" and first.op == "aten.div.Tensor"
    net[0].weight.data.fill_(3e38)
    first = first_nonfinite(call).first
    assert first.where.module == "Linear"


def test_an_error_after_the_fact_is_told_and_one_without_it_travels_on():
    def call(x):
        y = x / 0.0
        raise ValueError(f"bad loss {y.sum()}")

    report = first_nonfinite(call, torch.ones(2))
    assert report.first.op == "aten.div.Tensor" and report.ended_by.startswith(
        "ValueError: bad loss inf"
    )
    with pytest.raises(ZeroDivisionError):
        first_nonfinite(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("side", "name"), [("ours", n) for n in models.OURS] + [("theirs", n) for n in models.THEIRS]
)
def test_a_sound_model_of_any_kind_has_no_finding(side, name):
    """Masks, windows, dropped tokens and experts put in infinities or read fresh memory; none of
    that is anything made or come in.
    """
    model, ids = getattr(models, side)(name), models.ids()
    report = first_nonfinite(lambda: logits_of(model(ids)), models=model, backward=True)
    assert report.first is None and report.already == () and report.operations > 100
    assert {e.kind for e in report.others} <= {"put in"}
