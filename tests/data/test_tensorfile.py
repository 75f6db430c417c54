"""Strict safetensors files: equal content is equal bytes, and nothing ambiguous is read."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from stack import tensorfile
from stack.tensorfile import BadTensorFile


def make(path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    """The library's own metadata order changes from process to process; ours must not."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from stack import tensorfile\n"
        "tensorfile.write(Path(sys.argv[1]), {'b': np.arange(3), 'a': np.ones(2, np.float32)}, {'z': '1', 'y': '2', 'x': '3'})"
    )
    for n in range(6):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(n))], check=True)
    assert len({(tmp_path / str(n)).read_bytes() for n in range(6)}) == 1
    header = tensorfile.read_header(tmp_path / "0")
    assert header.metadata == {"x": "3", "y": "2", "z": "1"} and set(header.tensors) == {"a", "b"}


def test_what_is_written_the_library_reads(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.uint16).reshape(2, 3), "empty": np.zeros((0, 4), np.float32), "one": np.array(1.5)}
    tensorfile.write(tmp_path / "f", arrays, {})
    loaded = safetensors.numpy.load_file(tmp_path / "f")
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array) and np.array_equal(tensorfile.memmap(tmp_path / "f", name), array)


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        (b" " + json.dumps({"a": ENTRY}).encode(), b"xy", "begin with"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"xy", "twice"),
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


@pytest.mark.parametrize(("start", "says"), [(b"PK\x03\x04", "zip"), (b"\x80\x04\x95", "pickle"), (b"abc", "claims")])
def test_foreign_formats_are_named(tmp_path, start, says):
    (tmp_path / "f").write_bytes(start if len(start) == 3 else start + b"\0" * 64)
    with pytest.raises(BadTensorFile, match=says):
        tensorfile.read_header(tmp_path / "f")


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(BadTensorFile, match="claims"):
        tensorfile.read_header(tmp_path / "f")
