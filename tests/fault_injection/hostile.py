"""Hostile inputs: sound folders, and every way to spoil one of their files."""

import gzip
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stackproof import tensorfile
from stackproof.config import ByteTokenizer, DataConfig, Files, ModelConfig
from stackproof.data import build
from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface
from stackproof.export.import_model import write_run
from stackproof.model import hugging_face
from stackproof.model.build import build_model
from stackproof.recipes.imported import imported
from stackproof.spec.building import RecordBuilder
from stackproof.spec.canonical import sha256_file
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment

SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16}
MARKING = "import os, pathlib; pathlib.Path(os.environ['MARKER']).touch()\n"
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A command on a sound folder of which something was spoilt. `may_pass` if the change may be
    harmless; `heavy` if the command imports another library.
    """

    name: str
    spoil: Spoil
    command: tuple[str, ...]
    may_pass: bool = False
    heavy: bool = False


# --- sound folders --------------------------------------------------------------------------------


def write_sound(folder: Path, text_file: Path) -> None:
    """Every kind of input, each accepted by its commands."""
    model = build_model(ModelConfig(**SIZES, max_seq_len=64), 257, seed=0)
    hf, tokenizer = folder / "hf", Bytes()
    hf.mkdir(parents=True)
    kind = hugging_face.kind_for(model.cfg)
    huggingface.write_documents(hf, kind, model, tokenizer, "float32")
    huggingface.write_weights(hf, kind, model, "float32", 2**30)
    cfg = imported(model.cfg, folder / "run" / "tokenizer.json")
    builder = RecordBuilder(
        kind="import",
        spec=load_spec(),
        config=cfg.to_dict(),
        claim="c",
        not_covered=("n",),
        environment=environment(),
        command=["stack", "import", "hf", "--out", "run"],
    )
    ending = {"status": "completed", "exit_code": 0, "end_reason": "done", "gates": ()}
    write_run(folder / "run", cfg, model, tokenizer, builder, {"folder": "hf"}, **ending)
    texts = folder / "texts"
    texts.mkdir()
    lines = text_file.read_text("utf-8").splitlines()[:40]
    (texts / "a.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "plain.txt").write_text(json.loads(lines[0])["text"], "utf-8")
    data = DataConfig(corpus=Files(paths=(str(texts / "a.jsonl"),)), tokenizer=ByteTokenizer())
    build.build(data, folder / "built")
    (folder / "run.toml").write_text('recipe = "pocket"\n[optim]\nlr = 1e-3\n')
    (folder / "mixture.toml").write_text(
        '[tokenizer]\nkind = "byte"\n[[source]]\nname = "a"\npaths = ["texts/a.jsonl"]\n'
    )
    (folder / "trace").mkdir()
    record = json.loads((folder / "run" / "metadata.json").read_bytes())
    record |= {"kind": "trace", "id": f"trace-{record['id'].partition('-')[2]}", "series": []}
    record |= {"inputs": [], "outputs": [], "command": ["stack", "trace", "hf"]}
    (folder / "trace" / "metadata.json").write_text(json.dumps(record))
    write_gguf(folder / "model.gguf")


def write_gguf(path: Path, **changes: Any) -> None:
    """A header without tensors; `changes` replace its numbers of tensors and keys, or its end."""
    tensors, keys = changes.get("tensors", 0), changes.get("keys", 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + changes.get("rest", b""))


def reseal(step: Path) -> None:
    """Write the hashes of a step folder into its manifest again, as an attacker does."""
    manifest = json.loads((step / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        entry["sha256"], entry["bytes"] = sha256_file(step / name), (step / name).stat().st_size
        if "tensors" in entry:
            entry["tensors"] = tensorfile.digests(step / name)[1]
        if "crc32" in entry:
            entry["crc32"] = tensorfile.digests(step / name)[1]
    (step / "manifest.json").write_text(json.dumps(manifest))


# --- ways to spoil a file -------------------------------------------------------------------------


class Marks:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return exec, (MARKING,)


def put(data: bytes) -> Spoil:
    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return spoil


def _replace(make: Callable[[Path], object]) -> Spoil:
    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def _sparse(n_bytes: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as f:
            f.truncate(n_bytes)

    return make


def _torch_save(path: Path) -> None:
    torch.save({"a": Marks()}, path)


ANY_FILE: dict[str, Spoil] = {
    "pipe": _replace(os.mkfifo),
    "endless device": _replace(lambda p: p.symlink_to("/dev/zero")),
    "folder": _replace(Path.mkdir),
    "link to nothing": _replace(lambda p: p.symlink_to("nothing")),
    "link to itself": _replace(lambda p: p.symlink_to(p.name)),
    "missing": lambda p: p.unlink(),
    "empty": put(b""),
    "noise": put(bytes(range(256)) * 16),
    "huge": _replace(_sparse(6 * 2**30)),
    "pickle": put(pickle.dumps(Marks())),
    "torch.save": _replace(_torch_save),
}
JSON_FILE: dict[str, Spoil] = {
    "deep lists": put(b"[" * 200_000),
    "deep tables": put(b'{"a":' * 100_000),
    "closed deep tables": put(b'{"a":' * 900 + b"1" + b"}" * 900),
    "many empty lists": put(b"[" + b"[]," * 3_000_000 + b"0]"),
    "many keys": put(b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}"),
    "a list": put(b"[]"),
    "an empty table": put(b"{}"),
    "a number": put(b"1"),
    "a text": put(b'"text"'),
    "null": put(b"null"),
    "not a number": put(b'{"a": NaN}'),
    "a long number": put(b'{"a": ' + b"9" * 100_000 + b"}"),
    "half a surrogate": put(b'{"a": "\\ud800"}'),
    "a key twice": put(b'{"a": 1, "a": 2}'),
    "not utf-8": put(b'{"a": "\xff"}'),
    "a mark first": put(b"\xef\xbb\xbf{}"),
}
TOML_FILE: dict[str, Spoil] = {
    "deep lists": put(b"a = " + b"[" * 100_000),
    "deep keys": put(b".".join([b"a"] * 20_000) + b" = 1"),
    "a date": put(b"[optim]\nlr = 1979-05-27\n"),
    "an impossible date": put(b"a = 2021-02-31\n"),
    "a long number": put(b"a = " + b"9" * 100_000),
    "not utf-8": put(b'a = "\xff"'),
    "long": put(b"# " + b"a" * 2**21 + b"\n"),
    "not a number": put(b"[optim]\nlr = nan\n"),
    "a table of nothing": put(b"[[source]]\n"),
    "a list for a table": put(b"source = [1]\n"),
}
# What a value of a document may become.
VALUES = (None, -1, 10**12, 2**40, 1.5, "x", [], {}, True, [[1]], "../../outside/file", "/dev/zero")


def header(document: Any, data: bytes = b"") -> bytes:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


TENSOR_FILE: dict[str, Spoil] = {
    "length beyond the file": put(struct.pack("<Q", 2**62) + b"{}"),
    "length of the file": _replace(lambda p: p.write_bytes(struct.pack("<Q", 99) + b"{" * 99)),
    "sparse header": _replace(
        lambda p: (_sparse(2**32)(p), p.open("r+b").write(struct.pack("<Q", 90 * 2**20) + b"{"))
    ),
    "deep header": put(header(b'{"a":' + b"[" * 500_000)),
    "wide header": put(header(b"{" + b'"a":[],' * 1_000_000 + b'"b":0}')),
    "many dimensions": put(header(_entry(shape=[2**62] * 300_000))),
    "a product beyond 64 bits": put(header(_entry(shape=[2**40, 2**40]))),
    "a negative shape": put(header(_entry(shape=[-1, -1]), b"1234")),
    "offsets that overlap": put(header(_entry() | {"b": _entry()["a"]}, b"1234")),
    "an unknown type": put(header(_entry(dtype="F4"), b"1234")),
    "a type that is a list": put(header(_entry(dtype=[]), b"1234")),
    "a list": put(header([])),
    "metadata that are a list": put(header({"__metadata__": []})),
    "an entry that is a number": put(header({"a": 1})),
    "no tensors": put(header({})),
    "bytes behind": put(header(_entry(), b"12345678")),
}


def changed(key: str, value: Any, *, sealed: bool = False) -> Spoil:
    """One value of a JSON document replaced, by dotted key; `sealed` writes its hashes again."""

    def spoil(path: Path) -> None:
        document = json.loads(path.read_bytes())
        table, *path_of, leaf = document, *key.split(".")
        for part in path_of:
            table = table[part]
        table[leaf] = value
        path.write_text(json.dumps(document))
        if sealed:
            reseal(path.parent)

    return spoil


def keys_of(document: dict[str, Any], depth: int = 2, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a document, of tables inside it too."""
    for name, value in document.items():
        yield f"{prefix}{name}"
        if depth > 1 and isinstance(value, dict):
            yield from keys_of(value, depth - 1, f"{prefix}{name}.")


# --- bombs ----------------------------------------------------------------------------------------


def packed(n_bytes: int, suffix: str) -> bytes:
    """Zero bytes of text, compressed as far as it goes."""
    if suffix == ".gz":
        made = io.BytesIO()
        with gzip.GzipFile(fileobj=made, mode="wb", compresslevel=9) as f:
            for _ in range(n_bytes // 2**20):
                f.write(b"word " * (2**20 // 5) + b"\n")
        return made.getvalue()
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as f:
        for _ in range(n_bytes // 2**20):
            f.write(b"a" * 2**20)
    return sink.getvalue().to_pybytes()


def parquet(path: Path, value: str, rows: int) -> None:
    """One value in every row, which the format stores once."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([value])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
