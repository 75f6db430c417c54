"""A whole build beside the encoder alone: filter, repeats, tokenise, shards and fsync, against
`tokenizers` on the same cores.

    python benchmarks/build.py [--text PATH ...] [--megabytes 50] [--rounds 5]
        [--workers N] [--json PATH]

The text is that of the files given, or else the sources and text files of the standard library.
Ours is `stackproof.data.build` from a JSON-lines file to verified shards; the peers encode the same
texts in memory and write nothing. MB are 10^6 bytes of UTF-8.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from side_by_side import (
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    open_record,
    show,
    write_json,
)
from tokenizer_speed import VOCAB_SIZE, batches, n_bytes, read_texts

from stackproof.config import DataConfig, Files, FileTokenizer
from stackproof.data import build as builder
from stackproof.data.tokenizer import load_tokenizer, train_bpe

GOAL = 2.0
OURS = "ours: build"


def lines_file(folder: Path, texts: list[str]) -> Path:
    """The texts as JSON lines in pieces of about a hundred documents,
    so that processes can share them.
    """
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return path


def build_once(folder: Path, cfg: DataConfig, size: int, workers: int) -> Callable[[], float]:
    """One build from nothing; returns MB/s."""

    def once() -> float:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        builder.build(cfg, out, workers=workers)
        return size / (time.perf_counter() - started) / 1e6

    return once


def encode_once(method: str, tokenizer, texts: list[str], size: int) -> Callable[[], float]:
    """All texts through one method of the library; returns MB/s."""

    def once() -> float:
        started = time.perf_counter()
        for batch in batches(texts):
            getattr(tokenizer.inner, method)(batch, add_special_tokens=False)
        return size / (time.perf_counter() - started) / 1e6

    return once


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = open_record(options, "a whole build")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.workers > 1 else "false"
    texts = read_texts(options.text, int(options.megabytes * 1e6))
    size = n_bytes(texts)
    with tempfile.TemporaryDirectory(prefix="stackproof-bench-") as name:
        folder = Path(name)
        train_bpe(VOCAB_SIZE, texts).save(folder / "tokenizer.json")
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        source = Files(paths=(str(lines_file(folder, texts)),), languages=("code", "en"))
        cfg = DataConfig(
            corpus=source, tokenizer=FileTokenizer(path=str(folder / "tokenizer.json"))
        )
        work = {OURS: build_once(folder, cfg, size, options.workers)}
        work |= {
            f"tokenizers {m}": encode_once(m, tokenizer, texts, size)
            for m in ("encode_batch", "encode_batch_fast")
        }
        rates = alternate(work, options.rounds)
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
    goals = {"tokenizers encode_batch": GOAL}
    rows = against(OURS, [Row(n, "MB/s", r, goal=goals.get(n)) for n, r in rates.items()])
    show(f"{size / 1e6:.1f} MB, {options.workers} processes, {options.rounds} rounds in turn", rows)
    receipt = manifest["sources"][0]["receipt"]
    print(
        f"\n{receipt['documents_in']:,} documents in, {receipt['documents_out']:,} out; encoded "
        f"by {manifest['tokenizer']['encoder']}"
    )
    machine = facts(("tokenizers", "tiktoken", "numpy"))
    print(machine)
    close_record(record, options.run_dir, rows, {"text_bytes": (size, "bytes")})
    write_json(
        options.json,
        {"machine": machine, "bytes": size, "workers": options.workers, "rows": as_json(rows)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
