"""The optimizers: Muon against torch's and against singular values, the table of places, and two rules behind one interface."""

import pytest
import torch

from stack.config import AdamW, Muon
from stack.model.build import build_model
from stack.train import muon
from stack.train import optimizer as opt

MUON = Muon(lr=3e-3, adamw_lr=1e-3)
SHAPES = [(8, 8), (24, 16), (16, 24), (24, 16)]


def matrices(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=draw) for s in SHAPES]


def ours(parameters, **changes) -> muon.Muon:
    settings = {k: getattr(MUON, k) for k in ("momentum", "nesterov", "ns_steps", "lr_scale", "dtype")} | changes
    return muon.Muon([{"params": parameters, "lr": 1e-2, "weight_decay": 0.1}], **settings)


@pytest.mark.parametrize("lr_scale", ["match-rms-adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_muon_within_bfloat16(lr_scale, nesterov):
    """Ten updates, distance over the way gone. torch computes in bfloat16; measured worst case 1.3e-2 for it, and the same for float32."""
    for dtype in ("bfloat16", "float32"):
        mine, theirs = ([torch.nn.Parameter(m) for m in matrices(0)] for _ in range(2))
        a = ours(mine, lr_scale=lr_scale, nesterov=nesterov, dtype=dtype)
        b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=lr_scale.replace("-", "_"))
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
    """Against the quintic on float64 singular values. Measured worst case 3e-5 in float32."""
    x_NAB = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(x_NAB.double(), full_matrices=False)
    expected = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        expected = expected * (3.4445 - 4.7750 * expected**2 + 2.0315 * expected**4)
    got = muon.orthogonalise(x_NAB, steps=5, dtype=torch.float32).double()
    torch.testing.assert_close(got, (u * expected[:, None]) @ v, rtol=0, atol=2e-4)
    values = torch.linalg.svdvals(got)
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3


def test_matrices_of_one_shape_do_not_see_each_other():
    """Together or alone: products of stacked matrices may be summed in another order. Measured worst case 2e-7."""
    x_NAB = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([muon.orthogonalise(x[None], steps=5, dtype=torch.float32) for x in x_NAB])
    torch.testing.assert_close(muon.orthogonalise(x_NAB, steps=5, dtype=torch.float32), alone, rtol=0, atol=1e-5)


def test_a_gradient_of_zeros_gives_an_update_of_zeros():
    assert not muon.orthogonalise(torch.zeros(1, 3, 4), steps=5, dtype=torch.float32).any()


def test_the_factor_by_shape_makes_updates_as_large_as_adamw():
    """Source: arXiv:2502.16982. An update with all singular values one has a root mean square of 0.2 for every shape."""
    for rows, columns in ((8, 8), (64, 16), (16, 64)):
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
        rms = float(q.square().mean().sqrt()) * muon.shape_factor(rows, columns, "match-rms-adamw")
        assert rms == pytest.approx(0.2, rel=1e-5)
    assert muon.shape_factor(64, 16, "original") == 2 and muon.shape_factor(16, 64, "original") == 1


def test_every_parameter_has_a_place_and_matrices_inside_blocks_are_muons(small_cfg):
    model = build_model(small_cfg.model.model_copy(update={"tied_head": False}), 50, seed=1)
    groups = {n: opt.group_of(n, MUON) for n, _ in model.named_parameters()}
    assert {n for n, g in groups.items() if g == "muon"} == {
        f"layers.{i}.{m}.weight" for i in range(2) for m in ("attention.q", "attention.k", "attention.v", "attention.out")
    } | {f"layers.{i}.ffn.{m}.weight" for i in range(2) for m in ("gate", "up", "down")}
    assert {n for n, g in groups.items() if g == "decay"} == {"embed.weight", "head.weight"}
    assert all(n.endswith("norm.weight") for n, g in groups.items() if g == "no-decay")
    declared = AdamW(lr=1e-3)
    assert all((opt.group_of(n, declared) == "decay") == (p.ndim == 2) for n, p in model.named_parameters())


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
    with pytest.raises(KeyError, match="no row of the table"):
        opt.group_of("layers.0.mystery", MUON)


def test_two_rules_act_as_one(small_cfg):
    """Groups can be changed through it, clearing reaches all, and each parameter is moved by its own rule only."""
    model = build_model(small_cfg.model, 50, seed=1)
    both = opt.make_optimizer(model, MUON)
    opt.set_lr(both, lambda peak: peak / 2)
    assert opt.group_lrs(both) == {"muon": 1.5e-3, "decay": 5e-4, "no-decay": 5e-4}
    assert {p for g in both.param_groups for p in g["params"]} == set(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    both.step()
    fields = opt.state_fields(both)
    assert all(set(both.state[p]) == set(fields[p]) for p in model.parameters()) and set(both.state) == set(model.parameters())
    both.zero_grad()
    assert all(p.grad is None for p in model.parameters())
