"""What the pages of a parquet column claim, beside what its metadata claims."""

import io

import pytest

from stackproof.config import Files
from stackproof.data import files, parquet_pages
from stackproof.spec.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def number(value, n_bytes=0):
    """A signed number of the compact protocol, in at least so many bytes."""
    value, made = value * 2, []
    while value > 127 or len(made) + 1 < n_bytes:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def write(path, values, kind, **options):
    pq.write_table(pa.table({"text": pa.array(values, kind)}), path, store_schema=False, **options)


def claims(path):
    with open(path, "rb") as source:
        metadata = pq.ParquetFile(path).metadata
        parts = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
        return [(*parquet_pages.claims(source, p), p) for p in parts]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_all_pages_of_a_column_are_counted(tmp_path, version, use_dictionary, compression):
    write(
        tmp_path / "a.parquet",
        [f"a text of {i % 100} " * 20 for i in range(3000)],
        pa.string(),
        data_page_version=version,
        use_dictionary=use_dictionary,
        compression=compression,
        data_page_size=2**13,
        row_group_size=1000,
        write_page_checksum=True,
    )
    for n_bytes, n_values, part in claims(tmp_path / "a.parquet"):
        assert n_values == part.num_values + 100 * use_dictionary
        headers = part.total_uncompressed_size - n_bytes
        assert 0 < headers < part.total_uncompressed_size / 5


def test_long_values_in_the_header_of_a_page_are_passed_over(tmp_path):
    write(tmp_path / "a.parquet", ["a" * 10**5, "b" * 10**5], pa.string(), use_dictionary=False)
    [(n_bytes, n_values, _)] = claims(tmp_path / "a.parquet")
    assert n_values == 2 and 2 * 10**5 <= n_bytes < 3 * 10**5


def test_metadata_that_claims_less_than_its_pages_has_no_effect(tmp_path):
    path, n = tmp_path / "a.parquet", 300_000
    turns = pa.list_(pa.struct([("role", pa.string())]))
    write(path, [[{"role": None}] * n], turns, data_page_size=2**30)
    data, old = path.read_bytes(), number(n)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert old in data[start:]
    path.write_bytes(data[:start] + data[start:].replace(old, number(16, len(old))))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).num_values == 16
    with pytest.raises(DataError, match="expands to more than 250 times its size"):
        list(files.read_slice(files.Slice(path), Files(paths=(str(path),))))


class Part:
    data_page_offset, has_dictionary_page, total_compressed_size, num_values = 0, False, 50, 9


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no page header at byte 0"),
        (bytes(60), "no page header at byte 0"),
        (b"\x15\x00\x15\x01\x15\x00\x00", "negative size"),
        (b"\x15\x00\x15\x00\x15\x00\x2c\x00\x00", "negative size"),
        (b"\x19" + bytes(9), "a field of kind 9"),
        (b"\x1c" * 9, "a field of kind 12"),
        (b"\x15" + b"\xff" * 20, "more than 64 bits"),
        (b"\x18" + b"\xff" * 8 + b"\x01", "no page header at byte 0"),
    ],
)
def test_a_header_of_a_page_that_is_not_valid_is_refused(data, why):
    with pytest.raises(ValueError, match=why):
        parquet_pages.claims(io.BytesIO(data), Part)
