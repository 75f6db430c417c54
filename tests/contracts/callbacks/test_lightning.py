"""A stock LightningModule around the same small model, clean and with plants."""

import pytest
import torch

pytest.importorskip("lightning")

import lightning.pytorch as pl

from stackproof.contracts.callbacks.lightning import GateCallback
from stackproof.spec.errors import GateFailed
from tests.contracts.callbacks.test_plain import VOCAB, T, Tiny

F = torch.nn.functional


class Module(pl.LightningModule):
    def __init__(self, shift: int = 1, tick: str = "step", net: Tiny | None = None):
        super().__init__()
        self.net, self.shift, self.tick = net or Tiny(), shift, tick

    def training_step(self, batch, batch_idx):
        (rows,) = batch
        return F.cross_entropy(
            self.net(rows[:, :-1]).flatten(0, 1), rows[:, self.shift : self.shift + T].flatten()
        )

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.tick},
        }


def fit(folder, module=None, callback=None, resume=None, data=None, **plan):
    """Train on 16 rows; returns (callback, what was raised or None)."""
    torch.manual_seed(0)
    callback = callback or GateCallback()
    rows = (
        data
        if data is not None
        else torch.randint(0, VOCAB, (16, T + 1), generator=torch.Generator().manual_seed(1))
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=2)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        num_sanity_val_steps=0,
        **quiet | {"max_epochs": 2} | plan,
    )
    try:
        trainer.fit(
            module or Module(),
            loader,
            loader,
            ckpt_path=resume,
            weights_only=False if resume else None,
        )
    except GateFailed as e:
        return callback, e, trainer
    return callback, None, trainer


@pytest.mark.parametrize(
    "plan",
    [{}, {"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.5}, {"val_check_interval": 2}],
    ids=str,
)
@pytest.mark.parametrize("tick", ["step", "epoch"])
def test_nothing_fires_on_clean_runs(tmp_path, plan, tick):
    callback, error, _ = fit(tmp_path, Module(tick=tick), **plan)
    assert error is None and callback.first_failures() == {}
    green = {g for g, v in callback.verdicts().items() if v.passed}
    assert green >= {
        "loss.logit-gradient",
        "optim.movement",
        "optim.clip-norm",
        "runtime.mode",
        "schedule.rate",
    }


def test_labels_that_are_not_shifted(tmp_path):
    callback, error, _ = fit(tmp_path, Module(shift=0))
    assert error.gate_id == "loss.logit-gradient" and callback.first_failures() == {
        "loss.logit-gradient": 1
    }


def test_weights_that_an_evaluation_changes(tmp_path):
    class Writes(Module):
        def on_validation_epoch_end(self):
            with torch.no_grad():
                next(self.net.parameters()).mul_(1.001)

    callback, error, _ = fit(tmp_path, Writes(), val_check_interval=2)
    assert error.gate_id == "optim.movement"
    assert callback.first_failures() == {"optim.movement": 3}


def test_gradients_that_are_left_from_before(tmp_path):
    class Stale(Module):
        def optimizer_zero_grad(self, *args):
            pass

    callback, error, _ = fit(tmp_path, Stale())
    assert error.gate_id == "optim.gradient-kept" and callback.first_failures() == {
        "optim.gradient-kept": 2
    }


def test_a_module_left_out_of_the_optimizer(tmp_path):
    class Forgets(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(
                [p for n, p in self.named_parameters() if "out" not in n], lr=0.1
            )

    _, error, _ = fit(tmp_path, Forgets())
    assert error.gate_id == "optim.parameter-groups" and error.verdict.measured["missing"] == 2


def test_dropout_that_stays_on_in_validation(tmp_path):
    class Loud(Module):
        def on_validation_model_eval(self):
            pass

    callback, error, _ = fit(tmp_path, Loud())
    assert error.gate_id == "runtime.mode" and callback.first_failures() == {"runtime.mode": 8}


def test_a_run_resumes_and_a_checkpoint_with_other_moments_does_not(tmp_path):
    _, error, trainer = fit(tmp_path, max_epochs=1)
    assert error is None
    path = tmp_path / "kept.ckpt"
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=False)
    assert kept["stack_gates"]["parts"]["step"] == 8
    callback, error, _ = fit(tmp_path, resume=str(path))
    assert error is None and callback.verdicts()["checkpoint.state-restored"].passed
    for state in kept["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()
    torch.save(kept, path)
    callback, error, _ = fit(tmp_path, resume=str(path))
    assert error.gate_id == "checkpoint.state-restored" and error.verdict.measured["differing"] == 8


def test_in_mode_log_nothing_is_raised(tmp_path):
    callback, error, _ = fit(tmp_path, Module(shift=0), GateCallback(mode="log"))
    assert error is None and callback.first_failures() == {"loss.logit-gradient": 1}
    assert '"loss.logit-gradient"' in (tmp_path / "gates.jsonl").read_text()
