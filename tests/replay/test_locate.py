"""A run that ends in a NaN leaves a bundle, and one pass from the last checkpoint names the
operation, layer, line and step.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from stackproof.config import AdamW, NeverStop
from stackproof.evidence import repro
from stackproof.museum.collection import museum_config, write_texts
from stackproof.museum.plant import load_museum
from stackproof.replay import bundle as bundles
from stackproof.replay.bundle import ReproRecorder
from stackproof.replay.locate import locate
from stackproof.spec.errors import DataError, GateFailed
from stackproof.train import losses, start
from stackproof.train import step as steps
from stackproof.train.loop import train
from stackproof.train.start import fresh

FINITE = "runtime.finite"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return museum_config(folder).model_copy(update={"stop": NeverStop()})


def halted(cfg, folder: Path) -> Path:
    """The bundle of a run that ends because something is not finite."""
    torch.set_num_threads(1)
    with pytest.raises(GateFailed, match=FINITE):
        train(fresh(cfg, (), folder / "run", [ReproRecorder()], only=(FINITE,)))
    (found,) = (folder / "run" / "repro").iterdir()
    return found


@contextmanager
def at_step(monkeypatch, when: int, change):
    """`change(state)` before one step of the run, or of its replay."""
    original = steps.train_step

    def planted(state, batches):
        if state.step + 1 == when:
            change(state)
        return original(state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", planted)
        yield


def explode(state) -> None:
    with torch.no_grad():
        for name in ("gate", "up"):
            getattr(state.model.layers[1].ffn, name).weight.mul_(1e22)


def test_an_overflow_of_one_layer_at_one_step_is_named_from_the_last_checkpoint(
    cfg, tmp_path, monkeypatch
):
    """Layer 1's gated product overflows at step 17: three steps are replayed, once,
    and its inputs are the last good ones.
    """
    with at_step(monkeypatch, 17, explode):
        folder = halted(cfg, tmp_path)
        held, found = locate(folder)
    assert held.base.step == 14 and found.steps == (15, 16, 17) and found.step == held.step == 17
    first = found.report.first
    assert (first.kind, first.what, first.op) == ("made", "Inf", "aten.mul_.Tensor")
    assert (first.where.phase, first.where.module, first.where.layer) == (
        "forward",
        "layers.1.ffn",
        1,
    )
    assert (
        first.where.lines[0].file == "stack/kernels/eager.py"
        and first.where.lines[0].function == "_SwiGLU.forward"
    )
    assert all(v.first_bad is None and v.max > 1e15 for v in first.inputs)
    held, clean = locate(folder)
    assert clean.step is None and clean.report is None and clean.steps == (15, 16, 17), (
        "without the plant nothing is found"
    )


def test_a_derivative_at_one_step_is_named_with_the_line_of_the_forward(cfg, tmp_path, monkeypatch):
    original, now = losses.linear_cross_entropy_sum, [False]

    def rooted(x_BTD, head_VD, labels_BT):
        nats = original(x_BTD, head_VD, labels_BT)
        return nats + (x_BTD - x_BTD.detach()).square().sum().sqrt() if now[0] else nats

    monkeypatch.setattr(losses, "linear_cross_entropy_sum", rooted)
    with at_step(monkeypatch, 4, lambda state: now.__setitem__(0, True)):
        folder = halted(cfg, tmp_path)
        now[0] = False
        held, found = locate(folder)
    first = found.report.first
    assert found.step == 4 and held.base.kind == "seed" and found.steps == (1, 2, 3, 4)
    assert (
        first.where.phase == "backward"
        and first.where.node == "SqrtBackward0"
        and first.what == "Inf"
    )
    assert ".square().sum().sqrt()" in first.where.lines[0].text and first.inputs[1].max == 0.0


def test_a_run_that_blows_up_by_itself_needs_no_plant(cfg, tmp_path):
    """A rate of 1e22 throws the weights out of float32 within a few steps; the bundle says where,
    on this code as it is.
    """
    optim = AdamW(lr=1e22, max_grad_norm=0.5)
    wild = cfg.model_copy(
        update={"optim": optim, "schedule": cfg.schedule.model_copy(update={"warmup_steps": 1})}
    )
    held, found = locate(halted(wild, tmp_path))
    assert found.step == held.step and found.report.first.kind == "made"
    first = found.report.first
    assert (
        first.outputs
        and all(v.first_bad is None for v in first.inputs)
        and max(v.max or 0 for v in first.inputs) > 1e15
    )
    assert first.where.lines[0].file.startswith("stack/")


@pytest.mark.parametrize(
    ("plant", "kind", "what", "line"),
    [
        (
            "runtime.nan-in-a-weight",
            "put in",
            "NaN",
            'next(state.model.parameters())[0, 0] = float("nan")',
        ),
        ("runtime.infinite-activation", "put in", "Inf", 'return nats * float("inf")'),
    ],
)
def test_the_museum_is_read_to_the_line(cfg, tmp_path, plant, kind, what, line):
    with load_museum()[plant].apply():
        found = locate(halted(cfg, tmp_path))[1]
    first = found.report.first
    assert found.step == 7 and (first.kind, first.what) == (kind, what)
    assert (first.where.lines[0].file, first.where.lines[0].text) == (
        "stack/museum/runtime.py",
        line,
    )


def test_a_bundle_of_another_gate_is_finite_and_that_is_said(cfg, tmp_path):
    torch.set_num_threads(1)
    with load_museum()["runtime.update-skipped"].apply(), pytest.raises(GateFailed):
        train(fresh(cfg, (), tmp_path / "run", [ReproRecorder()], only=("optim.movement",)))
    (folder,) = (tmp_path / "run" / "repro").iterdir()
    with load_museum()["runtime.update-skipped"].apply():
        held, found = locate(folder)
    assert (
        found.step is None
        and found.steps == tuple(s.step for s in held.steps)
        and found.operations > 1000
    )


def test_an_overflow_that_the_loss_scale_answers_is_no_finding(cfg, tmp_path, monkeypatch):
    """float16 begins at a scale far too large here, and halves it while gradients overflow: the
    replay goes through all of that.
    """
    half = cfg.model_copy(update={"train": cfg.train.model_copy(update={"dtype": "float16"})})
    monkeypatch.setattr(start, "refuse_emulated", lambda *_: None)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**34))
    original, attempts = steps.accumulate, []
    with at_step(monkeypatch, 4, explode):
        folder = halted(half, tmp_path)
        found = locate(folder)[1]
    assert (
        found.step == 4
        and found.report.first.where.module == "layers.1.ffn.gate"
        and found.report.first.op == "aten._to_copy.default"
    )
    monkeypatch.setattr(
        steps,
        "accumulate",
        lambda state, batches: attempts.append(state.step + 1) or original(state, batches),
    )
    assert locate(folder)[1].step is None and attempts.count(1) > 3, (
        "several attempts in step 1, each but the last with an overflow"
    )


def test_what_the_bundle_lacks_is_refused(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "CHECKPOINT_BYTES_MAX", 1000)
    with at_step(monkeypatch, 17, explode):
        folder = halted(cfg, tmp_path)
        with pytest.raises(DataError, match="too large to copy"):
            locate(folder)
        base = Path(repro.read_bundle(folder).base.path)
        assert locate(folder, base=base)[1].step == 17
