"""Callbacks: which hooks are called when, and a tracker that mirrors what the log holds."""

import builtins
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stackproof.config import NeverStop
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.train.callbacks import TensorBoard
from stackproof.train.loop import train
from stackproof.train.start import fresh, resume
from stackproof.train.trainer import Callback, CallbackList

FEW = ("runtime.finite",)


@pytest.fixture(scope="module")
def cfg(museum_folder):
    base = museum_config(museum_folder)
    parts = {
        "train": base.train.model_copy(update={"max_steps": 9}),
        "checkpoint": base.checkpoint.model_copy(update={"every": 4}),
        "stop": NeverStop(),
    }
    return base.model_copy(update=parts)


class Recorder(Callback):
    """Notes the hooks that are called."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda *values: self.seen.append(name)
        return object.__getattribute__(self, name)


def read(run_dir):
    """Scalars by name and step, and the tags of texts, as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    return {
        name: {e.step: e.value for e in events.Scalars(name)} for name in tags["scalars"]
    }, tags["tensors"]


def logged(run_dir):
    """The same from metrics.jsonl."""
    found = {}
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            # event files hold float32
            found.setdefault(name, {})[line["step"]] = pytest.approx(value, rel=1e-6)
    return found


def test_hooks_are_called_in_the_order_of_a_step(cfg, tmp_path):
    recorder = Recorder()
    train(fresh(cfg, (), tmp_path / "run", [recorder], only=FEW))
    hooks = [h for h in recorder.seen if h not in ("on_data", "on_preflight", "on_message")]
    setup = ["on_phase", "on_setup", "on_phase", "on_train_start"]
    step = ["on_step_start", "on_batch", "on_step"]
    assert hooks[:7] == [*setup, *step] and hooks[7] == "on_step_end"
    last = [
        "on_evaluation",
        "on_sample",
        "on_step_end",
        "on_saved",
        "on_save",
        "on_train_end",
        "on_close",
    ]
    assert hooks[-10:] == [*step, *last]
    never = {h for h in vars(Callback) if h.startswith("on_")} - set(recorder.seen)
    assert never <= {"on_gate_failure", "on_data", "on_message", "on_preflight"}


def test_a_list_calls_every_hook_of_every_member():
    first, second = Recorder(), Recorder()
    both = CallbackList([first, second])
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    for name in hooks:
        getattr(both, name)()
    assert first.seen == second.seen == hooks and len(hooks) == 17


def test_tensorboard_shows_what_the_log_holds(cfg, tmp_path):
    train(fresh(cfg, (), tmp_path / "run", [TensorBoard()], only=FEW))
    scalars, texts = read(tmp_path / "run")
    assert scalars == logged(tmp_path / "run") and len(scalars["loss_nats"]) == 9
    assert set(scalars["val_loss_nats"]) == {7, 9} and texts == ["sample/text_summary"]


def test_steps_that_a_resumed_run_repeats_are_shown_once(cfg, tmp_path):
    class Stops(Callback):
        def on_step_end(self, trainer, report):
            if report.step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(cfg, (), tmp_path / "run", [TensorBoard(), Stops()], only=FEW))
    assert set(read(tmp_path / "run")[0]["loss_nats"]) == {1, 2, 3, 4, 5, 6}
    train(resume(tmp_path / "run", (), cfg, [TensorBoard()]))
    scalars, _ = read(tmp_path / "run")
    assert scalars == logged(tmp_path / "run") and list(scalars["loss_nats"]) == list(range(1, 10))


def test_without_the_package_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def missing(name, *rest):
        if "tensorboard" in name:
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return original(name, *rest)

    TensorBoard()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EnvironmentUnfit, match=r"stackproof\[tensorboard\]"):
        TensorBoard()


def test_an_exception_in_a_callback_ends_the_run(cfg, tmp_path):
    class Broken(Callback):
        def on_batch(self, trainer, batches):
            raise RuntimeError("broken tracker")

    with pytest.raises(RuntimeError, match="broken tracker"):
        train(fresh(cfg, (), tmp_path / "run", [Broken()], only=FEW))
    assert (
        json.loads((tmp_path / "run/metadata.json").read_text())["end_reason"]
        == "RuntimeError: broken tracker"
    )
