"""Opening a corpus of 15 T tokens: what is read at the start, and per row, does not depend on its
size. A table of shards that a manifest lists is read whole.
"""

import json
import struct
from types import SimpleNamespace

import pytest

from stackproof.config import ByteTokenizer, DataConfig, Files
from stackproof.data.manifest import write_manifest
from stackproof.data.prepare import open_folder, prepare
from stackproof.data.shard_table import BLOCK_SHARDS, LISTED_SHARDS
from stackproof.spec.canonical import canonical_json, read_json
from stackproof.spec.errors import DataError
from tests.processes import Command

SHARD_TOKENS = 128 * 2**20  # 512 MiB of ids of four bytes
N_SHARDS = -(-15 * 10**12 // SHARD_TOKENS)
FEW, STEPS, ROWS = 10, 8, 4
BLOCK_BYTES = 100 * BLOCK_SHARDS
# Counts what a start opens and looks up, then draws rows as the last of 1,024 ranks. Memory is only
# traced on request, as that makes each call several times as slow.
START = """
import json, os, sys
import tracemalloc
opened, stated, stat = [], [], os.stat

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder):
        opened.append(os.path.basename(arguments[0]))

def counted(path, *more, **named):
    stated.append(path)
    return stat(path, *more, **named)

def bytes_read():
    return int(open("/proc/self/io").read().split()[1])

folder, verify, traced = sys.argv[1], sys.argv[2], sys.argv[3] == "traced"
steps, rows = int(sys.argv[4]), int(sys.argv[5])
from pathlib import Path
from stackproof.config import DataConfig
from stackproof.data.data_loader import DataLoader
from stackproof.data.prepare import open_folder
from stackproof.data.shards import mappable
open_folder(Path(folder).with_name("of-10"), DataConfig(verify="drawn"))  # imports what it needs
sys.addaudithook(watch)
os.stat = counted
if traced:
    tracemalloc.start()
before = bytes_read()
data = open_folder(Path(folder), DataConfig(verify=verify))
read = bytes_read() - before
os.stat = stat
peak_bytes = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
start = {"opened": sorted(opened), "stated": len(stated), "read": read, "peak_bytes": peak_bytes}
opened.clear()
loader = DataLoader(
    data.train, seq_len=4096, seed=1, rows=rows, rank=1023, world_size=1024, on_exhausted="error"
)
for _ in range(steps):
    loader.next_batch()
print(json.dumps(start | {"drawing": len(opened), "maps": mappable()}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of a few shards, one of 15 T tokens in the same files, and the latter with a
    manifest that lists all shards. The training split is in one sparse file.
    """
    place = tmp_path_factory.mktemp("15T")
    (place / "text").write_text("\n".join(f"A line of text, number {n}." for n in range(200)))
    cfg = DataConfig(
        corpus=Files(paths=(str(place / "text"),), documents="line"), tokenizer=ByteTokenizer()
    )
    made = prepare(cfg, cache_dir=place / "cache").directory
    with (made / "sparse.safetensors").open("wb") as file:
        tokens = {"dtype": "U16", "shape": [SHARD_TOKENS], "data_offsets": [0, 2 * SHARD_TOKENS]}
        header = json.dumps({"tokens": tokens}).encode()
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        size = file.tell() + 2 * SHARD_TOKENS
        file.truncate(size)
    manifest = read_json(made / "manifest.json")
    (entry,) = manifest["splits"]["train"]["shards"]
    entry |= {"path": "sparse.safetensors", "bytes": size, "tokens": SHARD_TOKENS}
    found = []
    for name, n in (("10", FEW), ("many", N_SHARDS), ("listed", N_SHARDS)):
        folder = place / f"of-{name}"
        folder.mkdir()
        for path in made.iterdir():
            if path.name != "manifest.json":
                (folder / path.name).hardlink_to(path)
        split = manifest["splits"]["train"] | {"tokens": n * SHARD_TOKENS, "shards": [entry] * n}
        document = manifest | {"splits": manifest["splits"] | {"train": split}}
        if name == "listed":
            (folder / "manifest.json").write_bytes(canonical_json(document))
        else:
            write_manifest(folder, document)
        found.append(folder)
    return found


def started(folder, verify="drawn", memory="traced"):
    arguments = (str(folder), verify, memory, str(STEPS), str(ROWS))
    done = Command(*arguments, folder=folder.parent, code=START).wait()
    assert done.code == 0, done.err
    return SimpleNamespace(**done.json)


def test_a_start_reads_the_manifest_and_no_shard_of_15_t_tokens_but_the_first(folders):
    few, many, listed = map(started, folders)
    validation = few.opened[-1]
    assert set(few.opened) == {"manifest.json", "tokenizer.json", "sparse.safetensors", validation}
    assert sorted([*few.opened, "train-00000.shards"]) == many.opened
    assert many.stated == few.stated and listed.opened == few.opened
    # A row is of one shard, which is opened twice, for its header and to be mapped, and of a block.
    assert 0 < listed.drawing <= 2 * STEPS * ROWS
    assert 0 < many.drawing <= 3 * STEPS * ROWS
    # One byte per shard and one block; a listed table takes 170 bytes of text and 1,200 of memory.
    assert 0 < many.read - few.read < N_SHARDS + BLOCK_BYTES < N_SHARDS * 100 < listed.read
    assert many.peak_bytes < few.peak_bytes + 10 * N_SHARDS < N_SHARDS * 500 < listed.peak_bytes


def test_a_start_that_looks_at_every_shard_is_noticed(folders):
    few, *larger = (started(folder, "size", "untraced") for folder in folders)
    for many in larger:
        assert many.stated - few.stated >= N_SHARDS - FEW


def test_a_shard_of_another_length_is_refused_when_it_is_drawn(folders, tmp_path):
    few = folders[0]
    for path in few.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).hardlink_to(path)
    manifest = read_json(few / "manifest.json")
    manifest["splits"]["train"]["shards"][3]["tokens"] += 1
    (tmp_path / "manifest.json").write_bytes(canonical_json(manifest))
    data = open_folder(tmp_path, DataConfig(verify="drawn"))
    window = 3 * ((SHARD_TOKENS - 1) // 4096)
    with pytest.raises(DataError, match="stores tokens as"):
        data.train.window(window, 4096)


def test_a_record_of_many_shards_names_their_manifest(folders):
    few, *larger = (open_folder(folder, DataConfig(verify="drawn")) for folder in folders)
    named = [row["name"] for row in few.inputs()]
    assert named.count("train tokens") == FEW and named[-2:] == ["tokenizer", "manifest"]
    for many in larger:
        assert [row["name"] for row in many.inputs()] == ["tokenizer", "manifest"]
        assert len(many.train.shards) == N_SHARDS > LISTED_SHARDS
