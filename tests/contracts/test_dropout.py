"""The gate of dropout on the stack, on its plants, and on draws made by hand."""

import pytest
import torch

from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Declared, Subject, Trainee, Training
from stackproof.museum.plant import load_museum
from stackproof.subject.assemble import subject_of

CPU = torch.device("cpu")
GATE = "model.dropout-law"


def with_model(cfg, **changes):
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=changes)})


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5])
def test_gate_is_green_on_the_stack(spec, small_cfg, dataset, rate):
    verdict = call_check(
        spec.gates[GATE], subject_of(with_model(small_cfg, dropout=rate), dataset, CPU)
    )
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["draws"] == 2 * 2 * 2 * 2, "steps, micro-batches, layers, branches"
    assert verdict.measured["scale_rel_error"] < 1e-4 and verdict.measured["likeness"] < 0.1, (
        "measured 2e-6 and 0.05"
    )


def test_gate_is_red_on_its_plants(spec, small_cfg, dataset):
    for plant_id in spec.gates[GATE].plants:
        with load_museum()[plant_id].apply():
            verdict = call_check(spec.gates[GATE], subject_of(small_cfg, dataset, CPU))
            assert verdict.outcome == "fail", plant_id


class Block:
    """A block whose branches give one tensor and add another one to the stream."""

    def __init__(self):
        self.attention_norm, self.attention, self.ffn_norm, self.ffn = (
            torch.nn.Identity() for _ in range(4)
        )

    def on_output(self, keep):
        self.keep = keep

    def run(self, attention, ffn):
        middle = attention[1]
        self.attention_norm(torch.zeros_like(middle)[None])
        self.attention(attention[0][None])
        self.ffn_norm(middle[None])
        self.ffn(ffn[0][None])
        self.keep((middle + ffn[1])[None])


class Replayed(Training, Trainee):
    """A training in whose steps the branches give and add what was drawn by hand."""

    def __init__(self, draws):
        draws = list(draws)
        self.blocks = [Block() for _ in range(1 + max(layer for (layer, _), _, _ in draws))]
        self.drawn = iter([(given, added) for _, given, added in draws])

    def trainee(self):
        return self

    def residual_blocks(self):
        return self.blocks

    def draw(self):
        return ()

    def step(self, batches):
        for block, attention, ffn in zip(self.blocks, self.drawn, self.drawn):
            block.run(attention, ffn)


class Declaration(Declared):
    def __init__(self, dropout, n_layers):
        self.architecture = {"dropout": dropout, "n_layers": n_layers}


def by_hand(mask_of, rate=0.1, factor=None, *, declared=None, n_layers=1, n_tokens=64):
    """Draws of two branches of one layer in two steps, with masks as drawn from a generator."""
    draw, factor = torch.Generator().manual_seed(5), 1 / (1 - rate) if factor is None else factor
    draws = []
    for _ in range(2):
        for branch in ("attention", "ffn"):
            given = torch.randn(64, 32, generator=draw)
            added = given * mask_of(draw) * factor
            draws.append(((0, branch), given[:n_tokens], added[:n_tokens]))
    promised = Declaration(rate if declared is None else declared, n_layers)
    return Subject(declared=promised, training=Replayed(draws))


def fresh(rate):
    return lambda draw: torch.rand(64, 32, generator=draw) >= rate


def test_gate_sees_other_rates_and_shared_masks(spec):
    gate, once = (
        spec.gates[GATE],
        torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) >= 0.1,
    )
    assert call_check(gate, by_hand(fresh(0.1))).outcome == "pass"
    wrong = {
        "twice the rate": by_hand(fresh(0.2)),
        "one percent of another factor": by_hand(fresh(0.1), factor=1.01 / 0.9),
        "the other sign": by_hand(fresh(0.1), factor=-1 / 0.9),
        "one mask for all": by_hand(lambda draw: once),
        "one mask for all tokens": by_hand(
            lambda draw: (torch.rand(1, 32, generator=draw) >= 0.1).expand(64, 32)
        ),
        "one mask for all features": by_hand(
            lambda draw: (torch.rand(64, 1, generator=draw) >= 0.1).expand(64, 32)
        ),
        "a branch that nobody saw": by_hand(fresh(0.1), n_layers=2),
        "dropout where none is declared": by_hand(fresh(0.1), factor=1.0, declared=0.0),
    }
    assert [
        name for name, given in wrong.items() if call_check(gate, given).outcome != "fail"
    ] == []


def test_too_few_numbers_are_no_verdict(spec):
    few = by_hand(fresh(0.1), n_tokens=4)
    assert call_check(spec.gates[GATE], few).outcome == "not_run"
