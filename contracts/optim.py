"""Gates of the optimizer: every parameter is optimised as declared, by the declared formula, within the declared norm."""

import copy
from types import SimpleNamespace

import torch

from contracts.events import Event, StepTaken
from contracts.gate import Stateless, Verdict, decide, decides, failed


@decides("optim.parameter-census")
def parameter_census(limits: SimpleNamespace, *, build_model, make_optimizer, train_on, census_batch, declared) -> Verdict:
    """Every trainable parameter is owned once, with its declared decay, gets a gradient and moves; frozen ones do not move.

    `declared` holds lr, weight_decay and `decays(name, parameter)`. `train_on(model, optimizer, batch)` makes one update.
    """
    model = build_model()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = make_optimizer(model)
    owned = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    ids = [id(p) for p, _ in owned]
    if strangers := [i for i in ids if i not in names]:
        return failed(f"the optimizer owns {len(strangers)} tensor(s) that are no parameter of the model", strangers=len(strangers))
    missing = sorted(names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in set(ids))
    twice = sorted({names[i] for i in ids if ids.count(i) > 1})
    if missing or twice:
        return failed(f"not owned exactly once by the optimizer: {', '.join(missing + twice)}", missing=len(missing), twice=len(twice))
    wrong = [
        names[id(p)]
        for p, g in owned
        if g["weight_decay"] != (declared["weight_decay"] if declared["decays"](names[id(p)], p) else 0.0) or g["lr"] != declared["lr"]
    ]
    if wrong:
        return failed(f"learning rate or weight decay is not the declared one: {wrong[0]}", wrong_groups=len(wrong))
    return _movement(limits, model, optimizer, train_on, census_batch)


def _movement(limits: SimpleNamespace, model, optimizer, train_on, batch) -> Verdict:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        train_on(model, optimizer, batch)
    still = sorted(n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p.detach(), before[n]))
    dead = sorted(n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any())))
    if still or dead:
        return failed(f"gets no gradient or does not move: {', '.join(sorted(set(still + dead)))}", still=len(still), dead=len(dead))
    frozen_name, frozen = next((n, p) for n, p in model.named_parameters() if p.ndim >= 2)
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    train_on(model, optimizer, batch)
    moved = not torch.equal(frozen.detach(), kept)
    n_owned = sum(len(g["params"]) for g in optimizer.param_groups)
    return decide(not moved, f"{frozen_name} was frozen and still moves", owned=n_owned, still=0, dead=0, frozen_moved=moved)


@decides("optim.reference-update")
def reference_update(limits: SimpleNamespace, *, make_optimizer, declared) -> Verdict:
    """Ten updates of the real optimizer equal AdamW written out in float64, with a zero gradient among them."""
    draw = torch.Generator().manual_seed(7)
    module = torch.nn.Linear(6, 5, bias=True)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    optimizer = make_optimizer(module)
    oracle = {n: p.detach().double().clone() for n, p in module.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in oracle.items()}
    lr, (b1, b2), eps = declared["lr"], declared["betas"], declared["eps"]
    for t in range(1, 11):
        for n, p in module.named_parameters():
            p.grad = torch.zeros_like(p) if t == 5 else torch.randn(p.shape, generator=draw) * 10.0 ** (t % 3 - 1)
            g = p.grad.double()
            m, v = moments[n]
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            decay = declared["weight_decay"] if declared["decays"](n, p) else 0.0
            oracle[n] -= lr * ((m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps) + decay * oracle[n])
        optimizer.step()
    error = max(float((p.detach().double() - oracle[n]).abs().max()) for n, p in module.named_parameters()) / lr
    return decide(error <= limits.rel_error_max, "updates differ from AdamW in float64", error_over_lr=error)


@decides("optim.clip-norm")
class ClipNorm(Stateless):
    """After clipping, the re-measured global norm is at most the declared one and the direction was kept in length."""

    events = (StepTaken,)

    def observe(self, event: Event) -> Verdict:
        declared = min(event.grad_norm, event.max_grad_norm)
        low, high = declared * (1 - self.limits.rel_shortfall_max), declared * (1 + self.limits.rel_excess_max)
        ok = low <= event.clipped_grad_norm <= high
        return decide(
            ok,
            f"step {event.step}: the gradient norm after clipping is {event.clipped_grad_norm:.4g}, before {event.grad_norm:.4g}, "
            f"declared maximum {event.max_grad_norm:g}",
            clipped_grad_norm=event.clipped_grad_norm,
            grad_norm=event.grad_norm,
        )


@decides("optim.clip-spike")
def clip_spike(limits: SimpleNamespace, *, clip) -> Verdict:
    """A planted spike is scaled to the declared norm, in its own direction; a small gradient is left bit for bit.

    `clip(list of gradients) -> max_norm` clips in place as the train step does and returns the declared maximum.
    """
    draw = torch.Generator().manual_seed(3)
    small = [torch.randn(4, 3, generator=draw) * 1e-3, torch.randn(5, generator=draw) * 1e-3]
    kept = copy.deepcopy(small)
    max_norm = clip(small)
    if not all(torch.equal(a, b) for a, b in zip(small, kept)):
        return failed("a gradient below the maximum was changed")
    spike = [torch.randn(4, 3, generator=draw) * 1e4, torch.randn(5, generator=draw) * 1e4]
    before = torch.cat([g.flatten() for g in spike]).double()
    clip(spike)
    after = torch.cat([g.flatten() for g in spike]).double()
    norm = float(after.norm())
    cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=0))
    ok = abs(norm - max_norm) <= limits.rel_excess_max * max_norm and cosine >= 1 - limits.rel_excess_max
    return decide(ok, f"a spike of norm {float(before.norm()):.3g} has norm {norm:.4g} after clipping", norm=norm, cosine=cosine)
