"""Plants in the optimizer and in clipping."""

import torch

from stackproof.model import build, transformer
from stackproof.museum.plant import swap, touch
from stackproof.train import optimizer as opt
from stackproof.train import step as steps


def parameter_missing():
    original = opt.make_optimizer

    def one_short(model, cfg):
        optimizer = original(model, cfg)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    with swap(opt, "make_optimizer", one_short):
        yield


def decay_on_norms():
    original = opt.group_of
    with swap(
        opt, "group_of", lambda name, cfg: "muon" if original(name, cfg) == "muon" else "decay"
    ):
        yield


def no_decay():
    original = opt.make_optimizer

    def undecayed(model, cfg):
        return original(model, cfg.model_copy(update={"weight_decay": 0.0}))

    with swap(opt, "make_optimizer", undecayed):
        yield


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


def embedding_in_muon():
    original = opt.group_of

    def by_axes(name, cfg):
        return "muon" if name == "embed.weight" and cfg.kind == "muon" else original(name, cfg)

    with swap(opt, "group_of", by_axes):
        yield


def muon_without_nesterov():
    original = opt.Muon._update

    def behind(self, parameters, group):
        original(self, parameters, group | {"nesterov": False})

    with swap(opt.Muon, "_update", behind):
        yield


def muon_wrong_axis():
    original = opt.shape_factor

    def smaller_axis(rows, columns, lr_scale):
        return original(min(rows, columns), min(rows, columns), lr_scale)

    with swap(opt, "shape_factor", smaller_axis):
        yield


def decay_by_the_wrong_rate():
    original = opt.Muon._update

    def decaying_by_shape(self, parameters, group):
        factor = opt.shape_factor(*parameters[0].shape, group["lr_scale"])
        original(self, parameters, group | {"weight_decay": group["weight_decay"] * factor})

    with swap(opt.Muon, "_update", decaying_by_shape):
        yield


def clip_skips_parameter():
    original = opt.gradients
    with swap(opt, "gradients", lambda model: original(model)[:-1]):
        yield


def clip_per_tensor():
    def per_tensor(grads, norm, max_norm):
        for g in grads:
            g.mul_((max_norm / (g.norm() + 1e-6)).clamp(max=1.0))

    with swap(opt, "clip_gradients", per_tensor):
        yield


def no_clipping():
    def gone(grads, norm, max_norm):
        if norm > max_norm:
            touch()

    with swap(opt, "clip_gradients", gone, counted=False):
        yield


def clip_before_unscale():
    original = opt.clip_gradients

    def while_scaled(grads, norm, max_norm):
        torch._foreach_mul_(grads, 65536.0)
        original(grads, opt.global_norm(grads), max_norm)
        torch._foreach_mul_(grads, 1 / 65536.0)

    with swap(opt, "clip_gradients", while_scaled):
        yield


def probe_in_a_list():
    initialise, hidden_states = build.initialise, transformer.Transformer.hidden_states

    def attaching(model, cfg, generator):
        initialise(model, cfg, generator)
        like = model.embed.weight
        model.__dict__["probes"] = [
            torch.nn.Linear(
                cfg.d_model, cfg.d_model, bias=False, device=like.device, dtype=like.dtype
            )
        ]

    def through_the_probe(self, *inputs):
        x_BTD, report = hidden_states(self, *inputs)
        return x_BTD + self.probes[0](x_BTD), report

    with (
        swap(build, "initialise", attaching),
        swap(transformer.Transformer, "hidden_states", through_the_probe),
    ):
        yield


def untouched_decays():
    original = torch.optim.AdamW.step

    def shrinking(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and not p.grad.any()):
                p.data.mul_(1 - 0.1 * group["lr"])
        return original(self, closure)

    with swap(torch.optim.AdamW, "step", shrinking):
        yield


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


def norm_reported_after_clipping():
    original = steps.StepReport

    def calm(**measured):
        return original(
            **measured | {"grad_norm": min(measured["grad_norm"], measured["clipped_grad_norm"])}
        )

    with swap(steps, "StepReport", calm):
        yield


def movement_since_the_start():
    original = opt.ParameterProbe.changed_frac

    def since_the_start(self):
        before = self._before
        frac = original(self)
        self._before = before
        return frac

    with swap(opt.ParameterProbe, "changed_frac", since_the_start):
        yield
