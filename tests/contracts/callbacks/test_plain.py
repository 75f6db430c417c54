"""A loop written by hand, around a model that gives logits and nothing else."""

import math

import pytest
import torch

from stackproof.contracts import causality
from stackproof.contracts.callbacks.plain import gated
from stackproof.contracts.callbacks.probe import Probe, max_length_of, untouched
from stackproof.contracts.callbacks.session import judge_model
from stackproof.spec.errors import ConfigError, GateFailed

nn, F = torch.nn, torch.nn.functional
VOCAB, T = 32, 12


class Tiny(nn.Module):
    """One causal attention layer with dropout, its own parameter names
    and a positional argument.
    """

    def __init__(self, causal: bool = True, drop: float = 0.1):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, 16), nn.Embedding(T, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, VOCAB), nn.LayerNorm(16)
        self.drop, self.causal, self.max_seq_len = nn.Dropout(drop), causal, T

    def forward(self, idx):
        x = self.drop(self.embed(idx) + self.place(torch.arange(idx.shape[1])))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))

    @property
    def config(self):
        return self


def batches(n: int = 5, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (3, T + 1), generator=draw) for _ in range(n)]


def loop(
    model=None,
    *,
    optimizer=None,
    data=None,
    loss=None,
    zero=True,
    before_step=lambda model: None,
    micro=1,
    **options,
):
    """Train by hand with the gates around it; returns the gate."""
    torch.manual_seed(0)
    model = model or Tiny()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gated(model, optimizer, **options) as gate:
        for i, rows in enumerate(data or batches()):
            logits = model(rows[:, :-1])
            value = (
                loss(logits, rows)
                if loss
                else F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            )
            (value / micro).backward()
            if (i + 1) % micro == 0:
                before_step(model)
                optimizer.step()
                if zero:
                    optimizer.zero_grad()
    return gate


def test_a_clean_loop_of_three_added_lines_is_green():
    gate = loop()
    verdicts = {g: v.outcome for g, v in gate.verdicts().items()}
    assert gate.first_failures() == {}
    green = {
        "model.causal",
        "optim.parameter-groups",
        "loss.logit-gradient",
        "optim.movement",
        "optim.gradient-kept",
    }
    assert green <= {g for g, o in verdicts.items() if o == "pass"}
    unasked = {
        "model.isolation",
        "tokenizer.identity",
        "optim.clip-norm",
        "schedule.rate",
    }
    assert all(verdicts[g] == "not_run" for g in unasked)


def test_a_clean_loop_with_all_that_can_be_told_is_green():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)

    def clip(model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    gate = loop(model, optimizer=optimizer, before_step=clip, max_grad_norm=0.5, scheduler=schedule)
    assert gate.first_failures() == {} and gate.verdicts()["optim.clip-norm"].passed


def future(logits, rows):
    return F.cross_entropy(logits.flatten(0, 1), rows[:, :-1].flatten())


def double(logits, rows):
    return 2 * F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def nothing(logits, rows):
    return logits.sum() * 0


class Poisoned(Tiny):
    """Evaluations give one logit that is `values`, in turn."""

    def __init__(self, *values: float):
        super().__init__(drop=0.0)
        self.values = [1.0, *values]

    def forward(self, idx):
        logits = super().forward(idx)
        if not self.training and torch.is_inference_mode_enabled():
            logits[0, 0, 0] = self.values.pop()
        return logits


@pytest.mark.parametrize(
    ("values", "repeat"),
    [
        ((1.0, 1.0), 0.0),
        ((math.nan, math.nan), 0.0),
        ((math.inf, math.inf), 0.0),
        ((1.0, math.nan), math.inf),
        ((math.inf, 1.0), math.inf),
        ((1.0, 1.5), 0.5),
    ],
)
def test_two_evaluations_are_compared_as_the_gates_of_causality_do(values, repeat):
    model = Poisoned(*values)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gated(model, optimizer, mode="log", only=("runtime.mode",)) as gate:
        model.eval()
        with torch.inference_mode():
            model(batches()[0][:, :-1])
    verdict = gate.verdicts()["runtime.mode"]
    assert (verdict.outcome, verdict.measured["repeat_abs"]) == (
        "fail" if repeat else "pass",
        repeat,
    )


PLANTS = {
    "causal mask lost": ("model.causal", None, lambda: loop(Tiny(causal=False))),
    "unshifted": ("loss.logit-gradient", 1, lambda: loop(loss=future)),
    "accumulation not divided": ("loss.logit-gradient", 1, lambda: loop(loss=double)),
    "zero_grad forgotten": ("optim.gradient-kept", 2, lambda: loop(zero=False)),
    "clipped tensor by tensor": (
        "optim.gradient-kept",
        1,
        lambda: loop(
            before_step=lambda m: [nn.utils.clip_grad_norm_(p, 0.05) for p in m.parameters()]
        ),
    ),
    "not clipped": ("optim.clip-norm", 1, lambda: loop(max_grad_norm=0.01)),
    "evaluation mode kept": ("runtime.mode", 1, lambda: loop(Tiny().eval())),
    "rate zero": ("schedule.rate", 2, lambda: with_schedule(lambda i: 0.0)),
    "NaN made zero in gradients": (
        "runtime.finite",
        1,
        lambda: loop(
            loss=lambda a, b: future(a * torch.nan, b),
            before_step=lambda m: [p.grad.zero_() for p in m.parameters()],
        ),
    ),
    "loss without the model": ("loss.logit-gradient", 1, lambda: loop(loss=nothing)),
    "a branch detached": ("optim.movement", 4, lambda: loop(Detached())),
}


class Detached(Tiny):
    def forward(self, idx):
        self.qkv.weight.requires_grad_(True)
        x = self.drop(self.embed(idx) + self.place(torch.arange(idx.shape[1])))
        q, k, v = self.qkv(self.norm(x)).detach().chunk(3, -1)
        return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


def with_schedule(rule):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return loop(
        model, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
    )


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_in_a_plain_loop_is_caught(name):
    gate_id, step, run = PLANTS[name]
    with pytest.raises(GateFailed) as e:
        run()
    assert e.value.gate_id == gate_id or gate_id in str(e.value)
    assert step is None or f"step {step}" in str(e.value)


def test_looking_at_a_model_leaves_it_bit_for_bit_as_it_was():
    model = Tiny()
    model.register_buffer("count", torch.zeros(3))
    model.drop.eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    inner = model.forward
    model.forward = lambda idx: (model.count.add_(1), inner(idx))[1]
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert judge_model(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))[
        "model.causal"
    ].passed
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors.items())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in model.parameters())
    assert [m.training for m in model.modules()] == modes and torch.equal(
        torch.get_rng_state(), state
    )


def test_untouched_puts_back_after_an_error():
    model = Tiny()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), untouched(model):
        model.eval()
        torch.rand(3)
        raise ZeroDivisionError
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_asked_is_not_run_and_says_why():
    class Needs(Tiny):
        def forward(self, idx, image):
            return super().forward(idx)

    assert "image" in Probe(Needs()).refusal
    assert judge_model(Needs())["model.causal"].outcome == "not_run"


def test_a_run_that_goes_on_elsewhere_is_told():
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gated(model, optimizer) as gate:
        _step(gate, model, optimizer, batches()[0])
        state = gate.state_dict()
        kept = {n: t.clone() for n, t in model.state_dict().items()}
        _step(gate, model, optimizer, batches()[1])
    model.load_state_dict(kept)
    with gated(model, optimizer) as gate, pytest.raises(GateFailed) as e:
        gate.load_state_dict(state)
    assert e.value.gate_id == "checkpoint.state-restored" and "optimizer" in str(e.value)


def _step(gate, model, optimizer, rows):
    gate.batch(rows)
    loss = gate.loss(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_unknown_mode_gate_or_option_is_refused():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="option") as unknown, gated(model, optimizer, skips=()):
        pass
    assert unknown.value.value == "skips" and "skip" in unknown.value.allowed
    with pytest.raises(ConfigError, match="mode"), gated(model, optimizer, mode="loud"):
        pass
    with (
        pytest.raises(ConfigError, match=r"loss\.golden"),
        gated(model, optimizer, skip=["loss.golden"]),
    ):
        pass


class Silent(Tiny):
    """Says nothing of its length, which a table without a telling name bounds."""

    config = property(lambda self: None)

    def __init__(self):
        super().__init__()
        del self.max_seq_len


def test_a_model_that_does_not_say_its_length_is_asked_within_it():
    model = Silent()
    assert Probe(model).max_length == T
    gate = loop(model)
    assert gate.first_failures() == {} and gate.verdicts()["model.causal"].passed
    model.place, model.pos = nn.Identity(), nn.Embedding(7, 16)
    assert max_length_of(model) == 7, (
        "a table of positions is known by its name, also where nothing may be tried"
    )


def test_a_check_that_breaks_on_a_model_is_told_and_stops_nobody(monkeypatch, caplog):
    """No verdict, the reason in the log, and the loop goes on; a red gate beside it still halts."""
    monkeypatch.setattr(causality, "draw_ids", lambda *arguments, **named: 1 / 0)
    gate = loop()
    broken = [v for v in gate.verdicts().values() if "ZeroDivisionError" in v.message]
    assert (
        broken
        and all(v.outcome == "not_run" for v in broken)
        and "ZeroDivisionError" in caplog.text
    )
    with pytest.raises(GateFailed, match=r"optim\.parameter-groups"):
        loop(optimizer=torch.optim.AdamW(nn.Linear(2, 2).parameters()))
