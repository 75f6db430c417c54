"""The optimizers: Muon against torch's and against singular values, the table of places, and two
rules behind one interface.
"""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackproof.config import AdamW, Muon
from stackproof.config.optim import Optim
from stackproof.contracts.update_rules import RULES
from stackproof.model.build import build_model
from stackproof.subject.declared import RunDeclared
from stackproof.train import optimizer as opt

MUON = Muon(lr=3e-3, adamw_lr=1e-3)
SHAPES = [(8, 8), (24, 16), (16, 24), (24, 16)]


def matrices(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=draw) for s in SHAPES]


def ours(parameters, **changes) -> opt.Muon:
    groups = [{"params": parameters, "lr": 1e-2, "weight_decay": 0.1}]
    return opt.Muon(groups, MUON.model_copy(update=changes))


@pytest.mark.parametrize("lr_scale", ["match-rms-adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_muon_within_bfloat16(lr_scale, nesterov):
    """Ten updates, distance over the way gone.
    torch computes in bfloat16: measured worst 1.25e-2 for ours in it, 8.1e-3 in float32.
    """
    for dtype in ("bfloat16", "float32"):
        mine, theirs = ([torch.nn.Parameter(m) for m in matrices(0)] for _ in range(2))
        a = ours(mine, lr_scale=lr_scale, nesterov=nesterov, dtype=dtype)
        b = torch.optim.Muon(
            theirs,
            lr=1e-2,
            weight_decay=0.1,
            nesterov=nesterov,
            adjust_lr_fn=lr_scale.replace("-", "_"),
        )
        for step in range(10):
            for x, y, g in zip(mine, theirs, matrices(step + 1)):
                x.grad, y.grad = g, g.clone()
            a.step()
            b.step()
        for x, y, start in zip(mine, theirs, matrices(0)):
            assert torch.linalg.norm(x - y) < 0.03 * torch.linalg.norm(y - start)
            assert torch.equal(a.state[x]["momentum_buffer"], b.state[y]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(12, 12), (30, 12), (12, 30)])
def test_orthogonalising_keeps_singular_vectors_and_brings_values_near_one(shape):
    """Against the quintic on float64 singular values.
    Measured worst case 8.8e-7 in float32, values from 0.68 to 1.14.
    """
    x_NAB = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(x_NAB.double(), full_matrices=False)
    expected = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        expected = expected * (3.4445 - 4.7750 * expected**2 + 2.0315 * expected**4)
    got = opt.orthogonalise(x_NAB, steps=5, dtype=torch.float32).double()
    torch.testing.assert_close(got, (u * expected[:, None]) @ v, rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(got)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.2


def test_matrices_of_one_shape_do_not_see_each_other():
    """Together or alone: products of stacked matrices may be summed in another order.
    Measured 0 here.
    """
    x_NAB = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([opt.orthogonalise(x[None], steps=5, dtype=torch.float32) for x in x_NAB])
    torch.testing.assert_close(
        opt.orthogonalise(x_NAB, steps=5, dtype=torch.float32), alone, rtol=0, atol=1e-5
    )


def test_a_gradient_of_zeros_gives_an_update_of_zeros():
    assert not opt.orthogonalise(torch.zeros(1, 3, 4), steps=5, dtype=torch.float32).any()


def test_the_factor_by_shape_makes_updates_as_large_as_adamw():
    """Source: arXiv:2502.16982. An update with all singular values one has a root mean
    square of 0.2 for every shape.
    """
    for rows, columns in ((8, 8), (64, 16), (16, 64)):
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
        rms = float(q.square().mean().sqrt()) * opt.shape_factor(rows, columns, "match-rms-adamw")
        assert rms == pytest.approx(0.2, rel=1e-5)
    assert opt.shape_factor(64, 16, "original") == 2 and opt.shape_factor(16, 64, "original") == 1


def test_every_parameter_has_a_place_and_matrices_inside_blocks_are_muons(small_cfg):
    model = build_model(small_cfg.model.model_copy(update={"tied_head": False}), 50, seed=1)
    groups = {n: opt.group_of(n, MUON) for n, _ in model.named_parameters()}
    assert {n for n, g in groups.items() if g == "muon"} == {
        f"layers.{i}.{m}.weight"
        for i in range(2)
        for m in ("attention.q", "attention.k", "attention.v", "attention.out")
    } | {f"layers.{i}.ffn.{m}.weight" for i in range(2) for m in ("gate", "up", "down")}
    assert {n for n, g in groups.items() if g == "decay"} == {"embed.weight", "head.weight"}
    assert all(n.endswith("norm.weight") for n, g in groups.items() if g == "no-decay")
    declared = AdamW(lr=1e-3)
    assert all(
        (opt.group_of(n, declared) == "decay") == (p.ndim == 2) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layers.0.attention.q.bias", "no-decay"),
        ("layers.0.attention.q_norm.weight", "no-decay"),
        ("layers.0.attention.lambda_q1", "no-decay"),
        ("layers.0.ffn.router.weight", "decay"),
        ("layers.0.ffn.experts.3.up.weight", "muon"),
        ("positions.weight", "decay"),
    ],
)
def test_parts_of_other_architectures_have_their_place(name, group):
    assert opt.group_of(name, MUON) == group


def test_a_name_nobody_declared_is_refused():
    with pytest.raises(KeyError, match="no row of PARAM_GROUP_RULES"):
        opt.group_of("layers.0.mystery", MUON)


@pytest.mark.parametrize("kind", get_args(Optim))
def test_every_optimizer_that_can_be_declared_has_its_row_in_the_table(
    kind, small_cfg, monkeypatch
):
    """Its rules cover the groups that it declares, keep the state it declares,
    and every parameter has one of its groups.
    """
    required = {name: 1e-3 for name, f in kind.model_fields.items() if f.is_required()}
    cfg, model = kind(**required), build_model(small_cfg.model, 50, seed=1)
    assert kind in opt.OPTIMIZERS, (
        f"{kind.__name__} has no row of OPTIMIZERS in stack/train/optimizer.py"
    )
    assert opt.OPTIMIZERS[kind].keys() == cfg.peak_lrs().keys()
    optimizer = opt.make_optimizer(model, cfg)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(
        t.numel()
        for p in model.parameters()
        for t in optimizer.state[p].values()
        if t.shape == p.shape
    )
    others = model.embed.weight.numel() + sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert kept == cfg.state_numbers(
        matrices=sum(p.numel() for p in model.parameters()) - others, others=others
    )
    assert {
        p
        for p, names in opt.state_fields(optimizer).items()
        if set(names) == set(optimizer.state[p])
    } == set(model.parameters())
    laws = RunDeclared(small_cfg.model_copy(update={"optim": cfg}), 50)
    for name, p in model.named_parameters():
        law = laws.update_law(name, p)
        assert law["rule"] in RULES, f"contracts/update_rules.py has no rule {law['rule']}"
        assert law.keys() >= set(RULES[law["rule"]].settings)
    monkeypatch.delitem(opt.OPTIMIZERS, kind)
    with pytest.raises(KeyError, match=kind.__name__):
        opt.make_optimizer(model, cfg)


def test_an_optimizer_without_a_declared_law_is_an_error_that_names_the_file(small_cfg):
    other = SimpleNamespace(weight_decay=0.1)
    laws = RunDeclared(small_cfg.model_copy(update={"optim": other}), 50)
    with pytest.raises(NotImplementedError, match=r"stack/subject/declared\.py has no law"):
        laws.update_law("embed.weight", torch.ones(2, 2))


def test_two_rules_act_as_one(small_cfg):
    """Groups can be changed through it, clearing reaches all,
    and each parameter is moved by its own rule only.
    """
    model = build_model(small_cfg.model, 50, seed=1)
    both = opt.make_optimizer(model, MUON)
    opt.set_lr(both, lambda peak: peak / 2)
    assert opt.group_lrs(both) == {"muon": 1.5e-3, "decay": 5e-4, "no-decay": 5e-4}
    assert {p for g in both.param_groups for p in g["params"]} == set(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    both.step()
    fields = opt.state_fields(both)
    assert all(set(both.state[p]) == set(fields[p]) for p in model.parameters()) and set(
        both.state
    ) == set(model.parameters())
    both.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_adamw_equals_torchs_plain_one_over_a_hundred_steps(small_cfg):
    """Fused against one tensor at a time, with the declared decay by group.
    Measured worst case 7.5e-9.
    """
    cfg = AdamW(lr=1e-3, weight_decay=0.01)
    mine, theirs = (build_model(small_cfg.model, 50, seed=1) for _ in range(2))
    a = opt.make_optimizer(mine, cfg)
    decayed, kept = (
        [p for p in theirs.parameters() if (p.ndim >= 2) == matrices] for matrices in (True, False)
    )
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
    b = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    draw = torch.Generator().manual_seed(4)
    for _ in range(100):
        for x, y in zip(mine.parameters(), theirs.parameters()):
            x.grad = torch.randn(x.shape, generator=draw)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    assert (
        max(
            float((x - y).detach().abs().max())
            for x, y in zip(mine.parameters(), theirs.parameters())
        )
        <= 1e-7
    )


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 10.0), st.integers(0, 2**31))
def test_clipping_equals_torchs_keeps_the_direction_and_never_exceeds_the_norm(
    size, max_norm, seed
):
    draw = torch.Generator().manual_seed(seed)
    grads = [torch.randn(s, generator=draw) * size for s in ((5, 4), (7,), (2, 3))]
    holders = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for holder, g in zip(holders, grads):
        holder.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(holders, max_norm)
    before, norm = torch.cat([g.flatten() for g in grads]).double(), opt.global_norm(grads)
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    opt.clip_gradients(grads, norm, max_norm)
    after = torch.cat([g.flatten() for g in grads]).double()
    assert float(after.norm()) <= max_norm * (1 + 1e-6)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 1 - 1e-12
    assert all(torch.equal(g, h.grad) for g, h in zip(grads, holders))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_has_a_norm_that_says_so(bad):
    assert not torch.isfinite(opt.global_norm([torch.ones(3), torch.tensor([1.0, bad])]))
