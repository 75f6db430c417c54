"""Reads the page headers of a parquet column. They decide how much memory its values take; the
metadata at the end of the file may claim less.

Format: apache/parquet-format, PageHeader in Thrift's compact protocol.
"""

from typing import Any, BinaryIO

# A header may hold the smallest and the largest value of its page.
HEADER_BYTES = (2**9, 2**16, 2**24)
MAX_DEPTH = 4
PADDING = 100  # bytes behind a column that are read too: old writers left them out of its size
# Numbers of fields: sizes and values, and the structs of each kind of page.
UNCOMPRESSED_SIZE, COMPRESSED_SIZE, N_VALUES = 2, 3, 1
DATA, DICTIONARY, DATA_V2 = 5, 7, 8


def claims(source: BinaryIO, part: Any) -> tuple[int, int]:
    """Uncompressed bytes and number of values of a column in one row group, over all its pages.

    `part` is its metadata in pyarrow. Raises ValueError for a header that is not valid.
    """
    place = part.data_page_offset
    if part.has_dictionary_page and 0 < part.dictionary_page_offset < place:
        place = part.dictionary_page_offset
    end = place + max(0, part.total_compressed_size) + PADDING
    n_bytes = n_values = n_data = 0
    while place < end and n_data < part.num_values:
        header, length = _header(source, place)
        uncompressed, compressed = header[UNCOMPRESSED_SIZE], header[COMPRESSED_SIZE]
        pages = [(kind, header.get(kind)) for kind in (DATA, DATA_V2, DICTIONARY)]
        held = {kind: page.get(N_VALUES, -1) for kind, page in pages if isinstance(page, dict)}
        if min(uncompressed, compressed, *held.values(), 0) < 0:
            raise ValueError(f"the page at byte {place} has a negative size")
        n_bytes, n_values = n_bytes + uncompressed, n_values + sum(held.values())
        n_data += held.get(DATA, 0) + held.get(DATA_V2, 0)
        place += length + compressed
    return n_bytes, n_values


def _header(source: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """The integers of the page header at a place, and its length. Raises ValueError."""
    for n_bytes in HEADER_BYTES:
        source.seek(place)
        data = source.read(n_bytes)
        try:
            header, length = _struct(data, 0)
        except IndexError:
            continue
        sizes = [header.get(field) for field in (UNCOMPRESSED_SIZE, COMPRESSED_SIZE)]
        if length <= len(data) and all(isinstance(size, int) for size in sizes):
            return header, length
    raise ValueError(f"there is no page header at byte {place}")


def _struct(data: bytes, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The integers and structs of a struct by their field, and the place behind it. Raises
    IndexError if it exceeds the data.
    """
    fields, field = {}, 0
    while head := data[place]:
        place, kind = place + 1, head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, place = _integer(data, place)
        match kind:
            case 1 | 2:  # a truth value
                pass
            case 3:
                place += 1
            case 4 | 5 | 6:
                fields[field], place = _integer(data, place)
            case 7:
                place += 8
            case 8:
                length, place = _varint(data, place)
                place += length
            case 12 if depth < MAX_DEPTH:
                fields[field], place = _struct(data, place, depth + 1)
            case _:
                raise ValueError(f"a page header has a field of kind {kind}")
    return fields, place + 1


def _integer(data: bytes, place: int) -> tuple[int, int]:
    """A signed number, of which the sign is the lowest bit, and the place behind it."""
    number, place = _varint(data, place)
    return (number >> 1) ^ -(number & 1), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        number, place = number | (byte & 127) << shift, place + 1
        if byte < 128:
            return number, place
    raise ValueError("a page header holds a number of more than 64 bits")
