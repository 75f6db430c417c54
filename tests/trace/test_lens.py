"""Lenses: the last one is the model to the bit, a fitted one starts as the raw one, beats it on
held-out text, and moves no others.
"""

import pytest
import torch
import torch.nn.functional as F

from stackproof.config import ModelConfig
from stackproof.contracts.conditions import ContractError
from stackproof.data.data_loader import eval_batches, rows_batch
from stackproof.model.build import build_model
from stackproof.spec.errors import CheckpointError, IntegrityError, UsageError
from stackproof.trace import lens as lenses
from stackproof.trace.lens import (
    TunedLens,
    load_lens,
    read_lens,
    save_lens,
    stream,
    stream_points,
    train_lens,
    unembedding,
    weights_sha256,
)
from stackproof.trace.trace import logits_of
from tests.trace import models

ALL = [("ours", n) for n in models.OURS] + [("theirs", n) for n in models.THEIRS]
LENGTH = 64


@pytest.fixture(scope="module")
def trained(dataset):
    """A small decoder after 150 steps on real text, a function that gives batches of it,
    and held-out ids.
    """
    torch.set_num_threads(1)
    cfg = ModelConfig(
        d_model=48, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=96, max_seq_len=LENGTH
    )
    model = build_model(cfg, dataset.tokenizer.vocab_size, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    source = torch.Generator().manual_seed(0)

    def batches(n):
        for _ in range(n):
            numbers = torch.randint(
                0, dataset.train.n_windows(LENGTH), (8,), generator=source
            ).numpy()
            yield rows_batch(dataset.train, numbers, LENGTH).input_ids

    for ids in batches(150):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    held_out = torch.cat([b.input_ids for b in eval_batches(dataset.validation, LENGTH, 8, 2)])
    return model.eval(), batches, held_out


@pytest.mark.parametrize(("side", "name"), ALL)
def test_the_lens_of_the_last_layer_is_the_model_to_the_bit(side, name):
    model, ids = getattr(models, side)(name).eval(), models.ids()
    with torch.no_grad():
        plain = logits_of(model(ids))
        held, traced = stream(model, ids)
        last = unembedding(model)(held[stream_points(model)[-1]])
    assert torch.equal(plain, traced) and torch.equal(last, plain.to(last.dtype))
    rows, logits = read_lens(model, ids)
    assert torch.equal(logits, plain) and [r.point for r in rows] == list(held)
    assert (
        rows[-1].kl_nats == 0.0
        and rows[-1].agrees_frac == 1.0
        and rows[-1].layer == len(rows) - 2
        and rows[0].layer is None
    )
    expected = F.cross_entropy(plain[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    assert rows[-1].loss_nats == pytest.approx(float(expected), abs=1e-6)
    assert all(r.kl_nats > 1e-4 for r in rows[:-1]), "and the others are not the model"


def test_figures_of_a_row_are_those_of_its_distribution():
    model, ids = models.ours(), models.ids(rows=1, tokens=9)
    rows, _ = read_lens(model, ids, top_k=3)
    held, logits = stream(model, ids)
    with torch.no_grad():
        p, q = (
            logits.double().softmax(-1),
            unembedding(model)(held["layers.0.resid_out"]).double().softmax(-1),
        )
    row = rows[1]
    assert row.kl_nats == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)
    assert row.entropy_nats == pytest.approx(float(-(q * q.log()).sum(-1).mean()), rel=1e-5)
    assert torch.equal(row.top_ids_BTk, q.topk(3).indices) and row.top_probs_BTk.shape == (1, 9, 3)
    assert row.agrees_frac == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert read_lens(model, ids[:, :1])[0][0].loss_nats is None, "one token has no next one"


def test_a_fresh_lens_reads_as_no_lens_to_the_bit(trained):
    model, _, held_out = trained
    fresh = TunedLens(stream_points(model)[:-1], model.cfg.d_model)
    for raw, same in zip(
        read_lens(model, held_out)[0], read_lens(model, held_out, lens=fresh)[0], strict=True
    ):
        assert (raw.loss_nats, raw.kl_nats) == (same.loss_nats, same.kl_nats) and torch.equal(
            raw.top_probs_BTk, same.top_probs_BTk
        )


def test_a_fitted_lens_is_sharper_at_every_point_and_the_model_is_untouched(trained, tmp_path):
    """Held-out text: the distance to the model falls at every point that is not the last.
    Measured after 120 steps: loss at the embedding 5.535 → 4.197 nats, after layer 2, the last
    before the model's own, 4.062 → 4.055; distances at most 0.29 of the raw ones.
    """
    model, batches, held_out = trained
    before, told = weights_sha256(model), []
    lens = train_lens(
        model, batches(120), steps=120, lr=3e-3, tell=lambda step, kl: told.append(kl)
    )
    assert weights_sha256(model) == before and all(p.grad is None for p in model.parameters())
    raw, tuned = read_lens(model, held_out)[0], read_lens(model, held_out, lens=lens)[0]
    for r, t in zip(raw[:-1], tuned[:-1], strict=True):
        assert t.kl_nats < 0.5 * r.kl_nats, r.point
    # A lens is fitted to the model's distribution: beside the last point, where both are close to
    # it, the loss may also rise, by 0.007 nats on another processor.
    for r, t in zip(raw[:-2], tuned[:-2], strict=True):
        assert t.loss_nats < r.loss_nats, r.point
    assert tuned[-2].loss_nats < raw[-2].loss_nats + 0.02
    assert tuned[-1].kl_nats == 0.0 and told[-1] < 0.5 * told[0] and len(told) == 120

    save_lens(lens, tmp_path / "lens.safetensors", model)
    loaded = load_lens(tmp_path / "lens.safetensors", model)
    assert loaded.points == lens.points
    assert all(
        torch.equal(a, b)
        for a, b in zip(lens.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        model.final_norm.weight[0] += 1
    try:
        with pytest.raises(CheckpointError, match="other weights"):
            load_lens(tmp_path / "lens.safetensors", model)
    finally:
        with torch.no_grad():
            model.final_norm.weight[0] -= 1


def test_a_lens_of_a_hugging_face_model_can_be_fitted():
    model = models.theirs("gpt2").eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    told = []
    lens = train_lens(
        model,
        (models.ids(seed=s) for s in range(9)),
        steps=9,
        tell=lambda step, kl: told.append(kl),
    )
    assert told[-1] < told[0] and lens.points == ("embedding", "layers.0.resid_out")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters()), (
        "gradients of the model are left alone"
    )


def test_a_fit_that_moves_the_model_is_found_out(monkeypatch):
    model, original = models.ours().eval(), lenses._fit

    def careless(lens, held, unembed, log_final, optimizer):
        with torch.no_grad():
            model.embed.weight[0, 0] += 1e-3
        return original(lens, held, unembed, log_final, optimizer)

    monkeypatch.setattr(lenses, "_fit", careless)
    with pytest.raises(IntegrityError, match="the model changed"):
        train_lens(model, (models.ids(seed=s) for s in range(2)), steps=2)


def test_an_optimizer_that_misses_or_adds_a_parameter_is_refused(monkeypatch):
    """A probe that nobody finds trains nothing and says nothing;
    one parameter too many is the model's.
    """
    lens, original = TunedLens(("embedding", "layers.0.resid_out"), 4), torch.optim.Adam
    assert len(lenses.make_optimizer(lens, 1e-3).param_groups[0]["params"]) == 4
    monkeypatch.setattr(
        torch.optim, "Adam", lambda groups, lr: original(groups[0]["params"][1:], lr=lr)
    )
    with pytest.raises(ContractError, match="no others"):
        lenses.make_optimizer(lens, 1e-3)
    extra = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(
        torch.optim, "Adam", lambda groups, lr: original([*groups[0]["params"], extra], lr=lr)
    )
    with pytest.raises(ContractError, match="no others"):
        lenses.make_optimizer(lens, 1e-3)
    monkeypatch.undo()
    with pytest.raises(ContractError, match="a lens has parameters"):
        lenses.make_optimizer(TunedLens((), 4), 1e-3)


def test_what_a_lens_cannot_do_is_refused(tmp_path):
    model = models.ours().eval()
    with pytest.raises(UsageError, match="too few batches"):
        train_lens(model, [models.ids()], steps=2)
    with pytest.raises(UsageError, match="training mode"):
        train_lens(model.train(), [models.ids()], steps=1)
    net = torch.nn.Sequential(
        torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 7)
    )
    with pytest.raises(UsageError, match="final norm and the head"):
        unembedding(net, {"layers.{}.resid_out": "{}"})
    with pytest.raises(UsageError, match="stream after each layer"):
        stream_points(net, {"logits": "2"})
    (tmp_path / "no.safetensors").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="is not a lens"):
        load_lens(tmp_path / "no.safetensors", model)
