"""Every architecture through the whole of a run: trained under all gates, saved, resumed bit for
bit, read back and sampled.
"""

import json
import shutil

import pytest
import torch

from stackproof.cli.load_model import open_model
from stackproof.config import (
    BiasBalance,
    DifferentialAttention,
    Gelu,
    HardCapacity,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    MixtureOfDepths,
    MixtureOfExperts,
    NeverStop,
    RotaryPositions,
    SoftmaxAttention,
)
from stackproof.contracts.keeper import Gatekeeper
from stackproof.evaluate.sampling import generate
from stackproof.museum.collection import museum_config
from stackproof.train import checkpoint, start
from stackproof.train.loop import train
from stackproof.train.start import fresh, resume
from tests.verdicts import all_green

STEPS, HALF = 14, 7
FEW = ("runtime.finite", "schedule.rate", "optim.movement")
VARIANTS = {
    "differential": dict(attention=DifferentialAttention(form="scalar", qk_norm=True, window=40)),
    "gpt2": dict(
        attention=SoftmaxAttention(qkv_bias=True, out_bias=True),
        ffn=Gelu(),
        norm=LayerNorm(),
        positions=LearnedPositions(),
        dropout=0.0,
    ),
    "qwen": dict(
        attention=SoftmaxAttention(qk_norm=True, qkv_bias=True),
        positions=RotaryPositions(scaling=LinearScaling(factor=2.0)),
    ),
    "experts": dict(ffn=MixtureOfExperts(n_experts=4)),
    "experts-by-bias": dict(
        ffn=MixtureOfExperts(n_experts=4, balance=BiasBalance(), expert=Gelu(), capacity_factor=1.5)
    ),
    "depths-hard": dict(
        depth=MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5), every=2), tied_head=False
    ),
    "depths-and-experts": dict(
        attention=DifferentialAttention(),
        ffn=MixtureOfExperts(n_experts=4),
        depth=MixtureOfDepths(gate=HardCapacity(), every=2),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_under_all_gates_resumes_and_answers(
    museum_folder, tmp_path, monkeypatch, name
):
    base = museum_config(museum_folder)
    parts = {
        "model": base.model.model_copy(update=VARIANTS[name]),
        "train": base.train.model_copy(update={"max_steps": STEPS}),
        "checkpoint": base.checkpoint.model_copy(update={"every": HALF}),
        "stop": NeverStop(),
    }
    cfg = base.model_copy(update=parts)
    record = train(fresh(cfg, (), tmp_path / "whole"))
    assert record.status == "completed" and all_green(record.gates, record.metric("steps"))
    lines = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["loss_nats"] < lines[0]["loss_nats"] - 0.05  # measured falls of 0.3 and more

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / f"again/checkpoints/step-{STEPS:08d}")
    monkeypatch.setattr(
        start, "Gatekeeper", lambda *given, **options: Gatekeeper(*given, **options | {"only": FEW})
    )
    train(resume(tmp_path / "again", (), cfg, at=HALF))
    whole, resumed = (
        checkpoint.load(checkpoint.find(tmp_path / folder)) for folder in ("whole", "again")
    )
    assert whole.state["step"] == resumed.state["step"] == STEPS
    for part in ("model", "tensors"):
        ours, theirs = getattr(whole, part), getattr(resumed, part)
        assert ours.keys() == theirs.keys() and all(
            torch.equal(t, theirs[n]) for n, t in ours.items()
        )

    assert (
        len(generate(open_model(tmp_path / "whole").model, [0], max_new_tokens=70, temperature=0.0))
        == 70
    )


def test_differential_attention_and_depths_train_together_in_bfloat16(
    museum_folder, tmp_path, monkeypatch
):
    """With accumulation, clipping, a cosine and a held-out split,
    and what is saved is read back.
    """
    monkeypatch.setattr(start, "refuse_emulated", lambda *asked: None)
    base = museum_config(museum_folder)
    parts = {
        "model": base.model.model_copy(
            update={"attention": DifferentialAttention(), "depth": MixtureOfDepths()}
        ),
        "train": base.train.model_copy(update={"dtype": "bfloat16"}),
        "stop": NeverStop(),
    }
    record = train(fresh(base.model_copy(update=parts), (), tmp_path / "run"))
    assert record.status == "completed" and all_green(record.gates, record.metric("steps"))
    assert base.accumulation() == 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held_out = [line["val_loss_nats"] for line in lines if "val_loss_nats" in line]
    assert held_out[-1] < held_out[0] - 0.05
    checkpoint.load(checkpoint.find(tmp_path / "run"))
