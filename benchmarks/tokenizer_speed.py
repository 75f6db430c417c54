"""Training a 32,000-token BPE vocabulary and encoding with it: ours next to the libraries
themselves, in turn, in one process.

    python benchmarks/tokenizer_speed.py [--text PATH ...] [--megabytes 50]
        [--rounds 7] [--json PATH]

The text is that of the files given, or else the sources and text files of the standard library that
runs this; none is read twice, and if there is less than was wanted, the report says so. All
encoders have the same merges and must give the same ids on all the text; they are timed on
documents spread over it. MB are 10^6 bytes of UTF-8. Read the ratios; the rates are those of one
machine in one hour.

tiktoken takes part where it can be imported. In an environment of your own:

    pip install "stackproof[train]" tiktoken
    python benchmarks/tokenizer_speed.py --json tokenizer_speed.json
"""

import argparse
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

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
    why_not,
    write_json,
)

VOCAB_SIZE = 32000
BATCH_BYTES = 10**6
SUFFIXES = (".py", ".txt", ".rst")
SKIPPED_FOLDERS = frozenset(("site-packages", "dist-packages", "__pycache__"))
# Training may take 1.2 times as long as the library's.
TRAIN_GOAL = 1 / 1.2
OURS_TRAIN, OURS_ENCODE = "ours: make_tokenizer", "ours: encode_batch"
PACKAGES = ("tokenizers", "tiktoken", "numpy")
SAME_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


# ---- the text


def text_files(given: list[Path]) -> Iterator[Path]:
    """The files given, those under the folders given, or those of the standard library,
    in a fixed order.
    """
    for root in given or [Path(sysconfig.get_path("stdlib"))]:
        if root.is_file():
            yield root
        else:
            inside = (
                p
                for p in root.rglob("*")
                if p.suffix in SUFFIXES and not SKIPPED_FOLDERS & set(p.relative_to(root).parts)
            )
            yield from sorted(p for p in inside if p.is_file())


def read_texts(given: list[Path], wanted_bytes: int) -> list[str]:
    """One text per file, up to `wanted_bytes` of UTF-8; files that are no UTF-8,
    or whose text came before, are left out.
    """
    texts: dict[str, None] = {}
    size = 0
    for path in text_files(given):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text and text not in texts and size < wanted_bytes:
            text = text if n_bytes([text]) <= wanted_bytes - size else text[: wanted_bytes - size]
            texts[text] = None
            size += n_bytes([text])
    return list(texts)


def n_bytes(texts: list[str]) -> int:
    return sum(len(t.encode()) for t in texts)


def spread_over(texts: list[str], wanted_bytes: int) -> list[str]:
    """Every k-th text, so that about `wanted_bytes` remain."""
    return texts[:: max(1, round(n_bytes(texts) / wanted_bytes))]


def batches(texts: list[str]) -> list[list[str]]:
    """Texts in lists of about 1 MB, so that nobody has to hold the encodings of everything."""
    lists: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= BATCH_BYTES:
            lists.append([])
            size = 0
        lists[-1].append(text)
        size += len(text)
    return lists


# ---- training: `open(texts)` returns what is timed, which returns the saved vocabulary


def train_ours(texts: list[str]) -> Callable[[], str]:
    from stackproof.config import BpeTokenizer
    from stackproof.data.tokenizer import make_tokenizer

    return lambda: make_tokenizer(BpeTokenizer(vocab_size=VOCAB_SIZE), texts).to_bytes().decode()


def train_library(texts: list[str]) -> Callable[[], str]:
    """The `tokenizers` library as its documentation shows it for byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def train() -> str:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.to_str()

    return train


# ---- encoding: `open(saved vocabulary, threads)` returns what is timed,
# from a list of texts to a list of ids each


def encode_ours(saved: str, threads: int) -> Callable[[list[str]], list[list[int]]]:
    """What a build calls in each of its processes; with tiktoken it is one
    thread whatever is asked for.
    """
    tokenizer = our_tokenizer(saved)
    return lambda texts: [e.ids for e in tokenizer.encode_batch(texts)]


def our_tokenizer(saved: str):
    from tokenizers import Tokenizer

    from stackproof.data.tokenizer import Bpe

    return Bpe(Tokenizer.from_str(saved))


def encode_library(
    saved: str, threads: int, *, method: str
) -> Callable[[list[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(saved)
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        return [e.ids for e in getattr(tokenizer, method)(texts, add_special_tokens=False)]

    return encode


def encode_tiktoken(saved: str, threads: int) -> Callable[[list[str]], list[list[int]]]:
    """tiktoken with the same merges: ids are ranks, the end of text has none."""
    import tiktoken

    from stackproof.data.tokenizer import _byte_alphabet

    byte_of = {c: b for b, c in _byte_alphabet().items()}
    document = json.loads(saved)
    control = {t["id"] for t in document["added_tokens"]}
    ranks = {
        bytes(byte_of[c] for c in token): i
        for token, i in document["model"]["vocab"].items()
        if i not in control
    }
    encoding = tiktoken.Encoding(
        "benchmark", pat_str=SAME_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    if threads > 1:
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)
    return lambda texts: [encoding.encode_ordinary(t) for t in texts]


def trainers() -> list[Contestant]:
    return [
        Contestant(OURS_TRAIN, "", train_ours),
        Contestant("tokenizers BpeTrainer", "tokenizers", train_library, goal=TRAIN_GOAL),
    ]


def encoders() -> list[Contestant]:
    return [
        Contestant(OURS_ENCODE, "", encode_ours),
        Contestant(
            "tokenizers encode_batch", "tokenizers", partial(encode_library, method="encode_batch")
        ),
        Contestant(
            "tokenizers encode_batch_fast",
            "tokenizers",
            partial(encode_library, method="encode_batch_fast"),
        ),
        Contestant("tiktoken", "tiktoken", encode_tiktoken),
    ]


# ---- the measurement


def timed(work: Callable[[], object], size: int) -> Callable[[], float]:
    """What one round does; returns MB/s."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return size / (time.perf_counter() - started) / 1e6

    return once


def rows_of(
    ours: str,
    entries: list[Contestant],
    opened: dict[str, Callable[[], object]],
    size: int,
    rounds: int,
) -> list[Row]:
    """Rows of all contestants; those not in `opened` say why."""
    rates = alternate({name: timed(work, size) for name, work in opened.items()}, rounds)
    return against(
        ours,
        [
            Row(c.name, "MB/s", rates.get(c.name, ()), why_not(c.package), goal=c.goal)
            for c in entries
        ],
    )


def measure_training(texts: list[str], rounds: int) -> tuple[str, list[Row]]:
    """(our saved vocabulary, rows). Stops if the library alone makes another one."""
    opened = {c.name: c.open(texts) for c in trainers()}
    saved = {name: json.loads(train()) for name, train in opened.items()}
    ours = saved[OURS_TRAIN]
    if any(s["model"] != ours["model"] for s in saved.values()):
        raise SystemExit("the trainers do not make the same vocabulary")
    print(f"vocabulary: {len(ours['model']['vocab']):,} tokens, the same from both")
    return json.dumps(ours, ensure_ascii=False), rows_of(
        OURS_TRAIN, trainers(), opened, n_bytes(texts), rounds
    )


def open_encoders(saved: str, threads: int) -> dict[str, Callable]:
    """The encoders that can be imported, ready."""
    return {c.name: c.open(saved, threads) for c in encoders() if not why_not(c.package)}


def refuse_other_ids(opened: dict[str, Callable], texts: list[str]) -> int:
    """Stop unless all encoders give the same ids on all texts. Returns how many ids."""
    total = 0
    ours = opened[OURS_ENCODE]
    for batch in batches(texts):
        expected = ours(batch)
        total += sum(map(len, expected))
        for name, encode in opened.items():
            if encode is not ours and [list(ids) for ids in encode(batch)] != expected:
                raise SystemExit(f"{name} gives other ids than ours")
    return total


def measure_encoding(saved: str, threads: int, texts: list[str], rounds: int) -> list[Row]:
    """Rows of all encoders on these texts."""

    def all_of(encode: Callable) -> None:
        for batch in lists:
            encode(batch)

    lists = batches(texts)
    opened = {
        name: partial(all_of, encode) for name, encode in open_encoders(saved, threads).items()
    }
    return rows_of(OURS_ENCODE, encoders(), opened, n_bytes(texts), rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        help="files, or folders of .py, .txt and .rst files",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=50.0,
        help="of text at most, for training and for the check of the ids",
    )
    parser.add_argument(
        "--encode-megabytes", type=float, default=10.0, help="of it for timing the encoders, about"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = open_record(options, "the tokenizer")
    machine = facts(PACKAGES)
    texts = read_texts(options.text, int(options.megabytes * 1e6))
    size = n_bytes(texts)
    less = (
        ""
        if size >= 0.99e6 * options.megabytes
        else f"; {options.megabytes:g} were wanted, there is no more"
    )
    print(f"text: {len(texts):,} documents, {size / 1e6:.1f} MB{less}")
    saved, training = measure_training(texts, options.rounds)
    show(f"training, vocabulary {VOCAB_SIZE:,}, {options.rounds} rounds in turn", training)
    n_ids = refuse_other_ids(open_encoders(saved, 2), texts)
    sample = spread_over(texts, int(options.encode_megabytes * 1e6))
    print(
        f"\nids: {n_ids:,}, the same from all encoders; ours encodes by "
        f"{our_tokenizer(saved).encoder}"
    )
    encoding = {n: measure_encoding(saved, n, sample, options.rounds) for n in (1, 2)}
    for n, rows in encoding.items():
        show(
            f"encoding {n_bytes(sample) / 1e6:.1f} MB, {n} thread{'s' * (n > 1)}, "
            f"{options.rounds} rounds in turn",
            rows,
        )
    print(f"\n{machine}")
    document = {
        "machine": machine,
        "bytes": size,
        "documents": len(texts),
        "ids": n_ids,
        "rounds": options.rounds,
    }
    document |= {
        "training": as_json(training),
        "encoding": {f"{n} threads": as_json(rows) for n, rows in encoding.items()},
    }
    write_json(options.json, document)
    every = [
        replace(r, name=f"{n} threads, {r.name}") for n, rows in encoding.items() for r in rows
    ]
    figures = {
        "ids_compared": (n_ids, "tokens"),
        "text_bytes": (size, "bytes"),
        "vocab_size": (VOCAB_SIZE, "tokens"),
    }
    close_record(record, options.run_dir, [*training, *every], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
