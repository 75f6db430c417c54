"""Strict safetensors files: equal content is equal bytes, and nothing ambiguous is read."""

import errno
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackproof import tensorfile
from stackproof.spec.canonical import sha256_bytes
from stackproof.tensorfile import BadTensorFile


def make(path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    """The library's own metadata order changes from process to process; ours must not."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from stackproof import tensorfile\n"
        "tensorfile.write(Path(sys.argv[1]), {'b': np.arange(3), 'a': np.ones(2, np.float32)}, "
        "{'z': '1', 'y': '2', 'x': '3'})"
    )
    for n in range(6):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(n))], check=True)
    assert len({(tmp_path / str(n)).read_bytes() for n in range(6)}) == 1
    header = tensorfile.read_header(tmp_path / "0")
    assert header.metadata == {"x": "3", "y": "2", "z": "1"} and set(header.tensors) == {"a", "b"}


def test_what_is_written_the_library_reads(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float32),
        "one": np.array(1.5),
    }
    tensorfile.write(tmp_path / "f", arrays, {})
    loaded = safetensors.numpy.load_file(tmp_path / "f")
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array) and np.array_equal(
            tensorfile.memmap(tmp_path / "f", name), array
        )


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        (b" " + json.dumps({"a": ENTRY}).encode(), b"xy", "begin with"),
        (
            (
                b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":'
                b'[2],"data_offsets":[0,2]}}'
            ),
            b"xy",
            "twice",
        ),
        (json.dumps({"a": ENTRY}).encode(), b"xyz", "truncated or padded"),
        (json.dumps({"a": ENTRY}).encode(), b"x", "truncated or padded"),
        (json.dumps({"a": ENTRY, "b": ENTRY}).encode(), b"xy", "gap or overlap"),
        (json.dumps({"a": ENTRY | {"data_offsets": [1, 3]}}).encode(), b"wxy", "gap or overlap"),
        (json.dumps({"a": ENTRY | {"shape": [3]}}).encode(), b"xy", "its shape needs"),
        (json.dumps({"a": ENTRY | {"dtype": "F99"}}).encode(), b"xy", "not valid"),
        (b"{not json", b"", "not valid"),
        (b"[" * 50_000, b"", "begin with|not valid"),
    ],
)
def test_ambiguous_or_damaged_files_are_refused(tmp_path, header, body, says):
    make(tmp_path / "f", header, body)
    with pytest.raises(BadTensorFile, match=says):
        tensorfile.read_header(tmp_path / "f")


@pytest.mark.parametrize(
    ("start", "says"),
    [(b"PK\x03\x04", "zip"), (b"\x80\x04\x95", "pickle"), (b"abc", "only 3 bytes")],
)
def test_foreign_formats_are_named(tmp_path, start, says):
    (tmp_path / "f").write_bytes(
        start if len(start) == 3 and start == b"abc" else start + b"\0" * 64
    )
    with pytest.raises(BadTensorFile, match=says):
        tensorfile.read_header(tmp_path / "f")


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(BadTensorFile, match="claims"):
        tensorfile.read_header(tmp_path / "f")


def test_a_header_of_any_length_is_read(tmp_path):
    """The length is the file's first bytes: 384 looks like a pickle, 19,280 like a zip,
    and both are sound.
    """
    for filler in [*range(0, 512, 4), *range(19_200, 19_300, 4)]:
        tensorfile.write(tmp_path / "f", {"a": np.arange(4)}, {"filler": "x" * filler})
        assert tensorfile.memmap(tmp_path / "f", "a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"shape": [-1, -2]},
        {"shape": [2.0]},
        {"data_offsets": [0.0, 2.0]},
        {"data_offsets": [0, 2, 4]},
        {"shape": [True, 2]},
        {"more": 1},
    ],
)
def test_shapes_and_offsets_are_counts_that_do_not_wrap_around(tmp_path, fields):
    """2^32 by 2^32 bytes are 0 in 64 bits; -1 by -2 are 2."""
    body = b"" if fields.get("data_offsets") == [0, 0] else b"xy"
    make(tmp_path / "f", json.dumps({"a": ENTRY | fields}).encode(), body)
    with pytest.raises(BadTensorFile, match="not valid"):
        tensorfile.read_header(tmp_path / "f")


def test_metadata_are_strings(tmp_path):
    make(tmp_path / "f", json.dumps({"a": ENTRY, "__metadata__": {"n": 1}}).encode(), b"xy")
    with pytest.raises(BadTensorFile, match="metadata"):
        tensorfile.read_header(tmp_path / "f")


def test_a_real_torch_pickle_is_named(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "zip")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": list(range(100))}))
    for name, says in (("zip", "zip archive"), ("pickle", "this is a pickle")):
        with pytest.raises(BadTensorFile, match=says):
            tensorfile.read_header(tmp_path / name)


def test_torch_tensors_of_every_type_survive(tmp_path):
    """Also bfloat16, which numpy does not have, scalars, and two names for one storage."""
    shared = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    tensors = {
        "bf16": shared,
        "tied": shared.T,
        "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
    }
    tensorfile.write(tmp_path / "f", tensors, {})
    loaded = safetensors.torch.load_file(tmp_path / "f")
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())


KINDS = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()
names = st.text(st.sampled_from('aB1.é"\\\n𝄞'), min_size=1, max_size=3)
described = st.tuples(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
    st.integers(0, 9),
)


def tensor_of(kind, shape, as_array, value):
    tensor = torch.full(shape, value, dtype=torch.int64).to(getattr(torch, kind))
    return tensor.numpy() if as_array and kind != "bfloat16" else tensor


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(names, described, min_size=1, max_size=6),
    metadata=st.dictionaries(names, names, max_size=3),
)
def test_the_bytes_are_the_librarys_but_for_the_order_of_the_metadata(tensors, metadata):
    """Header, layout and padding: parity over types, shapes and names.
    A single metadata entry has no order: then every byte.
    """
    given_ = {n: tensor_of(*d) for n, d in tensors.items()}
    metadata = dict([*metadata.items()][:1])
    expected = safetensors.torch.save(
        {n: torch.as_tensor(t).clone() for n, t in given_.items()}, metadata
    )
    with tempfile.TemporaryDirectory() as folder:
        tensorfile.write(Path(folder) / "f", given_, metadata)
        assert (Path(folder) / "f").read_bytes() == expected
        tensorfile.require_equal(Path(folder) / "f", given_, metadata)


def test_slices_meet_without_a_seam(tmp_path, monkeypatch):
    """Tensors one element below, at and above a whole number of slices,
    and a header longer than one.
    """
    monkeypatch.setattr(tensorfile, "SLICE_BYTES", 64)
    tensors = {str(n): torch.arange(n, dtype=torch.int64) for n in (0, 1, 7, 8, 9, 16, 17)} | {
        "t": torch.arange(40.0).reshape(5, 8).T
    }
    tensorfile.write(tmp_path / "f", tensors, {"long": "x" * 200})
    loaded = safetensors.torch.load_file(tmp_path / "f")
    assert loaded.keys() == tensors.keys() and all(
        torch.equal(loaded[n], t) for n, t in tensors.items()
    )


def test_writing_makes_no_copy_of_the_whole(tmp_path):
    """The allocator's peak while 64 MB are written and compared.
    Measured: 8 MiB, a slice that is read and its comparison.
    """
    arrays = {str(n): np.full(2 * 2**20, n, np.float64) for n in range(4)}
    tracemalloc.start()
    tensorfile.write(tmp_path / "f", arrays, {})
    tensorfile.require_equal(tmp_path / "f", arrays, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2**20 < peak < 4 * tensorfile.SLICE_BYTES


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (3, "header is not"),
        (-1, "tensor a is not"),
        (-25, "tensor b is not"),
        (None, "tensor a ends 8"),
        (0, "bytes behind"),
    ],
)
def test_a_comparison_names_what_differs(tmp_path, at, says):
    arrays = {"a": np.arange(3), "b": np.arange(2, dtype=np.uint64)}
    tensorfile.write(tmp_path / "f", arrays, {})
    tensorfile.require_equal(tmp_path / "f", arrays, {})
    data = bytearray((tmp_path / "f").read_bytes())
    match at:
        case None:
            del data[-8:]
        case 0:
            data += b"\0"
        case _:
            data[at] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(BadTensorFile, match=says):
        tensorfile.require_equal(tmp_path / "f", arrays, {})


def test_digests_are_those_of_the_file_and_its_tensors_and_name_a_torn_one(tmp_path):
    arrays = {
        "a": np.arange(1_200_000, dtype=np.int64),
        "b": np.ones(3, np.float32),
        "empty": np.zeros((0, 2)),
    }
    with ThreadPoolExecutor(2) as pool, tensorfile.created(tmp_path / "f", arrays) as f:
        written = tensorfile.write_hashed(f, arrays, {"k": "v"}, pool)
        assert written.synced.result() is None
    tensorfile.write(tmp_path / "plain", arrays, {"k": "v"})
    whole = (tmp_path / "f").read_bytes()
    assert whole == (tmp_path / "plain").read_bytes()
    expected = sha256_bytes(whole), {n: f"{zlib.crc32(a.tobytes()):08x}" for n, a in arrays.items()}
    assert (
        (written.sha256.result(), written.crc32) == tensorfile.digests(tmp_path / "f") == expected
    )
    (tmp_path / "f").write_bytes(whole[:-1])
    with pytest.raises(BadTensorFile, match="truncated"):
        tensorfile.digests(tmp_path / "f")


def test_a_file_without_tensors_has_digests_too(tmp_path):
    tensorfile.write(tmp_path / "f", {}, {})
    assert tensorfile.digests(tmp_path / "f") == (sha256_bytes((tmp_path / "f").read_bytes()), {})


@pytest.mark.parametrize("n_bytes", range(1, 18))
def test_a_difference_in_any_byte_of_a_slice_is_seen(tmp_path, n_bytes):
    """Slices are compared by eights of bytes, and what is left of them by one."""
    arrays = {"a": np.arange(n_bytes, dtype=np.uint8)}
    tensorfile.write(tmp_path / "f", arrays, {})
    tensorfile.require_equal(tmp_path / "f", arrays, {})
    for at in range(n_bytes):
        other = {"a": arrays["a"].copy()}
        other["a"][at] ^= 0x80
        with pytest.raises(BadTensorFile, match="tensor a is not"):
            tensorfile.require_equal(tmp_path / "f", other, {})


@pytest.mark.parametrize(
    "tensor", [np.zeros(2, np.complex64), np.array(["x"]), torch.zeros(2, dtype=torch.complex64)]
)
def test_a_type_the_format_lacks_is_refused(tmp_path, tensor):
    with pytest.raises(BadTensorFile, match="a is of type"):
        tensorfile.write(tmp_path / "f", {"a": tensor}, {})
    assert not (tmp_path / "f").exists()


def test_a_write_that_the_system_cuts_off_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # which would refuse before a write
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tensorfile.write(tmp_path / "f", {"a": np.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_device_is_neither_written_nor_replaced():
    with pytest.raises(OSError, match="/dev/full is a device"):
        tensorfile.write(Path("/dev/full"), {"a": np.zeros(2)}, {})
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_disk_without_room_says_so_before_the_first_byte_and_one_that_cannot_tell_is_written(
    tmp_path, monkeypatch, error
):
    def answer(descriptor, offset, n_bytes):
        assert (offset, n_bytes) == (0, 800_000)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", answer, raising=False)
    if error == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            tensorfile.write(tmp_path / "f", {"a": np.zeros(100_000)}, {})
        assert (tmp_path / "f").stat().st_size == 0
    else:
        tensorfile.write(tmp_path / "f", {"a": np.zeros(100_000)}, {})
        assert tensorfile.memmap(tmp_path / "f", "a").shape == (100_000,)


def test_reading_needs_no_torch():
    code = "import sys; from stackproof import tensorfile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
