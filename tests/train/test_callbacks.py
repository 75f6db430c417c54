"""Callbacks: which hooks are called when, a tracker that mirrors what the log holds, and a step
computed twice, which leaves no trace and shows one flipped bit.
"""

import builtins
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stackproof.config import NeverStop, Patience
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import EnvironmentUnfit, GateFailed
from stackproof.train import callbacks, start
from stackproof.train import step as steps
from stackproof.train.callbacks import TensorBoard, gradient_checksums
from stackproof.train.loop import train
from stackproof.train.start import fresh, resume
from stackproof.train.state import build_state, differing, digest, gradient_crc32
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


# --- a step computed twice ------------------------------------------------------------------------


@pytest.fixture
def state(small_cfg, dataset):
    return build_state(small_cfg, dataset, torch.device("cpu"))


def batches_of(state):
    return [state.data_loader.next_batch() for _ in range(state.cfg.accumulation())]


def test_it_leaves_no_trace_and_foretells_the_step(state, small_cfg, dataset):
    """With dropout on: the state after it is the state before it,
    and its gradients are those the step then has.
    """
    assert small_cfg.model.dropout > 0
    batches = batches_of(state)
    before = digest(state)
    first = gradient_checksums(state, batches)
    assert digest(state) == before
    steps.train_step(state, batches)
    assert differing(first, gradient_crc32(state.model)) == () and len(first) == sum(
        1 for _ in state.model.parameters()
    )


def test_a_run_that_computes_twice_is_the_run_that_does_not(small_cfg, dataset):
    ends = []
    for twice in (False, True):
        state = build_state(small_cfg, dataset, torch.device("cpu"))
        for _ in range(3):
            batches = batches_of(state)
            if twice:
                gradient_checksums(state, batches)
            steps.train_step(state, batches)
        ends.append(digest(state))
    assert ends[0] == ends[1]


def test_float16_keeps_its_loss_scale(small_cfg, dataset):
    """The first scale overflows and is halved: in both computations alike,
    and once as far as the run goes.
    """
    cfg = small_cfg.model_copy(
        update={"train": small_cfg.train.model_copy(update={"dtype": "float16"})}
    )
    state = build_state(cfg, dataset, torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batches = batches_of(state)
    first = gradient_checksums(state, batches)
    assert state.scaler.get_scale() == 2.0**40
    report = steps.train_step(state, batches)
    assert report.overflow_retries > 0 and differing(first, gradient_crc32(state.model)) == ()


def test_a_gradient_on_one_side_only_differs(state):
    batches = batches_of(state)
    first = gradient_checksums(state, batches)
    steps.train_step(state, batches)
    again = gradient_crc32(state.model)
    name = next(iter(again))
    assert differing(first, {n: c for n, c in again.items() if n != name}) == (name,)
    assert differing({}, again) == tuple(sorted(again))


def test_one_flipped_bit_halts_the_run(museum_folder, tmp_path, monkeypatch):
    """The lowest bit of one gradient entry, in the second of two computations,
    in a run through the session.
    """

    cfg = museum_config(museum_folder)
    cfg = cfg.model_copy(
        update={"train": cfg.train.model_copy(update={"max_steps": 6, "sdc_check_every": 4})}
    )
    original, calls = steps.accumulate, [0]

    def flipping(state, batches):
        result = original(state, batches)
        calls[0] += 1
        if calls[0] > 1 and state.step == 3:
            next(state.model.parameters()).grad.view(-1)[-1:].view(torch.int32).bitwise_xor_(
                calls[0] % 2
            )
        return result

    monkeypatch.setattr(steps, "accumulate", flipping)
    with pytest.raises(GateFailed) as caught:
        train(fresh(cfg, (), tmp_path / "run", only=("runtime.recomputed-step",)))
    (gate,) = caught.value.record.gates
    assert gate.seconds > 0, "the time of the check is charged to its gate"
    assert (
        caught.value.gate_id == "runtime.recomputed-step"
        and caught.value.verdict.measured["differing"] == 1
    )


@pytest.mark.parametrize("flips", [False, True])
def test_an_early_stop_before_the_interval_is_computed_twice_as_well(
    museum_folder, tmp_path, monkeypatch, flips
):
    """No gain of 100 nats comes after the first of three evaluations."""
    cfg, rule = museum_config(museum_folder), Patience(patience=2, min_delta_nats=100)
    changes = {
        "train": cfg.train.model_copy(update={"max_steps": 12, "sdc_check_every": 12}),
        "eval": cfg.eval.model_copy(update={"every": 2}),
        "stop": rule,
    }
    original, at_the_end = steps.accumulate, []

    def flipping(state, batches):
        result = original(state, batches)
        at_the_end.extend([1] * (state.step == 6))
        if flips and len(at_the_end) == 2:
            next(state.model.parameters()).grad.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return result

    monkeypatch.setattr(steps, "accumulate", flipping)
    only = ("runtime.recomputed-step",)
    opened = fresh(cfg.model_copy(update=changes), (), tmp_path / "run", only=only)
    if flips:
        with pytest.raises(GateFailed) as caught:
            train(opened)
        assert caught.value.verdict.measured["differing"] == 1
    else:
        record = train(opened)
        assert record.status == "early_stopped"
        assert [g.verdict for g in record.gates] == ["pass"]
    assert len(at_the_end) == 2


@pytest.mark.parametrize(("free_flops", "verdict"), [(1e15, "pass"), (1.0, "fail")])
def test_a_step_above_the_peak_is_judged_by_a_second_probe(
    cfg, tmp_path, monkeypatch, free_flops, verdict
):
    """The first probe, of one operation per second, was taken beside other work."""
    probed = iter([1.0, free_flops])
    monkeypatch.setattr(start, "probe_peak_flops", lambda device: next(probed))
    monkeypatch.setattr(callbacks, "probe_peak_flops", lambda device: next(probed))
    opened = fresh(cfg, (), tmp_path / "run", only=("runtime.step-time",))
    if verdict == "pass":
        record = train(opened)
    else:
        with pytest.raises(GateFailed) as caught:
            train(opened)
        record = caught.value.record
    (gate,) = record.gates
    assert gate.verdict == verdict and next(probed, None) is None
