"""The sharded layout in one process: what its files must be, and that nothing else is read."""

import errno
import json
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import hf_storage

from stackproof import tensorfile
from stackproof.config import load_config
from stackproof.contracts.gate import call_check
from stackproof.contracts.subject import Subject
from stackproof.distributed.ranks import ONE_PROCESS
from stackproof.spec.canonical import sha256_bytes
from stackproof.spec.errors import CheckpointError
from stackproof.subject.checkpoints import (
    PartInMemory,
    ReadShards,
    WrittenShards,
    _stored_crc32,
    parts_in_memory,
)
from stackproof.subject.run import small_run
from stackproof.train import checkpoint, sharded_checkpoint
from stackproof.train.state import TrainState, build_state
from tests.subjects import TINY
from tests.train.test_checkpoint import document

CPU = torch.device("cpu")
FILE = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def state(small_cfg, dataset) -> TrainState:
    cfg = load_config(small_cfg, fixed={"checkpoint.layout": ("sharded", "test")})[0]
    return build_state(small_run(cfg, TINY), dataset, CPU)


@pytest.fixture
def folder(state, dataset, tmp_path):
    return checkpoint.save(tmp_path, state, document(state, dataset))


@pytest.fixture
def saved(state, folder):
    (folder.parent / "latest").unlink()  # in a run it moves after the verdict
    return WrittenShards(folder, 0, True, parts_in_memory(state), ONE_PROCESS)


def judged(spec, saved):
    return call_check(spec.gates["checkpoint.reloads"], Subject(saved=saved.read()))


# --- layout ---------------------------------------------------------------------------------------


def test_a_folder_holds_one_file_and_no_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", FILE, "state.json"]
    assert checkpoint.layout_in(folder) == "sharded"
    assert checkpoint.weights_file(folder) == folder / "manifest.json"


def test_layouts_turn_into_each_other_and_back(folder, tmp_path):
    loaded = checkpoint.load(folder)
    found = loaded
    for number, layout in enumerate(("single", "sharded", "single"), start=1):
        root = tmp_path / str(number)
        found = checkpoint.load(checkpoint.write(root, checkpoint.snapshot_of(found, layout)))
        assert checkpoint.layout_in(found.path) == layout
        assert found.state == loaded.state
        for a, b in ((found.model, loaded.model), (found.tensors, loaded.tensors)):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    first, last = (tmp_path / n / "step-00000000" for n in ("1", "3"))
    assert [p.read_bytes() for p in sorted(first.iterdir())] == [
        p.read_bytes() for p in sorted(last.iterdir())
    ]


def test_a_tensor_file_that_no_manifest_declares_is_refused(folder):
    other = folder / "shard-00002-model-00001-of-00001.safetensors"
    tensorfile.write(other, {"embed.weight": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="is not a file of this checkpoint"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "model.safetensors", "shard-1.safetensors"])
def test_a_manifest_names_only_files_of_its_layout(folder, name):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = manifest["files"][FILE]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a manifest"):
        checkpoint.load(folder)


def shard(folder, number: int, parts: dict[str, tuple[Tensor, list]]) -> None:
    places = {name: {"saved_offsets": offset} for name, (_, offset) in parts.items()}
    path = folder / f"shard-{number:05}-model-00001-of-00001.safetensors"
    metadata = {"DCP_SHARDING_INFO": json.dumps(places)}
    tensorfile.write(path, {name: tensor for name, (tensor, _) in parts.items()}, metadata)


def test_parts_of_two_files_are_one_tensor(tmp_path):
    shard(tmp_path, 1, {"a": (torch.zeros(2, 3), [0, 0]), "b": (torch.tensor(1.0), [])})
    shard(tmp_path, 2, {"a": (torch.ones(1, 3), [2, 0])})
    targets = sharded_checkpoint.empty(tmp_path)
    sharded_checkpoint.read(tmp_path, targets)
    assert targets["a"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert targets["b"].item() == 1


@pytest.mark.parametrize(
    ("tensor", "offset"),
    [
        (torch.ones(1, 3), [3, 0]),  # a gap
        (torch.ones(2, 3), [1, 0]),  # an overlap
        (torch.zeros(2, 3), [0, 0]),  # a repeated part
        (torch.ones(1, 3).double(), [2, 0]),  # another type
        (torch.ones(1, 3), [-2, 0]),
        (torch.ones(1, 3), [2]),
        (torch.ones(1, 3), [True, 0]),
        (torch.ones(1, 3), "20"),
    ],
)
def test_parts_that_are_not_a_whole_tensor_are_refused(tmp_path, tensor, offset):
    shard(tmp_path, 1, {"a": (torch.zeros(2, 3), [0, 0])})
    shard(tmp_path, 2, {"a": (tensor, offset)})
    with pytest.raises(CheckpointError):
        sharded_checkpoint.parts(tmp_path)


def test_an_overlap_does_not_make_up_for_a_gap(tmp_path):
    """Three parts have as many elements as the tensor, and no two begin at the same place."""
    for number, first in enumerate((0, 1, 4), start=1):
        shard(tmp_path, number, {"a": (torch.zeros(2, 3), [first, 0])})
    with pytest.raises(CheckpointError, match="are not a whole one"):
        sharded_checkpoint.parts(tmp_path)


def test_headers_are_verified_with_the_hashes(folder):
    """A writer that leaves a part out declares the file as it is."""
    shard(folder, 1, {"a": (torch.zeros(2, 3), [1, 0])})
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    sha256, checksums = tensorfile.digests(folder / FILE)
    n_bytes = (folder / FILE).stat().st_size
    manifest["files"][FILE] = {"sha256": sha256, "bytes": n_bytes, "crc32": checksums}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="are not a whole one"):
        checkpoint.verify(folder)


def test_a_file_that_cannot_be_read_is_a_checkpoint_error(folder, monkeypatch):
    def refused(*arguments, **named):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hf_storage.HuggingFaceStorageReader, "_process_read_request", refused)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error"):
        checkpoint.load(folder)


def test_a_part_that_several_ranks_hold_takes_room_once(saved, state):
    tensors = {"a": torch.zeros(1000)}
    two = SimpleNamespace(sizes=SimpleNamespace(world_size=2))
    snapshot = sharded_checkpoint.ShardedSnapshot(0, tensors, b"", two)
    assert snapshot.n_bytes == 2000
    assert replace(snapshot, ranks=ONE_PROCESS).n_bytes == 4000


# --- gate -----------------------------------------------------------------------------------------


def test_the_gate_is_green_on_a_real_save(spec, saved):
    verdict = judged(spec, saved)
    assert verdict.outcome == "pass", verdict.message
    assert verdict.measured["compared"] == len(saved.held) > 10


def test_the_gate_is_red_on_one_flipped_bit(spec, saved):
    path = saved.folder / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    verdict = judged(spec, saved)
    assert verdict.measured["differing"] == 1
    assert f"the manifest does not describe {FILE}" in verdict.message


def test_the_gate_is_red_on_a_part_in_another_place(spec, saved):
    """The bytes are right, and the header states that they belong elsewhere."""
    path = saved.folder / FILE
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    places["embed.weight"]["saved_offsets"] = [1, 0]
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])
    manifest = saved.folder / "manifest.json"
    document = json.loads(manifest.read_bytes())
    document["files"][FILE]["sha256"] = sha256_bytes(path.read_bytes())
    manifest.write_text(json.dumps(document))
    verdict = judged(spec, saved)
    assert verdict.outcome == "fail" and verdict.measured["differing"] == 1
    assert "embed.weight" in verdict.message


def test_the_gate_is_red_on_wrong_files_and_steps(spec, saved):
    assert "has step 0, saved was 1" in judged(spec, replace(saved, step=1)).message
    assert "two tensors" in judged(spec, replace(saved, live_tied=False)).message
    (saved.folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert "undeclared files: optimizer.pt" in judged(spec, saved).message
    (saved.folder / "optimizer.pt").unlink()
    (saved.folder / FILE).unlink()
    assert f"lacks {FILE}" in judged(spec, saved).message


def test_the_gate_is_red_on_a_tensor_that_is_left_out(spec, saved):
    more = PartInMemory("head.weight", (0,), (2,), 1)
    verdict = judged(spec, replace(saved, held=[*saved.held, more]))
    assert verdict.outcome == "fail" and "head.weight" in verdict.message


def test_the_gate_is_red_where_two_ranks_hold_other_parts(spec, saved):
    (own,) = saved.read().found
    name = next(iter(own[0]))
    other = (dict(own[0]) | {name: 1}, own[1], {})
    for found in ([own, other], [other, own]):
        both = SimpleNamespace(read=lambda found=found: replace(saved.read(), found=found))
        verdict = judged(spec, both)
        assert verdict.outcome == "fail" and "two processes hold 1 other tensor" in verdict.message
    both = SimpleNamespace(read=lambda: replace(saved.read(), found=[own, (*own[:2], {})]))
    assert isinstance(both.read(), ReadShards) and judged(spec, both).passed


@given(st.data())
def test_any_part_is_read_from_any_division(data):
    """Rows and columns of a tensor, cut into a grid of files: every box has the bytes of the slice,
    and none if a file is missing that it needs.
    """
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    whole = np.arange(shape[0] * shape[1], dtype="<f4").reshape(shape)
    edges = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    stored = []
    for top, bottom in zip(edges[0], edges[0][1:]):
        for left, right in zip(edges[1], edges[1][1:]):
            part = np.ascontiguousarray(whole[top:bottom, left:right])
            entry = {
                "dtype": "F32",
                "shape": part.shape,
                "place": (top, left),
                "data_offsets": (0, part.nbytes),
            }
            stored.append((memoryview(part.tobytes()), entry))
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape)]
    box = np.ascontiguousarray(whole[low[0] : high[0], low[1] : high[1]])
    wanted = PartInMemory("a", tuple(low), box.shape, 0)
    assert _stored_crc32(wanted, stored) == zlib.crc32(box)
    ends = [(e["place"], [p + n for p, n in zip(e["place"], e["shape"])]) for _, e in stored]
    needed = [
        number
        for number, (first, last) in enumerate(ends)
        if all(a < z and f < b for a, b, f, z in zip(low, high, first, last))
    ]
    missing = data.draw(st.sampled_from(needed))
    assert _stored_crc32(wanted, stored[:missing] + stored[missing + 1 :]) is None
