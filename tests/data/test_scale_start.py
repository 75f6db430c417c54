"""Opening a corpus of 15 T tokens: what is read at the start, and per row, does not depend on its
size.
"""

import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stackproof.config import ByteTokenizer, DataConfig, Files
from stackproof.data.prepare import LISTED_SHARDS, SPLITS, open_folder, prepare
from stackproof.spec.canonical import canonical_json, read_json
from stackproof.spec.errors import DataError

SHARD_TOKENS = 128 * 2**20  # 512 MiB of ids of four bytes
N_SHARDS = -(-15 * 10**12 // SHARD_TOKENS)
FEW, STEPS, ROWS = 10, 8, 4
# Counts what a start opens and looks up, then draws rows as the last of 1,024 ranks.
START = """
import json, os, sys, time
opened, stated, stat = [], [], os.stat

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder):
        opened.append(os.path.basename(arguments[0]))

def counted(path, *more, **named):
    stated.append(path)
    return stat(path, *more, **named)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

folder, verify, steps, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
from stackproof.config import DataConfig
from stackproof.data.data_loader import DataLoader
from stackproof.data.prepare import open_folder
from stackproof.data.shards import mappable
before, began = status("VmRSS"), time.perf_counter()
sys.addaudithook(watch)
os.stat = counted
data = open_folder(Path(folder), DataConfig(verify=verify))
os.stat = stat
start = {"opened": sorted(opened), "stated": len(stated), "start_s": time.perf_counter() - began}
opened.clear()
loader = DataLoader(
    data.train, seq_len=4096, seed=1, rows=rows, rank=1023, world_size=1024, on_exhausted="error"
)
for _ in range(steps):
    loader.next_batch()
most = status("VmHWM") - before
print(json.dumps(start | {"drawing": len(opened), "maps": mappable(), "peak_bytes": most}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of a few shards, and one of 15 T tokens in the same files: all entries of its
    training split are of one sparse file.
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
    for n in (FEW, N_SHARDS):
        folder = place / f"of-{n}"
        folder.mkdir()
        for path in made.iterdir():
            if path.name != "manifest.json":
                (folder / path.name).hardlink_to(path)
        split = manifest["splits"]["train"] | {"tokens": n * SHARD_TOKENS, "shards": [entry] * n}
        text = canonical_json(manifest | {"splits": manifest["splits"] | {"train": split}})
        (folder / "manifest.json").write_bytes(text)
        found.append(folder)
    return found


def started(folder, verify="drawn"):
    done = subprocess.run(
        [sys.executable, "-c", START, str(folder), verify, str(STEPS), str(ROWS)],
        capture_output=True,
        text=True,
        check=True,
    )
    return SimpleNamespace(**json.loads(done.stdout))


def test_a_start_reads_the_manifest_and_no_shard_of_15_t_tokens_but_the_first(folders):
    few, many = map(started, folders)
    validation = few.opened[-1]
    assert set(few.opened) == {"manifest.json", "tokenizer.json", "sparse.safetensors", validation}
    assert many.opened == few.opened and many.stated == few.stated
    # A row is of one shard, which is opened twice: for its header, and to be mapped.
    assert 0 < many.drawing <= 2 * STEPS * ROWS
    assert many.peak_bytes - few.peak_bytes < 10_000 * N_SHARDS


def test_a_start_that_looks_at_every_shard_is_noticed(folders):
    few, many = (started(folder, "size") for folder in folders)
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
    few, many = (open_folder(folder, DataConfig(verify="drawn")) for folder in folders)
    named = [row["name"] for row in few.inputs()]
    assert named.count("train tokens") == FEW and named[-2:] == ["tokenizer", "manifest"]
    assert [row["name"] for row in many.inputs()] == ["tokenizer", "manifest"]
    assert sum(len(many.manifest["splits"][s]["shards"]) for s in SPLITS) > LISTED_SHARDS
