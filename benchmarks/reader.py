"""Batches of random windows: our data loader next to other loaders, in turn, in one run, on the
same tokens.

    python benchmarks/reader.py [--tokens 100000000] [--rounds 9] [--seconds 0.4] [--json PATH]

A batch is 64 windows of 513 tokens, given as int64 inputs and labels of 64 × 512. The tokens are
random uint16 numbers, written once into a temporary folder in the format of every loader. Loaders
without workers, files in the page cache, no training beside it: this compares what a batch costs
the process that asks for it. Every loader has a process to itself and waits while another is timed:
in one process the background threads that some start would slow down the others. torch has one
thread, as in the workers of its own loader: with more, the peers' small copies wait for each other,
and a busy machine would flatter us (`--threads` shows it). Read the ratios; the rates are those of
one machine in one hour.

litdata and mosaicml-streaming take part where they can be imported, and their rows say so where
not. In an environment of your own:

    pip install "stackproof[train]" litdata mosaicml-streaming
    python benchmarks/reader.py --json loader.json
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from side_by_side import (
    Contestant,
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    spread,
    why_not,
    write_json,
)
from torch import Tensor
from torch.utils import data as torch_data

from stackproof import tensorfile
from stackproof.data.data_loader import DataLoader
from stackproof.data.packing import ConcatenatedStream
from stackproof.data.shards import MAX_SHARD_TOKENS

ROWS, SEQ_LEN, VOCAB_SIZE, SEED = 64, 512, 65536, 20240607
WINDOW = SEQ_LEN + 1
PIECE_TOKENS = WINDOW * 1024
CHUNK_TOKENS = WINDOW * 65536
RESUME_BOUND_MS = 50.0

Draw = Callable[[], tuple[Tensor, Tensor]]


# ---- the data, in every format


def write_tokens(folder: Path, n_tokens: int) -> None:
    """Random tokens as one raw file and as shards, with the figures that a stream
    wants of a split beside them.
    """
    tokens = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, n_tokens, dtype=np.uint16)
    tokens.tofile(folder / "tokens.bin")
    shards = []
    for start in range(0, n_tokens, MAX_SHARD_TOKENS):
        path = folder / f"train-{len(shards):05d}.safetensors"
        none = np.zeros(0, np.int64)
        tensorfile.write(
            path,
            {
                "tokens": tokens[start : start + MAX_SHARD_TOKENS],
                "document_starts": none,
                "document_hashes": none,
            },
            {},
        )
        shards.append(
            {
                "path": path.name,
                "source": "random",
                "tokens": min(MAX_SHARD_TOKENS, n_tokens - start),
                "documents": 0,
            }
        )
    split = {"tokens": n_tokens, "bytes": 2 * n_tokens, "documents": 0, "shards": shards}
    (folder / "split.json").write_text(json.dumps(split))


def raw(folder: Path) -> np.memmap:
    return np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")


def token_stream(folder: Path) -> ConcatenatedStream:
    return ConcatenatedStream(folder, json.loads((folder / "split.json").read_text()), VOCAB_SIZE)


def piece(start: int, *, folder: Path) -> Iterator[Tensor]:
    """One run of whole windows for litdata's writer, uint16; shorter at the end."""
    tokens = raw(folder)
    stop = min(start + PIECE_TOKENS, len(tokens) // WINDOW * WINDOW)
    yield torch.from_numpy(np.array(tokens[start:stop]))


# ---- the contestants


def open_ours(folder: Path) -> Draw:
    loader = DataLoader(token_stream(folder), seq_len=SEQ_LEN, seed=SEED, rows=ROWS)

    def draw() -> tuple[Tensor, Tensor]:
        batch = loader.next_batch()
        return batch.input_ids, batch.labels

    return draw


def open_crops(folder: Path) -> Draw:
    """nanoGPT's way: a memory map, random starts, one conversion per row; mapped once,
    which spares it the map per batch.
    """
    data = raw(folder)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - SEQ_LEN, (ROWS,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts]
        )
        return x, y

    return draw


def open_litdata(folder: Path, *, shuffle: bool) -> Draw:
    """A folder of litdata chunks read by windows of 513 tokens, collated by its own loader,
    no workers.
    """
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    target = folder / "litdata"
    if not target.exists():
        starts = list(range(0, len(raw(folder)) // WINDOW * WINDOW, PIECE_TOKENS))
        optimize(
            fn=partial(piece, folder=folder),
            inputs=starts,
            output_dir=str(target),
            chunk_size=CHUNK_TOKENS,
            num_workers=1,
            item_loader=TokensLoader(block_size=WINDOW),
            verbose=False,
        )
    dataset = StreamingDataset(
        str(target),
        item_loader=TokensLoader(block_size=WINDOW),
        shuffle=shuffle,
        seed=SEED,
        drop_last=True,
    )
    return from_loader(
        StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0, drop_last=True),
        lambda batch: batch,
    )


def open_mds(folder: Path) -> Draw:
    """A folder of MDS shards, one sample per window, shuffled, collated by torch's loader,
    no workers.
    """
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    target = folder / "mds"
    if not target.exists():
        tokens = raw(folder)
        with MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{WINDOW}"}) as writer:
            for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
                writer.write({"tokens": np.array(tokens[start : start + WINDOW])})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(target), shuffle=True, shuffle_seed=SEED, batch_size=ROWS)
    return from_loader(
        torch_data.DataLoader(dataset, batch_size=ROWS, num_workers=0, drop_last=True),
        lambda batch: batch["tokens"],
    )


def from_loader(loader: DataLoader, tokens_of: Callable) -> Draw:
    """Batches of a loader, epoch after epoch; one conversion of the whole batch,
    inputs and labels as views of it.
    """

    def epochs() -> Iterator:
        while True:
            yield from loader

    batches = epochs()

    def draw() -> tuple[Tensor, Tensor]:
        tokens = tokens_of(next(batches)).long()
        return tokens[:, :-1], tokens[:, 1:]

    return draw


OURS = "ours: DataLoader.next_batch"
CONTESTANTS = [
    Contestant(OURS, "", open_ours),
    Contestant("nanoGPT's crop loop", "", open_crops, goal=1.0),
    Contestant(
        "litdata TokensLoader, shuffled", "litdata", partial(open_litdata, shuffle=True), goal=5.0
    ),
    Contestant(
        "litdata TokensLoader, in order", "litdata", partial(open_litdata, shuffle=False), goal=5.0
    ),
    Contestant("mosaicml-streaming MDS, shuffled", "streaming", open_mds, goal=5.0),
]
PACKAGES = ("numpy", "torch", "litdata", "mosaicml-streaming", "icontract")


# ---- the measurement


def refuse_wrong_batch(name: str, draw: Draw, tokens: np.ndarray) -> None:
    """Stop unless a contestant gives int64 inputs and labels of 64 × 512, the labels one token
    ahead, found in the tokens as they stand.
    """
    x, y = draw()
    right = (
        x.shape == y.shape == (ROWS, SEQ_LEN)
        and x.dtype == y.dtype == torch.int64
        and torch.equal(x[:, 1:], y[:, :-1])
    )
    for row in x[:2].numpy() if right else ():
        places = np.flatnonzero(tokens[: len(tokens) - SEQ_LEN] == row[0])
        right = right and any(np.array_equal(tokens[p : p + SEQ_LEN], row) for p in places.tolist())
    if not right:
        raise SystemExit(f"{name} does not give the batch that is compared")


def rate_of(draw: Draw, seconds: float) -> Callable[[], float]:
    """What one round does: draw batches for about `seconds`, return input tokens/s in millions."""

    def timed(n: int) -> float:
        started = time.perf_counter()
        for _ in range(n):
            draw()
        return time.perf_counter() - started

    n = 4
    while (taken := timed(n)) < seconds / 4:
        n *= 2
    n = max(2, round(n * seconds / taken))
    return lambda: n * ROWS * SEQ_LEN / timed(n) / 1e6


def serve(name: str, folder: Path, seconds: float, threads: int, pipe: Connection) -> None:
    """What the process of one contestant does: make ready, then one round and
    its rate for every question.
    """
    torch.set_num_threads(threads)
    draw = next(c for c in CONTESTANTS if c.name == name).open(folder)
    refuse_wrong_batch(name, draw, raw(folder))
    once = rate_of(draw, seconds)
    while True:
        pipe.send("ready")
        pipe.recv()
        pipe.send(once())


class Seat:
    """A contestant in a process of its own, ready when this is made."""

    def __init__(self, name: str, folder: Path, seconds: float, threads: int):
        context = get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(name, folder, seconds, threads, theirs))
        self.process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> float | str:
        try:
            return self.pipe.recv()
        except EOFError as e:
            raise SystemExit(f"{self.name} failed, see above") from e

    def once(self) -> float:
        """One round; Mtok/s."""
        self.pipe.send("go")
        rate = self._answer()
        self._answer()
        return rate

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def resume_ms(folder: Path, n: int) -> list[float]:
    """Milliseconds to open the shards, build a loader at a random cursor of the first four epochs,
    and draw its first batch.
    """
    cursors = np.random.default_rng(SEED).integers(
        0, 4 * token_stream(folder).n_windows(SEQ_LEN), n
    )
    taken = []
    for cursor in cursors.tolist():
        started = time.perf_counter()
        torch_data.DataLoader(
            token_stream(folder), seq_len=SEQ_LEN, seed=SEED, rows=ROWS, cursor=cursor
        ).next_batch()
        taken.append((time.perf_counter() - started) * 1e3)
    return taken


def measure(folder: Path, rounds: int, seconds: float, threads: int) -> list[Row]:
    """Rows of all contestants, those that cannot be imported included."""
    missing = {c.name: why_not(c.package) for c in CONTESTANTS}
    seats: list[Seat] = []
    try:
        for name in (n for n, reason in missing.items() if not reason):
            seats.append(Seat(name, folder, seconds, threads))
        rates = alternate({s.name: s.once for s in seats}, rounds)
    finally:
        for seat in seats:
            seat.close()
    return against(
        OURS,
        [
            Row(c.name, "Mtok/s", rates.get(c.name, ()), missing[c.name], goal=c.goal)
            for c in CONTESTANTS
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="of one contestant in one round, about"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all contestants")
    parser.add_argument("--resumes", type=int, default=200)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = open_record(options, "the loader of batches")
    torch.set_num_threads(options.threads)
    machine = facts(PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder, options.tokens)
        rows = measure(folder, options.rounds, options.seconds, options.threads)
        resume = spread(resume_ms(folder, options.resumes))
    title = (
        f"batches of {ROWS} × {SEQ_LEN} from {options.tokens:,} tokens, {options.rounds} rounds "
        "in turn, torch threads: "
    )
    show(f"{title}{options.threads}", rows)
    reached = "reached" if resume[2] < RESUME_BOUND_MS else "missed"
    print(
        f"\nresume at {options.resumes} random cursors: median {resume[0]:.2f} ms, max "
        f"{resume[2]:.2f} ms",
        end="",
    )
    print(f"; wanted < {RESUME_BOUND_MS:g} ms: {reached}\n{machine}")
    document = {
        "machine": machine,
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "run_dir")},
        "rows": as_json(rows),
    }
    resume_entry = {
        "median_ms": resume[0],
        "max_ms": resume[2],
        "n": options.resumes,
        "bound_ms": RESUME_BOUND_MS,
    }
    write_json(options.json, document | {"resume": resume_entry})
    extra = {
        "resume_median_ms": (resume[0], "ms"),
        "resume_max_ms": (resume[2], "ms"),
        "resume_bound_ms": (RESUME_BOUND_MS, "ms"),
    }
    close_record(record, options.run_dir, rows, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
