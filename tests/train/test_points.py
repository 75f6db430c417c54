"""A run that records its points is the run that does not, to the bit; what it records is what the
step's own forward holds.
"""

import json
import shutil

import pytest
import torch

from stackproof.config import NeverStop, Patience
from stackproof.contracts.keeper import Gatekeeper
from stackproof.museum.collection import museum_config
from stackproof.spec.errors import GateFailed, Stopped
from stackproof.spec.records import Override, read_record
from stackproof.trace import points_log
from stackproof.trace.hooks import hook_points
from stackproof.trace.stats import Gatherer
from stackproof.train import callbacks, loop, start
from stackproof.train import step as steps
from stackproof.train.loop import train
from stackproof.train.run_dir import RunDir
from stackproof.train.start import fresh, resume
from stackproof.train.state import build_state, digest
from stackproof.train.trainer import Callback

FEW = ("runtime.finite", "evaluation.leaves-no-trace")


@pytest.fixture(scope="module")
def cfg(museum_folder):
    base = museum_config(museum_folder)
    train, checkpoint = (
        base.train.model_copy(update={"max_steps": 12}),
        base.checkpoint.model_copy(update={"every": 4}),
    )
    return base.model_copy(update={"train": train, "checkpoint": checkpoint, "stop": NeverStop()})


def traced(cfg, every):
    return cfg.model_copy(update={"trace": cfg.trace.model_copy(update={"every": every})})


def steps_of(folder):
    """Steps of the lines, in order, each once."""
    return list(dict.fromkeys(line["step"] for line in RunDir(folder).lines("points.jsonl")))


def weights(folder):
    return json.loads((folder / "checkpoints" / "step-00000012" / "manifest.json").read_text())[
        "files"
    ]


@pytest.fixture(scope="module")
def plain(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(fresh(cfg, (), folder, only=FEW))
    return folder


@pytest.fixture(scope="module")
def recorded(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(fresh(traced(cfg, 3), (), folder, only=FEW))
    return folder


def test_weights_moments_and_losses_are_the_same_to_the_bit(plain, recorded):
    for name in ("model.safetensors", "state.safetensors"):
        assert weights(plain)[name]["sha256"] == weights(recorded)[name]["sha256"]
    lines = [
        [(at["step"], at["loss_nats"], at["grad_norm"]) for at in RunDir(f).lines("metrics.jsonl")]
        for f in (plain, recorded)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 12
    assert not (plain / "points.jsonl").exists()


def test_a_compiled_run_records_too_and_is_not_changed_by_it(cfg, tmp_path, monkeypatch):
    """Hooks on a compiled graph would be ignored or break it; the recording runs beside it."""
    real, ends = torch.compile, []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, *, fullgraph, options: real(model, fullgraph=fullgraph, backend="aot_eager"),
    )
    short = cfg.model_copy(
        update={"train": cfg.train.model_copy(update={"max_steps": 4, "compile": True})}
    )
    short = short.model_copy(
        update={"schedule": cfg.schedule.model_copy(update={"warmup_steps": 2})}
    )
    for every in (0, 2):
        folder = tmp_path / f"every-{every}"
        train(fresh(traced(short, every), (), folder, only=FEW))
        ends.append(
            json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())[
                "files"
            ]["state.safetensors"]
        )
        assert steps_of(folder) == ([2, 4] if every else [])
    assert ends[0]["sha256"] == ends[1]["sha256"]


def test_a_line_holds_every_point_of_every_layer_with_what_it_was_computed_over(cfg, recorded):
    lines = list(RunDir(recorded).lines("points.jsonl"))
    assert steps_of(recorded) == [3, 6, 9, 12] and len(lines) % 4 == 0
    rows, later = (
        {line["point"]: line for line in lines if line["step"] == step} for step in (3, 6)
    )
    assert list(rows) == list(later)
    assert next(iter(rows)) == "embedding" and list(rows)[-1] == "final_norm"
    assert {row["layer"] for row in rows.values()} == {None, 0, 1}
    for slot in ("q_rotated", "scores", "entropy", "ffn.swiglu", "resid_out"):
        assert rows[f"layers.1.{slot}"]["stats"]["frac_nonfinite"] == 0.0
    support = rows["layers.1.ffn.swiglu"]["support"]
    assert (
        support["shape"] == [cfg.train.micro_batch_size, cfg.model.max_seq_len, cfg.model.d_ff]
        and support["dtype"] == "float32"
    )
    assert (
        rows["layers.1.ffn.swiglu"]["stats"]["std"] != later["layers.1.ffn.swiglu"]["stats"]["std"]
    )


def test_it_is_what_the_steps_own_forward_holds(small_cfg, dataset):
    """With dropout on: the same numbers, digit by digit, as hooks on the real step see
    in its first micro-batch.
    """
    state = build_state(small_cfg, dataset, torch.device("cpu"))
    batches = [state.data_loader.next_batch() for _ in range(small_cfg.accumulation())]
    assert small_cfg.model.dropout > 0 and len(batches) > 1
    before = digest(state)
    lines = points_log.points_lines(state, batches[0])
    assert digest(state) == before
    gatherer, seen = Gatherer(), set()

    def first(point, x):
        if point.name not in seen:
            seen.add(point.name)
            gatherer.see(point, x)

    with hook_points(state.model, None, first) as known:
        steps.train_step(state, batches)
    own = gatherer.finish()
    assert [r["point"] for r in lines] == [p.name for p in known if p.name in own]
    for row in lines:
        assert row["stats"] == own[row["point"]].as_dict(), row["point"]


def test_a_resumed_run_goes_on_with_its_history_and_may_change_the_interval(
    cfg, recorded, tmp_path, monkeypatch
):
    """Killed after step 7, begun again from step 4: the lines are those of the
    run that was never stopped.
    """
    original = loop.take_step

    def stops(trainer):
        original(trainer)
        if trainer.state.step == 7:
            raise Stopped("killed", exit_code=130)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "take_step", stops)
        train(fresh(traced(cfg, 3), (), folder, only=FEW))
    assert steps_of(folder) == [3, 6]
    shutil.copytree(folder, tmp_path / "other")
    few = lambda *given, **options: Gatekeeper(*given, **options | {"only": FEW})  # noqa: E731
    monkeypatch.setattr(start, "Gatekeeper", few)
    train(resume(folder, (), traced(cfg, 3)))
    assert (folder / "points.jsonl").read_bytes() == (recorded / "points.jsonl").read_bytes()
    assert (
        weights(folder)["model.safetensors"]["sha256"]
        == weights(recorded)["model.safetensors"]["sha256"]
    )
    changed = Override.model_validate(
        {"key": "trace.every", "value": 5, "from": "--set trace.every=5"}
    )
    train(resume(tmp_path / "other", [changed], traced(cfg, 5)))
    assert steps_of(tmp_path / "other") == [3, 5, 10]
    assert (
        weights(tmp_path / "other")["model.safetensors"]["sha256"]
        == weights(recorded)["model.safetensors"]["sha256"]
    )


def test_the_record_names_the_series_and_what_it_cost(plain, recorded):
    record = read_record(recorded / "metadata.json")
    assert (
        "points.jsonl" in [s.path for s in record.series]
        and 0 < record.metric("trace_overhead_frac") < 1
    )
    other = read_record(plain / "metadata.json")
    assert (
        "points.jsonl" not in [s.path for s in other.series]
        and "trace_overhead_frac" not in other.metrics
    )


@pytest.mark.parametrize("early", [False, True])
def test_a_run_that_ends_before_the_first_recording_records_its_last_step(cfg, tmp_path, early):
    """At the last step, and at one that turns out to be the last."""
    stop = Patience(patience=2, min_evaluations=2, min_delta_nats=100.0)
    changes = {"stop": stop, "eval": cfg.eval.model_copy(update={"every": 1})} if early else {}
    cfg = traced(cfg, 50).model_copy(update=changes)
    record = train(fresh(cfg, (), tmp_path / "run", only=("model.attention-logits",)))
    last = record.metrics["steps"].value
    assert steps_of(tmp_path / "run") == [last]
    assert (last < cfg.train.max_steps) == early
    assert [g.verdict for g in record.gates] == ["pass"]


def test_a_recording_that_leaves_something_behind_halts_the_run(cfg, tmp_path, monkeypatch):
    """The gate that holds evaluations to leave no trace holds this too."""
    original = points_log.points_lines

    def careless(state, batch):
        torch.rand(1)
        return original(state, batch)

    monkeypatch.setattr("stackproof.train.callbacks.points_lines", careless)
    with pytest.raises(GateFailed, match=r"leaves-no-trace.*the trace changed 1 of"):
        train(fresh(traced(cfg, 3), (), tmp_path / "run", only=FEW))


def test_recording_at_every_step_is_no_part_of_a_steps_time(cfg, tmp_path):
    """The second clock runs from the batch on: a recording between them would stand at
    half of a small model's step.
    """
    gates = ("runtime.clock", "model.live-points")
    record = train(fresh(traced(cfg, 1), (), tmp_path / "run", only=gates))
    gates = {g.id: g for g in record.gates}
    assert (
        record.status == "completed"
        and gates["runtime.clock"].verdict == "pass"
        and gates["model.live-points"].checks == cfg.train.max_steps
    )


class Heard(Callback):
    def __init__(self):
        self.said = []

    def on_message(self, text):
        self.said += [text] if "recording points" in text else []


@pytest.mark.parametrize(("times_a_step", "every"), [(1.0, 50), (0.01, None)])
def test_recordings_that_take_more_than_2_percent_are_said_once_with_the_interval_that_would_do(
    cfg, tmp_path, monkeypatch, times_a_step, every
):
    """The time of a recording is set against that of a step: one step each time is 100 % here,
    a hundredth is 1 %.
    """
    original, asked = callbacks.sparse_enough, []

    def measured(interval, recording_s, step_s):
        asked.append((interval, recording_s, step_s))
        return original(interval, times_a_step * step_s, step_s)

    monkeypatch.setattr(callbacks, "sparse_enough", measured)
    heard = Heard()
    train(fresh(traced(cfg, 1), (), tmp_path / "run", [heard], only=FEW))
    assert len(asked) == 1 and asked[0][0] == 1 and min(asked[0][1:]) > 0
    assert [said.rpartition("; ")[2] for said in heard.said] == (
        [f"trace.every = {every} keeps it within 2%"] if every else []
    )
