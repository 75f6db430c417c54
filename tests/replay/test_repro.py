"""A red gate leaves a folder from which it turns red again: elsewhere, without corpus and cache,
by one command.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from stackproof.config import NeverStop
from stackproof.evidence import repro
from stackproof.museum.collection import museum_config, write_texts
from stackproof.museum.plant import load_museum
from stackproof.replay import bundle as bundles
from stackproof.replay import replay as replaying
from stackproof.replay.bundle import ReproRecorder
from stackproof.replay.replay import replay
from stackproof.spec.canonical import sha256_bytes, to_jsonable
from stackproof.spec.errors import DataError, EnvironmentUnfit, GateFailed, IntegrityError
from stackproof.train import loop, memory
from stackproof.train.loop import train
from stackproof.train.start import fresh
from tests.processes import Command

PLANTED = (
    "import sys\nfrom stackproof.cli import main\nfrom stackproof.museum.plant import load_museum\n"
    "with load_museum()[sys.argv[1]].apply():\n    main(['gates', 'repro', sys.argv[2], "
    "'--json'])\n"
)
# plant, gate, where the replay begins
CASES = [
    ("runtime.nan-in-a-weight", "runtime.finite", 0),
    ("runtime.labels-all-masked", "data.rows", 0),
    ("runtime.update-skipped", "optim.movement", 0),
    ("runtime.placeholder-loss", "runtime.loss-not-constant", 0),
    ("runtime.lr-spike", "runtime.loss-spike", 14),
    ("runtime.monitor-on-another-runner", "runtime.cadence", 0),
    ("sampling.monitor-blind", "sampling.coherence", 7),
    ("model.branch-dies", "model.live-points", 0),
]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """The museum's run on texts of its own, which a test can take away."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    cfg = museum_config(folder)
    return cfg.model_copy(
        update={"stop": NeverStop(), "trace": cfg.trace.model_copy(update={"every": 2})}
    )


def broken(cfg, plant: str, gate: str, folder: Path) -> Path:
    """The bundle of a run that a plant turned red."""
    torch.set_num_threads(1)
    with load_museum()[plant].apply(), pytest.raises(GateFailed, match=gate):
        train(fresh(cfg, (), folder / "run", [ReproRecorder()], only=(gate,)))
    (found,) = (folder / "run" / "repro").iterdir()
    assert found.name.startswith(f"{gate}-step-")
    return found


@pytest.mark.parametrize(("plant", "gate", "base"), CASES)
def test_the_same_gate_is_red_again_with_the_same_figures_and_green_without_the_plant(
    cfg, tmp_path, plant, gate, base
):
    """Digit by digit, in this process; measured difference 0 for all of them."""
    folder = broken(cfg, plant, gate, tmp_path)
    held = repro.read_bundle(folder)
    assert (
        held.base.step == base
        and held.gate == gate
        and held.step == held.steps[-1].step
        and not held.lacking
    )
    with load_museum()[plant].apply():
        _, planted = replay(folder)
    assert (
        planted.reproduced
        and planted.same
        and planted.step == held.step
        and planted.same_random_state
    )
    _, clean = replay(folder)
    assert not clean.reproduced and not clean.same and clean.verdict.outcome == "pass"


def test_on_another_machine_one_command_turns_it_red(cfg, tmp_path):
    """Another folder, another process, an empty cache, and neither run nor corpus:
    exit 4 with the plant, 0 without it.
    """
    own = cfg.model_copy(update={"seed": 12})
    folder = broken(own, "runtime.nan-in-a-weight", "runtime.finite", tmp_path)
    elsewhere = tmp_path / "elsewhere" / "bundle"
    shutil.copytree(folder, elsewhere)
    shutil.rmtree(tmp_path / "run")
    environment = os.environ | {
        "STACKPROOF_CACHE": str(tmp_path / "no-cache"),
        "HOME": str(tmp_path),
    }
    place = {"folder": elsewhere.parent, "environment": environment}
    red = Command("runtime.nan-in-a-weight", "bundle", code=PLANTED, **place).wait()
    assert red.code == 4, red.err
    said = json.loads(red.out.splitlines()[0])
    assert (
        said["reproduced"]
        and said["same"]
        and said["step_now"] == 7
        and said["measured"]["loss_nats"] == "nan"
    )
    assert "runtime.finite failed: reproduced" in red.err
    green = Command("gates", "repro", "bundle", **place).wait()
    assert green.code == 0 and "not reproduced: runtime.finite is green" in green.out, green.err
    assert not (tmp_path / "no-cache").exists()


def test_a_bundle_of_a_run_that_was_resumed_begins_at_its_checkpoint(cfg, tmp_path):
    """The fault comes ten steps after the resume: the state, the watcher and the rows are
    those of the resumed run.
    """
    short = cfg.model_copy(update={"train": cfg.train.model_copy(update={"max_steps": 14})})
    train(fresh(short, (), tmp_path / "parent", [ReproRecorder()], only=("runtime.loss-spike",)))
    with load_museum()["runtime.lr-spike"].apply(), pytest.raises(GateFailed):
        train(
            fresh(
                cfg,
                (),
                tmp_path / "run",
                [ReproRecorder()],
                parent=tmp_path / "parent",
                only=("runtime.loss-spike",),
            )
        )
    (folder,) = (tmp_path / "run" / "repro").iterdir()
    shutil.rmtree(tmp_path / "parent")
    held = repro.read_bundle(folder)
    assert held.continued and held.base.step == 14 and held.base.kind == "checkpoint"
    with load_museum()["runtime.lr-spike"].apply():
        assert replay(folder)[1].same


def test_an_evaluation_is_replayed_on_the_held_out_rows_of_the_bundle(cfg, tmp_path, monkeypatch):
    """Held-out loss five times what it was, at step 14; replayed from the state of step 7."""
    original = loop.held_out_loss

    def diverging(trainer):
        result = original(trainer)
        return dataclasses.replace(
            result, loss_nats=result.loss_nats * (5 if trainer.state.step == 14 else 1)
        )

    monkeypatch.setattr(loop, "held_out_loss", diverging)
    with pytest.raises(GateFailed, match="divergence"):
        train(fresh(cfg, (), tmp_path / "run", [ReproRecorder()], only=("evaluation.divergence",)))
    folder = tmp_path / "run" / "repro" / "evaluation.divergence-step-14"
    assert repro.read_bundle(folder).n_held_out >= cfg.eval.batches
    assert replay(folder)[1].same
    monkeypatch.undo()
    assert not replay(folder)[1].reproduced
    for n in (0, 1):
        copy = copied(
            folder, tmp_path / str(n), lambda document, n=n: document.update(n_held_out=n)
        )
        with pytest.raises(IntegrityError, match="other held-out rows than its run"):
            replay(copy)


@pytest.mark.parametrize("plant", ["data.window-drawn-twice", "data.position-skips"])
def test_what_was_drawn_wrongly_is_in_the_bundle_and_needs_no_plant(cfg, tmp_path, plant):
    """The fault lies in the rows or their position, and these are there:
    the gate of the draw is red again on clean code.
    """
    folder = broken(cfg, plant, "data.rows", tmp_path)
    assert replay(folder)[1].same


def test_a_gate_that_only_warns_leaves_a_bundle_and_the_run_goes_on(cfg, tmp_path, monkeypatch):
    from stackproof.contracts import memorization
    from stackproof.contracts.gate import failed, passed

    def warn(self, event):
        return (
            failed("said so", found_frac=0.5, at=event.step)
            if event.step >= 4
            else passed("", found_frac=0.0)
        )

    monkeypatch.setattr(memorization.Memorized, "observe", warn)
    record = train(
        fresh(cfg, (), tmp_path / "run", [ReproRecorder()], only=("sampling.memorised",))
    )
    assert record.status == "completed" and record.gates[0].verdict == "fail"
    (folder,) = (tmp_path / "run" / "repro").iterdir()
    assert folder.name == "sampling.memorised-step-4", "the first time, and once"
    assert any(o.path == f"repro/{folder.name}/repro.json" for o in record.outputs)
    assert replay(folder)[1].same
    monkeypatch.undo()
    assert not replay(folder)[1].reproduced


def test_a_bundle_holds_rows_state_names_and_the_command(cfg, tmp_path):
    import safetensors.torch

    folder = broken(cfg, "runtime.nan-in-a-weight", "runtime.finite", tmp_path)
    held, tensors = repro.read_bundle(folder), safetensors.torch.load_file(folder / repro.TENSORS)
    assert (
        held.nonfinite["parameters"]
        and held.measured["loss_nats"] == "nan"
        and held.command[:3] == ("stack", "gates", "repro")
    )
    assert [s.step for s in held.steps] == list(range(1, 8)) and len(
        held.steps[-1].batches
    ) == cfg.accumulation()
    rows = tensors["step-00000007.0.input_ids"]
    assert (
        rows.shape == (cfg.train.micro_batch_size, cfg.model.max_seq_len) and "rng.cpu" in tensors
    )
    assert len(held.code.commit) in (7, 40) and held.config == json.loads(json.dumps(cfg.to_dict()))
    assert {"tokenizer.json", "tensors.safetensors"} <= set(held.files)


def test_a_bundle_holds_what_the_points_held_and_a_model_that_cannot_run_spoils_no_verdict(
    cfg, tmp_path, monkeypatch
):
    folder = broken(cfg, "runtime.nan-in-a-weight", "runtime.finite", tmp_path)
    lines = [json.loads(line) for line in (folder / repro.POINTS).read_bytes().splitlines()]
    broken_at = [line["point"] for line in lines if line["stats"]["frac_nonfinite"] > 0]
    assert {line["step"] for line in lines} == {7} and not repro.read_bundle(folder).no_points
    assert lines[-1]["point"] == "final_norm" and broken_at[0] == lines[0]["point"] == "embedding"

    def broken_device(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(bundles, "points_lines", broken_device)
    (tmp_path / "again").mkdir()
    folder = broken(cfg, "runtime.nan-in-a-weight", "runtime.finite", tmp_path / "again")
    assert (
        "device-side assert" in repro.read_bundle(folder).no_points
        and not (folder / repro.POINTS).exists()
    )


def test_a_changed_or_foreign_bundle_is_refused(cfg, tmp_path):
    folder = broken(cfg, "runtime.update-skipped", "optim.movement", tmp_path)
    document = json.loads((folder / repro.DOCUMENT).read_text())
    (folder / repro.DOCUMENT).write_text(json.dumps(document | {"surprise": 1}))
    with pytest.raises(IntegrityError, match="surprise"):
        repro.read_bundle(folder)
    (folder / repro.DOCUMENT).write_text(json.dumps(document | {"schema": "stackproof/repro/2"}))
    with pytest.raises(IntegrityError, match="schema"):
        repro.read_bundle(folder)
    files = {n: f for n, f in document["files"].items() if n != repro.TENSORS}
    (folder / repro.DOCUMENT).write_text(json.dumps(document | {"files": files}))
    with pytest.raises(IntegrityError, match=f"states no hash of {repro.TENSORS}"):
        repro.read_bundle(folder)
    (folder / repro.DOCUMENT).write_text(json.dumps(document))
    data = bytearray((folder / repro.TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / repro.TENSORS).write_bytes(data)
    with pytest.raises(IntegrityError, match="was changed"):
        replay(folder)
    with pytest.raises(DataError, match="not a repro bundle"):
        repro.read_bundle(tmp_path)


@pytest.fixture(scope="module")
def sound(cfg, tmp_path_factory):
    """A bundle of which tests damage copies."""
    return broken(cfg, "runtime.update-skipped", "optim.movement", tmp_path_factory.mktemp("sound"))


def copied(sound: Path, folder: Path, change) -> Path:
    """A copy of a bundle with `change(document)`."""
    shutil.copytree(sound, copy := folder / "bundle")
    document = json.loads((copy / repro.DOCUMENT).read_text())
    change(document)
    (copy / repro.DOCUMENT).write_text(json.dumps(document))
    return copy


WATCHED = ("gates", "optim.movement")


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        *((("plan", "sources"), value, "plan.sources") for value in (None, 5, "x")),
        (("plan", "sources"), ["x"], "plan.sources.0"),
        (("plan", "cursor"), None, "plan.cursor"),
        (("plan", "intervals"), {"Saved": 5}, "plan.intervals.Saved"),
        *((WATCHED, value, "gates.optim.movement") for value in (5, "x")),
        *(((*WATCHED, "checks"), v, "movement.checks") for v in (None, "1", [], {})),
        ((*WATCHED, "watcher"), 5, "movement.watcher"),
        (("gates",), {}, "gates does not hold the state of optim.movement"),
        (("threads",), 20_000, "threads: Input should be less than or equal to 1024"),
        (("n_held_out",), 10**400, "n_held_out"),
        (("measured",), {"found_frac": "half"}, "measured"),
        (("measured",), {"found_frac": 10**400}, "measured"),
        *(
            (("peak_flops",), v, "peak_flops")
            for v in (10**400, "9" * 41, "1e20", "Infinity", "-5")
        ),
        (("steps", 0, "batches", 0, "epoch"), "1", "steps.0.batches.0.epoch"),
        (("record",), "train", "record"),
        (("files", "a\0b"), {"sha256": "0" * 64, "bytes": 1}, "files"),
    ],
)
def test_a_mistyped_value_is_refused_with_its_field(sound, tmp_path, place, value, field):
    def change(document):
        *way, last = place
        for key in way:
            document = document[key]
        document[last] = value

    with pytest.raises(IntegrityError, match=field) as caught:
        replay(copied(sound, tmp_path, change))
    assert "repro.json" in caught.value.what and "copy the whole" in caught.value.next_step


def test_a_figure_beyond_the_whole_numbers_of_json_is_read_back_as_it_was(sound, tmp_path):
    """As the operations of one step of a large model, which canonical JSON writes as text."""
    figures = {"flops_per_step": 2e16, "peak_flops": 3e15, "limits": {"a": -5e17}}
    copy = copied(sound, tmp_path, lambda document: document.update(to_jsonable(figures)))
    held = repro.read_bundle(copy)
    assert {name: getattr(held, name) for name in figures} == figures


def test_a_step_is_replayed_once(sound, tmp_path):
    def change(document):
        document["steps"] *= 2

    with pytest.raises(IntegrityError, match=r"field steps: .*the steps do not ascend"):
        replay(copied(sound, tmp_path, change))


def test_the_vocabulary_is_that_of_the_tokenizer(sound, tmp_path):
    def change(document):
        document["vocab_size"] = 2**31 - 1

    with pytest.raises(IntegrityError, match="field vocab_size is not that of"):
        replay(copied(sound, tmp_path, change))


def test_a_sample_that_takes_for_ever_is_refused_and_one_that_is_not_drawn_does_no_harm(
    cfg, sound, tmp_path, monkeypatch
):
    def change(document):
        document["config"]["sample"]["max_new_tokens"] = 10**9

    sampled = broken(cfg, "sampling.monitor-blind", "sampling.coherence", tmp_path / "sampled")
    drawn = copied(sampled, tmp_path / "drawn", change)
    with pytest.raises(IntegrityError, match="max_new_tokens is above what a replay draws"):
        replay(drawn)
    assert replay(copied(sound, tmp_path, change))[1].verdict.passed
    monkeypatch.setattr(replaying, "MAX_SAMPLE_TOKENS", cfg.sample.max_new_tokens)
    assert replay(sampled)[1].verdict.passed


def test_memory_is_that_of_the_device_of_the_replay(sound, monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)
    assert replay(sound)[1].verdict.passed
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    with pytest.raises(EnvironmentUnfit, match=r"the replay of .* does not fit into memory"):
        replay(sound)


FIRST = "step-00000001.0.input_ids"
ROWS_OF_OTHERS = {
    "missing": (lambda rows: None, "are {'labels'"),
    "flat": (lambda rows: rows.flatten(), "are {"),
    "empty": (lambda rows: rows[:0], "are {"),
    "fewer": (lambda rows: rows[:1], "are {"),
    "floats": (lambda rows: rows.float(), "are {'input_ids': 'float32"),
    "outside": (lambda rows: rows + 100_000, "outside the vocabulary"),
    "negative": (lambda rows: rows - 1000, "outside the vocabulary"),
}


@pytest.mark.parametrize("kind", ROWS_OF_OTHERS)
def test_rows_that_no_run_draws_are_refused(sound, tmp_path, kind):
    import safetensors.torch

    spoil, why = ROWS_OF_OTHERS[kind]
    tensors = safetensors.torch.load_file(sound / repro.TENSORS)
    if (rows := spoil(tensors.pop(FIRST))) is not None:
        tensors[FIRST] = rows.contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    refused(sound, tmp_path, data, f"step-00000001.0 of {repro.TENSORS} .*{why}")


def test_more_rows_than_the_configuration_draws_are_refused(sound, tmp_path):
    import safetensors.torch

    tensors = safetensors.torch.load_file(sound / repro.TENSORS)
    for name in [n for n in tensors if n.startswith("step-00000001.0.")]:
        tensors[name] = tensors[name].repeat(20, 1)
    safetensors.torch.save_file(tensors, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    refused(sound, tmp_path, data, "the configuration draws at most")


@pytest.mark.parametrize("label", [-1, -99, -101])
def test_labels_between_ignored_and_an_id_are_refused(sound, tmp_path, label):
    import safetensors.torch

    tensors = safetensors.torch.load_file(sound / repro.TENSORS)
    tensors[FIRST.replace("input_ids", "labels")][0, 0] = label
    data = safetensors.torch.save(tensors)
    refused(sound, tmp_path, data, f"step-00000001.0 of {repro.TENSORS} .*outside the vocabulary")


def test_tensors_of_another_format_are_refused(sound, tmp_path):
    refused(sound, tmp_path, b"x" * 100, "cannot read .*tensors.safetensors")


def refused(sound: Path, folder: Path, data: bytes, why: str) -> None:
    """Replaying a bundle with other tensors, of the stated hash, is an IntegrityError."""

    def change(document):
        document["files"][repro.TENSORS]["sha256"] = sha256_bytes(data)

    copy = copied(sound, folder, change)
    (copy / repro.TENSORS).write_bytes(data)
    with pytest.raises(IntegrityError, match=why):
        replay(copy)


def test_what_is_too_large_is_not_copied_and_said(cfg, tmp_path, monkeypatch):
    """Rows beyond the budget are dropped from the oldest on; of a large state the place is named,
    and --base gives it.
    """
    monkeypatch.setattr(bundles, "CHECKPOINT_BYTES_MAX", 1000)
    folder = broken(cfg, "runtime.lr-spike", "runtime.loss-spike", tmp_path)
    held = repro.read_bundle(folder)
    assert (
        held.base.kind == "elsewhere"
        and held.base.path.endswith("step-00000014")
        and not (folder / "checkpoint").exists()
    )
    with pytest.raises(DataError, match="too large to copy"):
        replay(folder)
    with load_museum()["runtime.lr-spike"].apply():
        assert replay(folder, base=Path(held.base.path))[1].same
    row_bytes = 4 * cfg.train.tokens_per_step * 3
    monkeypatch.setattr(bundles, "ROWS_BYTES_MAX", 2 * row_bytes)
    (tmp_path / "again").mkdir()
    folder = broken(cfg, "runtime.nan-in-a-weight", "runtime.finite", tmp_path / "again")
    assert [s.step for s in repro.read_bundle(folder).steps] == [6, 7]
    assert (folder / repro.TENSORS).stat().st_size < 2 * row_bytes + 20_000, (
        "random state and header are 20 kB"
    )
    with pytest.raises(DataError, match="first 5 steps"):
        replay(folder)


def test_a_full_disk_spoils_no_verdict(cfg, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles.safetensors.torch, "save_file", full)
    with (
        load_museum()["runtime.update-skipped"].apply(),
        pytest.raises(GateFailed, match="optim"),
    ):
        train(fresh(cfg, (), tmp_path / "run", [ReproRecorder()], only=("optim.movement",)))
    assert list((tmp_path / "run" / "repro").iterdir()) == []
    assert "repro_failed" in (tmp_path / "run" / "events.jsonl").read_text()
