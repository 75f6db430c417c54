"""Checkpoints under kills, and what loading refuses."""

import base64
import errno
import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import torch

from stackproof import tensorfile
from stackproof.config import AdamW, Muon
from stackproof.spec.canonical import canonical_json, sha256_bytes
from stackproof.spec.errors import CheckpointError
from stackproof.subject.run import small_run
from stackproof.subject.training import advance
from stackproof.train import checkpoint, checkpoint_folders
from stackproof.train.state import build_state, crc32_by_name, differing, digest, live_crc32
from tests.processes import Command
from tests.subjects import TINY

CPU = torch.device("cpu")


def document(state, dataset):
    return checkpoint.state_document(
        state,
        tokenizer_sha256=dataset.tokenizer.sha256,
        vocab_size=dataset.tokenizer.vocab_size,
        gates={},
        record="train-20260101T000000Z-00000000",
    )


@pytest.fixture
def state(small_cfg, dataset):
    return build_state(small_run(small_cfg, TINY), dataset, CPU)


# In a process of its own: a fork copies pages as it touches them, and of forty forks of a worker
# late in the suite none came to save.
STORM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from stackproof.config import RunConfig
from stackproof.data.prepare import prepare
from stackproof.train import checkpoint, checkpoint_folders
from stackproof.train.state import build_state
from tests.processes import Command
from tests.train.test_checkpoint import document

cfg, root = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])
dataset = prepare(cfg.data)
state = build_state(cfg, dataset, torch.device("cpu"))
checkpoint.save(root, state, document(state, dataset))

def begun(n_saves):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b".")
        for n in range(n_saves):
            state.step = 1 + n % 4
            checkpoint.save(root, state, document(state, dataset))
            checkpoint_folders.retain(root, 2)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return child, time.monotonic()

child, began = begun(10)
assert os.waitpid(child, 0)[1] == 0
save_s = (time.monotonic() - began) / 10
draw, steps, ended = random.Random(3), [], []
for _ in range(40):
    child, _ = begun(10**9)
    time.sleep(draw.uniform(0, 3 * save_s))
    os.kill(child, signal.SIGKILL)
    ended.append(os.waitpid(child, 0)[1])
    steps.append(checkpoint.load(checkpoint.find(root)).state["step"])
print(json.dumps({"steps": steps, "ended": ended}))
"""


def test_forty_sigkills_during_saves_always_leave_a_good_checkpoint(small_cfg, dataset, tmp_path):
    """A child saves as fast as it can and is killed at random moments of its first three saves;
    whatever `latest` names always loads.
    """
    done = Command(
        small_run(small_cfg, TINY).model_dump_json(),
        str(tmp_path / "checkpoints"),
        folder=tmp_path,
        code=STORM,
    ).wait()
    assert done.code == 0, done.err
    assert set(done.json["ended"]) == {signal.SIGKILL}
    assert len(done.json["steps"]) == 40 and len(set(done.json["steps"])) > 1, (
        "the children did save"
    )


def test_retain_keeps_the_newest_the_best_and_nothing_torn(state, dataset, tmp_path):
    for step in range(1, 6):
        state.step = step
        folder = checkpoint.save(tmp_path, state, document(state, dataset))
        if step == 2:
            checkpoint_folders.point(tmp_path, "best", folder)
        (tmp_path / f".writing-step-{step}").mkdir()
        checkpoint_folders.retain(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "latest",
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]


def test_wrapper_prefixes_do_not_change_names(state, dataset, tmp_path):
    plain = checkpoint.model_tensors(state.model)
    wrapped = {f"_orig_mod.module.{n}": t for n, t in plain.items()}
    assert list(map(checkpoint.plain_name, wrapped)) == list(plain)
    checkpoint.load_model(state.model, {n: t.clone() for n, t in wrapped.items()})


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_model_are_refused(state, change):
    tensors = {n: t.clone() for n, t in checkpoint.model_tensors(state.model).items()}
    first = next(iter(tensors))
    match change:
        case "missing":
            del tensors[first]
        case "extra":
            tensors["more.weight"] = torch.zeros(1)
        case "shape":
            tensors[first] = tensors[first][:-1]
    with pytest.raises(CheckpointError, match="tensor"):
        checkpoint.load_model(state.model, tensors)


OPTIMS = {"adamw": AdamW(lr=3e-3), "muon": Muon(lr=3e-3, adamw_lr=1e-3)}


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_the_writer_receives_every_tensor_in_memory(small_cfg, dataset, optim):
    """Two independent walks over one state agree in names and bits; a part that only one of them
    holds is found.
    """
    state = build_state(small_run(small_cfg.model_copy(update={"optim": optim})), dataset, CPU)
    advance(state)
    written = {n: t for file in checkpoint.tensors_of(state).values() for n, t in file.items()}
    assert differing(crc32_by_name(written.items()), live_crc32(state)) == ()
    moment = next(n for n in written if n.startswith("optim."))
    del written[moment]
    assert differing(crc32_by_name(written.items()), live_crc32(state)) == (moment,)


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_restored_state_is_the_saved_one_in_every_part(small_cfg, dataset, tmp_path, optim):
    small_cfg = small_cfg.model_copy(update={"optim": optim})
    state = build_state(small_run(small_cfg), dataset, CPU)
    for _ in range(3):
        advance(state)
    expected = digest(state)
    checkpoint.save(tmp_path, state, document(state, dataset))
    fresh = build_state(small_run(small_cfg), dataset, CPU)
    assert digest(fresh) != expected
    with torch.no_grad():
        checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path)))
    got = digest(fresh)
    differing = {k for k in expected if expected[k] != got[k]}
    assert all(k.endswith(".lr") for k in differing), (
        "the rate is a function of the step and set before each update"
    )


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_a_restored_run_goes_on_bit_for_bit(small_cfg, dataset, tmp_path, optim):
    """Three steps, a save, three more; the restored state makes the same last three,
    with dropout on.
    """
    cfg = small_run(small_cfg.model_copy(update={"optim": optim}))
    state, fresh = (build_state(cfg, dataset, CPU) for _ in range(2))
    for _ in range(3):
        advance(state)
    checkpoint.save(tmp_path, state, document(state, dataset))
    expected = [advance(state) for _ in range(3)]
    with torch.no_grad():
        checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path)))
    assert [advance(fresh) for _ in range(3)] == expected and digest(fresh) == digest(state)


def test_the_state_of_another_optimizer_is_refused(small_cfg, dataset, tmp_path):
    mine, other = (
        build_state(small_run(small_cfg.model_copy(update={"optim": o}), TINY), dataset, CPU)
        for o in OPTIMS.values()
    )
    advance(mine)
    checkpoint.save(tmp_path, mine, document(mine, dataset))
    with torch.no_grad(), pytest.raises(CheckpointError, match="not this optimizer's"):
        checkpoint.restore(other, checkpoint.load(checkpoint.find(tmp_path)))


def test_a_restored_bandit_remembers_its_turns_and_draws_the_same_rows(
    small_cfg, dataset, tmp_path
):
    state, fresh = (build_state(small_run(small_cfg), dataset, CPU) for _ in range(2))
    for turn in range(6):
        advance(state)
        state.data_loader.sampler.reward(
            {n: 5.0 - (turn + i) / 7 for i, n in enumerate(dataset.sources)}
        )
    order, learnt = state.data_loader.sampler, state.data_loader.sampler.state_dict()
    checkpoint.save(tmp_path, state, document(state, dataset))
    assert fresh.data_loader.sampler.state_dict() != learnt and learnt["n_drops"] == 3
    with torch.no_grad():
        assert checkpoint.restore(fresh, checkpoint.load(checkpoint.find(tmp_path))) == [], (
            "no arm is dropped"
        )
    assert (
        fresh.data_loader.sampler.state_dict() == learnt
        and fresh.data_loader.sampler.focus == order.focus
    )
    for _ in range(12):
        assert (
            fresh.data_loader.next_batch().sample_ids == state.data_loader.next_batch().sample_ids
        )


@pytest.mark.parametrize("missing", ["the schema", "the key"])
def test_a_checkpoint_without_a_curriculum_is_refused(
    state, dataset, tmp_path, monkeypatch, missing
):
    whole = document(state, dataset)
    with monkeypatch.context() as former:
        if missing == "the schema":
            former.setattr(checkpoint, "SCHEMA", "stackproof/checkpoint/1")
        else:
            former.setattr(checkpoint, "STATE_KEYS", checkpoint.STATE_KEYS - {"curriculum"})
            del whole["curriculum"]
        folder = checkpoint.save(tmp_path, state, whole)
    with pytest.raises(
        CheckpointError,
        match="checkpoint/1" if missing == "the schema" else "lacks or adds keys\n.*curriculum",
    ):
        checkpoint.load(folder)


@pytest.fixture
def former(tmp_path):
    """A step folder written by the last code of the former version, a thousand parameters large;
    kept as text.
    """
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    for name, lines in json.loads(
        (Path(__file__).parent / "checkpoint_2.json").read_text()
    ).items():
        (folder / name).write_bytes(zlib.decompress(base64.b64decode("".join(lines))))
    return folder


@pytest.mark.parametrize(
    "damage", [None, "a weight", "a moment", "the end of a file", "one byte more"]
)
def test_the_former_version_is_read_and_verified_by_the_hashes_of_its_files(former, damage):
    folder = former
    if damage is None:
        loaded = checkpoint.load(folder)
        assert loaded.state["step"] == 2 and loaded.state["schema"] == checkpoint.FORMER[1]
        held = json.loads((folder / "manifest.json").read_bytes())["files"]
        found = {"model.safetensors": loaded.model, "state.safetensors": loaded.tensors}
        assert {
            f: {n: sha256_bytes(t.numpy().tobytes()) for n, t in ts.items()}
            for f, ts in found.items()
        } == {f: held[f]["tensors"] for f in found}
        return
    name, spoil = DAMAGES[damage]
    spoil(folder / name)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


def test_a_manifest_without_checksums_of_tensors_is_refused(state, dataset, tmp_path):
    folder = checkpoint.save(tmp_path, state, document(state, dataset))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["files"]["state.safetensors"]["crc32"]
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(
        CheckpointError, match=r"state\.safetensors: tensor .* does not match its checksum"
    ):
        checkpoint.load(folder)


def test_a_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def stored(root):
    """Every file below a folder of checkpoints, as bytes."""
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def flip(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return damage


def spread(path):
    """Put one more blank behind the header, as a writer with another padding would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )


DAMAGES = {
    "the first tensor's name": ("model.safetensors", flip(40)),
    "padding": ("model.safetensors", spread),
    "a weight": ("model.safetensors", flip(-2)),
    "a moment": ("state.safetensors", flip(-2)),
    "the end of a file": ("state.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-8])),
    "one byte more": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "the document": ("state.json", flip(5)),
    "the manifest": ("manifest.json", flip(5)),
}


@pytest.mark.parametrize("part", DAMAGES)
def test_what_the_disk_changes_after_the_write_is_found_before_latest_moves(
    state, dataset, tmp_path, monkeypatch, part
):
    """The damage comes with the rename, behind the back of the hashes:
    only reading again can see it.
    """
    checkpoint.save(tmp_path, state, document(state, dataset))
    before, replace, (name, damage) = stored(tmp_path), os.replace, DAMAGES[part]

    def damaging(source, target):
        replace(source, target)
        if os.path.basename(target) == "step-00000001":
            damage(target / name)

    state.step = 1
    with (
        monkeypatch.context() as torn,
        pytest.raises(CheckpointError, match=f"{name} was written and read back otherwise"),
    ):
        torn.setattr(os, "replace", damaging)
        checkpoint.save(tmp_path, state, document(state, dataset))
    assert stored(tmp_path) == before, "nothing of the failed save remains"
    checkpoint.save(tmp_path, state, document(state, dataset))
    assert checkpoint.load(checkpoint.find(tmp_path)).state["step"] == 1


@pytest.mark.parametrize("part", DAMAGES)
def test_what_the_disk_changes_later_is_refused_by_name(state, dataset, tmp_path, part):
    folder, (name, damage) = (
        checkpoint.save(tmp_path, state, document(state, dataset)),
        DAMAGES[part],
    )
    checkpoint.load(folder)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("function", ["_hash", "_sync", "_reserve", "crc32", "require_equal"])
def test_an_error_in_any_part_ends_the_save_and_loses_nothing(
    state, dataset, tmp_path, monkeypatch, function
):
    """A disk that fails while a file is reserved, written, hashed, synced or compared: the folder
    of the same step comes back.
    """
    checkpoint.save(tmp_path, state, document(state, dataset))
    before = stored(tmp_path)

    def failing(*given):
        raise OSError(errno.EIO, "Input/output error")

    with (
        monkeypatch.context() as broken,
        pytest.raises(CheckpointError, match="Input/output error"),
    ):
        broken.setattr(tensorfile, function, failing)
        checkpoint.save(tmp_path, state, document(state, dataset))
    assert stored(tmp_path) == before


def test_an_unreadable_file_is_a_checkpoint_error(state, dataset, tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path, state, document(state, dataset))

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(tensorfile, "digests", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Input/output error"):
        checkpoint.load(folder)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("at", range(1, 4))
def test_a_kill_between_any_two_renames_of_the_same_step_leaves_it_loadable(
    state, dataset, tmp_path, monkeypatch, at
):
    """The only checkpoint is replaced by its successor: aside, in place, pointer."""
    checkpoint.save(tmp_path, state, document(state, dataset))
    replace, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) == at:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(os, "replace", dying)
        checkpoint.save(tmp_path, state, document(state, dataset))
    assert checkpoint.load(checkpoint.find(tmp_path)).state["step"] == 0
    for _ in range(2):
        checkpoint.save(tmp_path, state, document(state, dataset))
    checkpoint_folders.retain(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000000"]


def test_weights_that_change_while_they_are_saved_are_noticed(
    state, dataset, tmp_path, monkeypatch
):
    """Another thread's update between the write and the comparison."""
    sync, parameter = os.fsync, next(state.model.parameters())

    def updating(descriptor):
        sync(descriptor)
        with torch.no_grad():
            parameter.view(-1)[0] += 1

    monkeypatch.setattr(os, "fsync", updating)
    with pytest.raises(CheckpointError, match="is not what was written"):
        checkpoint.save(tmp_path, state, document(state, dataset))
    assert stored(tmp_path) == {}


def test_a_loaded_checkpoint_stays_when_its_folder_goes(tmp_path, state, dataset):
    """As a parent that trains on deletes it while its child is judged."""
    folder = checkpoint.save(tmp_path, state, document(state, dataset))
    loaded = checkpoint.load(folder)
    shutil.rmtree(folder)
    assert crc32_by_name((loaded.model | loaded.tensors).items()) == live_crc32(state)
