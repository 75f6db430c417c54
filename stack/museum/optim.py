"""Plants in the optimizer and in clipping."""

import torch

from stackproof.model import build, transformer
from stackproof.museum.plant import plant, swap, touch
from stackproof.train import muon
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


@plant(
    "optim.parameter-missing",
    gate="optim.parameter-census",
    title="A parameter the optimizer does not know",
    story=(
        "Groups are built from a name filter that misses one tensor. It stays at its initial "
        "value for ever while everything else learns around it. The loss falls, a little slower "
        "than it could."
    ),
    sources=(
        "https://github.com/zjunlp/HVPNeT/issues/5",
        "https://github.com/luxonis/luxonis-train/issues/432",
    ),
)
def parameter_missing():
    original = opt.make_optimizer

    def one_short(model, cfg):
        optimizer = original(model, cfg)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    with swap(opt, "make_optimizer", one_short):
        yield


@plant(
    "optim.decay-on-norms",
    gate="optim.parameter-census",
    title="Weight decay on the gains of norms",
    story=(
        "All parameters share one group, so the gains of the norms are pulled towards zero with "
        "everything else. Training compensates in the neighbouring matrices and the curve looks "
        "the same."
    ),
    sources=("https://github.com/KellerJordan/Muon/issues/54",),
)
def decay_on_norms():
    original = opt.group_of
    with swap(
        opt, "group_of", lambda name, cfg: "muon" if original(name, cfg) == "muon" else "decay"
    ):
        yield


@plant(
    "optim.no-decay",
    gate="optim.parameter-census",
    title="No weight decay at all",
    story=(
        "The configuration asks for decoupled decay and the optimizer is built without it. "
        "Weights grow slowly, samples start to repeat after tens of thousands of steps, and "
        "nobody connects the two."
    ),
    sources=("founding note: ANDREA-120M",),
)
def no_decay():
    original = opt.make_optimizer

    def undecayed(model, cfg):
        return original(model, cfg.model_copy(update={"weight_decay": 0.0}))

    with swap(opt, "make_optimizer", undecayed):
        yield


@plant(
    "optim.frozen-moves",
    gate="optim.parameter-census",
    title="Frozen parameters keep moving",
    story=(
        "A tensor is frozen after a backward pass, but its last gradient stays in place and the "
        "optimizer still owns it. Momentum and decay carry it away step by step from the value "
        "that was meant to be kept."
    ),
    sources=(
        "https://github.com/facebookresearch/fairseq/issues/4702",
        "https://github.com/iamwangyabin/S-Prompts/issues/2",
    ),
)
def frozen_moves():
    original = steps.accumulate

    def keeping_gradients(state, batches):
        kept = {
            p: p.grad.clone()
            for g in state.optimizer.param_groups
            for p in g["params"]
            if p.grad is not None and not p.requires_grad
        }
        result = original(state, batches)
        for parameter, gradient in kept.items():
            parameter.grad = gradient
        return result

    with swap(steps, "accumulate", keeping_gradients):
        yield


@plant(
    "optim.bias-correction-stuck",
    gate="optim.reference-update",
    title="The bias correction never advances",
    story=(
        "The optimizer's update count stays at one, so early moments are corrected as if every "
        "step were the first. Updates are several times too large where they should settle. The "
        "loss still falls."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/309",),
)
def bias_correction_stuck():
    original = torch.optim.AdamW.step

    def stuck(self, closure=None):
        for parameter in (
            p for group in self.param_groups for p in group["params"] if p in self.state
        ):
            self.state[parameter]["step"].zero_()
        return original(self, closure)

    with swap(torch.optim.AdamW, "step", stuck):
        yield


@plant(
    "optim.embedding-in-muon",
    gate="optim.parameter-census",
    title="The embedding is orthogonalised",
    story=(
        "The filter for Muon asks for two axes and forgets where a matrix stands. The embedding "
        "has two axes. Its rows for rare tokens, which got almost no gradient, move as far as "
        "those of common ones in every step. The loss falls, and ends a little higher."
    ),
    sources=(
        "https://github.com/deepspeedai/DeepSpeed/pull/7641",
        "https://github.com/vllm-project/speculators/pull/866",
    ),
)
def embedding_in_muon():
    original = opt.group_of

    def by_axes(name, cfg):
        return "muon" if name == "embed.weight" and cfg.kind == "muon" else original(name, cfg)

    with swap(opt, "group_of", by_axes):
        yield


@plant(
    "optim.muon-without-nesterov",
    gate="optim.reference-update",
    title="Muon's step ahead is lost",
    story=(
        "A rewrite orthogonalises the running mean itself and not the mean one step ahead. The "
        "configuration still says nesterov. Every update lags by a fraction of a step, which "
        "costs a little of what Muon was chosen for."
    ),
    sources=("https://kellerjordan.github.io/posts/muon/",),
)
def muon_without_nesterov():
    original = muon.Muon._update

    def behind(self, parameters, group):
        original(self, parameters, group | {"nesterov": False})

    with swap(muon.Muon, "_update", behind):
        yield


@plant(
    "optim.muon-wrong-axis",
    gate="optim.reference-update",
    title="The factor by shape is taken from the wrong axes",
    story=(
        "Updates are scaled by the shape of the matrix, so that all of them are as large as "
        "AdamW's. The shape is read after a reshape and its largest axis is lost. Wide and tall "
        "matrices learn too slowly by the root of their ratio, square ones as they should."
    ),
    sources=(
        "https://github.com/huggingface/pytorch-image-models/pull/2791",
        "https://github.com/microsoft/dion/pull/94",
    ),
)
def muon_wrong_axis():
    original = muon.shape_factor

    def smaller_axis(rows, columns, lr_scale):
        return original(min(rows, columns), min(rows, columns), lr_scale)

    with swap(muon, "shape_factor", smaller_axis):
        yield


@plant(
    "optim.decay-by-the-wrong-rate",
    gate="optim.reference-update",
    title="Muon's decay is scaled by the shape as well",
    story=(
        "The learning rate is multiplied by the factor by shape before the decay is applied, so "
        "wide matrices decay several times faster than the configuration says. Nothing shows in "
        "the loss until the weights of the large layers have shrunk."
    ),
    sources=("https://arxiv.org/abs/2502.16982",),
)
def decay_by_the_wrong_rate():
    original = muon.Muon._update

    def decaying_by_shape(self, parameters, group):
        factor = muon.shape_factor(*parameters[0].shape, group["lr_scale"])
        original(self, parameters, group | {"weight_decay": group["weight_decay"] * factor})

    with swap(muon.Muon, "_update", decaying_by_shape):
        yield


@plant(
    "optim.clip-skips-parameter",
    gate="optim.clip-spike",
    title="One parameter is not in the norm",
    story=(
        "The list of gradients to clip is built by hand and ends one short. The norm in the log "
        "is plausible, everything else is clipped by it, and one tensor takes every spike in full."
    ),
    sources=("https://github.com/ByteDance-Seed/VeOmni/issues/184",),
)
def clip_skips_parameter():
    original = opt.gradients
    with swap(opt, "gradients", lambda model: original(model)[:-1]):
        yield


@plant(
    "optim.clip-per-tensor",
    gate="optim.clip-spike",
    title="Each tensor clipped by its own norm",
    story=(
        "Clipping looks at one tensor at a time. Every norm is within bounds, but the tensors are "
        "scaled by different factors, so the update points somewhere the loss never asked for."
    ),
    sources=(
        "https://github.com/pytorch/pytorch/issues/72548",
        "https://github.com/ByteDance-Seed/VeOmni/issues/184",
    ),
)
def clip_per_tensor():
    def per_tensor(grads, norm, max_norm):
        for g in grads:
            g.mul_((max_norm / (g.norm() + 1e-6)).clamp(max=1.0))

    with swap(opt, "clip_gradients", per_tensor):
        yield


@plant(
    "optim.no-clipping",
    gate="optim.clip-norm",
    title="The clip call is gone",
    story=(
        "A rewrite drops the line that clips. On calm data nothing changes. At a change of source "
        "one batch throws the run into a basin it never leaves, and the samples turn into one "
        "repeated word."
    ),
    sources=("founding note: ANDREA-120M",),
)
def no_clipping():
    def gone(grads, norm, max_norm):
        if norm > max_norm:
            touch()

    with swap(opt, "clip_gradients", gone, counted=False):
        yield


@plant(
    "optim.clip-before-unscale",
    gate="optim.clip-norm",
    title="Clipping gradients that still carry the loss scale",
    story=(
        "With half precision the gradients are 65,536 times too large until they are unscaled. "
        "Clipping before that leaves updates of almost nothing, which an optimizer that "
        "normalises hides nearly completely."
    ),
    sources=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/9599",
        "https://github.com/NVIDIA/apex/issues/1512",
    ),
)
def clip_before_unscale():
    original = opt.clip_gradients

    def while_scaled(grads, norm, max_norm):
        torch._foreach_mul_(grads, 65536.0)
        original(grads, opt.global_norm(grads), max_norm)
        torch._foreach_mul_(grads, 1 / 65536.0)

    with swap(opt, "clip_gradients", while_scaled):
        yield


@plant(
    "optim.probe-in-a-list",
    gate="optim.parameter-census",
    title="A probe in a plain list",
    story=(
        "A probe is attached to the model through a Python list, where the framework does not "
        "look. Its weights are in no group, in no checkpoint and in no count. They take part in "
        "every forward with the values they were drawn with, and nothing ever trains them."
    ),
    sources=("founding note: tinygpt validation",),
)
def probe_in_a_list():
    initialise, features = build.initialise, transformer.Transformer.features

    def attaching(model, cfg, generator):
        initialise(model, cfg, generator)
        like = model.embed.weight
        model.__dict__["probes"] = [
            torch.nn.Linear(
                cfg.d_model, cfg.d_model, bias=False, device=like.device, dtype=like.dtype
            )
        ]

    def through_the_probe(self, *inputs):
        x_BTD, report = features(self, *inputs)
        return x_BTD + self.probes[0](x_BTD), report

    with (
        swap(build, "initialise", attaching),
        swap(transformer.Transformer, "features", through_the_probe),
    ):
        yield


@plant(
    "optim.untouched-decays",
    gate="optim.reference-update",
    title="Decay for what the batch did not touch",
    story=(
        "A tensor that no token of the batch reached has a gradient of zeros and not none at all. "
        "The optimizer takes the zeros for a gradient and applies decay, also where none was "
        "declared. What is rarely used shrinks towards nothing."
    ),
    sources=(
        "https://github.com/KellerJordan/Muon/issues/54",
        "https://github.com/extropic-ai/sparse-transformers/issues/3",
    ),
)
def untouched_decays():
    original = torch.optim.AdamW.step

    def shrinking(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and not p.grad.any()):
                p.data.mul_(1 - 0.1 * group["lr"])
        return original(self, closure)

    with swap(torch.optim.AdamW, "step", shrinking):
        yield


@plant(
    "optim.eps-inside-the-root",
    gate="optim.reference-update",
    title="A second copy of the update adds its constant under the root",
    story=(
        "A copy of the optimizer is written for another purpose and adds eps before the root is "
        "taken, not after it. With gradients of usual size both give the same digits. Where "
        "gradients are tiny one moves and the other stands still, and the two models part."
    ),
    sources=("https://github.com/karpathy/nanochat/commit/a9d0a86",),
)
def eps_inside_the_root():
    @torch.no_grad()
    def second_copy(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                state["step"] += 1
                t = int(state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                root = (state["exp_avg_sq"] / (1 - b2**t) + group["eps"]).sqrt()
                p.sub_(group["lr"] * state["exp_avg"] / (1 - b1**t) / root)

    with swap(torch.optim.AdamW, "step", second_copy):
        yield


@plant(
    "optim.norm-reported-after-clipping",
    gate="optim.step-report",
    title="The norm in the log is the clipped one",
    story=(
        "Clipping returns a norm, and somebody logs the smaller of it and the maximum. The curve "
        "is flat at the maximum and looks calm. The spikes that clipping hides are hidden from "
        "people as well."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/614",),
)
def norm_reported_after_clipping():
    original = steps.StepReport

    def calm(step, loss_nats, grad_norm, clipped, *rest):
        return original(step, loss_nats, min(grad_norm, clipped), clipped, *rest)

    with swap(steps, "StepReport", calm):
        yield


@plant(
    "optim.movement-since-the-start",
    gate="optim.step-report",
    title="Everything has moved, once",
    story=(
        "Whether weights move is told by a comparison with the first step instead of the last. "
        "Each tensor moved in the first minute, so the monitor is satisfied for ever, also after "
        "a layer has stopped."
    ),
    sources=("https://github.com/allenai/OLMo-core/issues/614",),
)
def movement_since_the_start():
    original = opt.ParameterProbe.changed_frac

    def since_the_start(self):
        before = self._before
        frac = original(self)
        self._before = before
        return frac

    with swap(opt.ParameterProbe, "changed_frac", since_the_start):
        yield
