"""Whatever is done to a document, its reader returns or raises a documented error."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stackproof import tensorfile
from stackproof.config import DataConfig, Files
from stackproof.config.data import BestFit, ByteTokenizer, Concatenated
from stackproof.config.load import load_config, load_mixture, recorded_config
from stackproof.contracts import backtest
from stackproof.data.prepare import open_folder, prepare
from stackproof.data.shard_table import write_blocks
from stackproof.data.tokenizer import load_tokenizer
from stackproof.evaluate.audit import Answer, graded
from stackproof.evaluate.stopping import StopRule
from stackproof.evaluate.suite import SUITES, load_suite
from stackproof.evidence import repro
from stackproof.export import gguf, reading, vocabulary
from stackproof.kernels import measured, parity
from stackproof.model import hugging_face
from stackproof.museum.plant import FOLDER as PLANTS
from stackproof.museum.plant import read_plants
from stackproof.recipes import depth, pocket
from stackproof.spec import ROOT
from stackproof.spec.archive import Archive
from stackproof.spec.canonical import (
    canonical_json,
    canonical_lines,
    parse_lines,
    parse_strict,
    sha256_bytes,
    sha256_file,
    sha256_json,
)
from stackproof.spec.errors import StackproofError
from stackproof.spec.failures import load_catalogue
from stackproof.spec.files import FileRefused
from stackproof.spec.findings import read_findings
from stackproof.spec.fingerprint import read_carried
from stackproof.spec.gates import Gate
from stackproof.spec.ledger import Ledger
from stackproof.spec.records import parse_record
from stackproof.spec.registry import read_registry
from stackproof.spec.releases import parse_releases
from stackproof.spec.tables import read_tables
from stackproof.train import checkpoint, sharded_checkpoint
from stackproof.train.run_dir import RunDir
from tests.fault_injection.mutations import of_bytes, of_json, of_lines, of_toml
from tests.fault_injection.scale import SEED, chance, scaled
from tests.site import small_repository

EVIDENCE = ROOT / "evidence"
DOCUMENTED = (StackproofError, FileRefused, tensorfile.BadTensorFile)
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass
class Target:
    """A reader of the file at `path`; `valid` is a document that it takes."""

    path: Path
    valid: bytes
    mutate: Mutation
    read: Callable[[bytes], object]

    def __call__(self, data: bytes) -> object:
        self.path.write_bytes(data)
        return self.read(data)


def _first_lines(path: Path, n: int) -> bytes:
    return b"".join(path.read_bytes().splitlines(keepends=True)[:n])


def _record() -> bytes:
    paths = sorted(EVIDENCE.glob("*/metadata.json"), key=lambda p: (p.stat().st_size, p.name))
    return next(p for p in paths if p.parent.name.startswith("train-")).read_bytes()


def strict(folder: Path) -> Target:
    parse = lambda data: parse_strict(data, origin="x")  # noqa: E731
    return Target(folder / "x.json", _record(), of_bytes, parse)


def lines(folder: Path) -> Target:
    valid = b'{"step": 1, "loss_nats": 2.5, "text": "a \\ud83d\\ude42"}\n\n{"step": 2}\n'
    return Target(folder / "x", valid, of_lines, lambda data: parse_lines(data, origin="x"))


def record(folder: Path) -> Target:
    return Target(folder / "x", _record(), of_json, lambda data: parse_record(data, origin="x"))


def ledger(folder: Path) -> Target:
    def read(data: bytes) -> None:
        made = Ledger(folder)
        made.problems(), made.entries(), made.head

    return Target(
        folder / "ledger.jsonl", _first_lines(EVIDENCE / "ledger.jsonl", 3), of_lines, read
    )


def archive(folder: Path) -> Target:
    valid = _first_lines(EVIDENCE / "archive.jsonl", 3)
    read = lambda data: (Archive(folder).lines, Archive(folder).by_file)  # noqa: E731
    return Target(folder / "archive.jsonl", valid, of_lines, read)


def releases(folder: Path) -> Target:
    valid = b"".join((ROOT / "spec/releases.jsonl").read_bytes().splitlines(keepends=True)[:2])
    return Target(folder / "x", valid, of_lines, lambda data: parse_releases(data, origin="x"))


def carried(folder: Path) -> Target:
    path = folder / "carried.jsonl"
    valid = _first_lines(ROOT / "spec/carried.jsonl", 3)
    return Target(path, valid, of_lines, lambda data: read_carried(path))


def run_json(folder: Path) -> Target:
    found = parse_strict(_record(), origin="x")
    kept = ("config", "overrides", "environment", "code", "command", "started_at")
    document = {k: found[k] for k in kept} | {
        "record": found["id"],
        "device": "cpu",
        "inherited_s": 0.0,
    }
    read = lambda data: recorded_config(RunDir(folder).read_run()["config"])  # noqa: E731
    return Target(folder / "run.json", canonical_json(document), of_json, read)


def run_lines(folder: Path) -> Target:
    valid = b'{"step":1,"loss_nats":2.5}\n{"gate":"loss.first"}\n{"step":2,"loss_nats":2.0}\n'
    read = lambda data: list(RunDir(folder).lines("metrics.jsonl"))  # noqa: E731
    return Target(folder / "metrics.jsonl", valid, of_lines, read)


def rewound(folder: Path) -> Target:
    valid = b'{"step":1,"loss_nats":2.5}\n{"gate":"loss.first"}\n{"step":2,"loss_nats":2.0}\n'
    read = lambda data: RunDir(folder).rewind(1)  # noqa: E731
    return Target(folder / "metrics.jsonl", valid, of_lines, read)


def _checkpoint(folder: Path) -> Path:
    """A folder with the four files of a checkpoint; its state has every key."""
    step = folder / "step-00000001"
    step.mkdir()
    zeros = {"w": torch.zeros(2, 3)}
    files = {}
    for name in checkpoint.FILES:
        if name.endswith(".json"):
            document = dict.fromkeys(checkpoint.STATE_KEYS, 1)
            document |= {key: {} for key in "config best curriculum scaler gates".split()}
            document |= dict.fromkeys("schema tokenizer_sha256".split(), "x")
            document |= {"record": "train-20260101T000000Z-00000000"}
            document |= {"stopper": StopRule(1, 1, 0.0, 0.0).state_dict()}
            document |= {"config_sha256": sha256_json({}), "run": None}
            (step / name).write_bytes(canonical_json(document))
        else:
            tensorfile.write(step / name, zeros, {})
        data = (step / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        if name.endswith(".safetensors"):
            files[name]["crc32"] = tensorfile.digests(step / name)[1]
    manifest = {"schema": checkpoint.SCHEMA, "files": files}
    (step / "manifest.json").write_bytes(canonical_json(manifest))
    return step


def manifest(folder: Path) -> Target:
    step = _checkpoint(folder)
    path = step / "manifest.json"
    return Target(path, path.read_bytes(), of_json, lambda data: checkpoint.load(step))


def state(folder: Path) -> Target:
    step = _checkpoint(folder)
    path, told = step / "state.json", json.loads((step / "manifest.json").read_bytes())

    def read(data: bytes) -> object:
        told["files"]["state.json"] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        (step / "manifest.json").write_bytes(canonical_json(told))
        return checkpoint.load(step)

    return Target(path, path.read_bytes(), of_json, read)


def pointer(folder: Path) -> Target:
    step = _checkpoint(folder)
    path = folder / "latest"
    return Target(path, step.name.encode(), of_bytes, lambda data: checkpoint.find(folder))


def of_header(data: bytes, random: random.Random) -> bytes:
    """A damaged tensor file: mostly its header."""
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.3:
        return of_bytes(data, random)
    header = of_json(data[8 : 8 + size], random)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def tensors(folder: Path) -> Target:
    path = folder / "x.safetensors"
    tensorfile.write(path, {"a": torch.zeros(2, 3), "b": torch.ones(4).bfloat16()}, {"k": "v"})
    return Target(path, path.read_bytes(), of_header, lambda data: tensorfile.digests(path))


def places(folder: Path) -> Target:
    """The header by which a file of the sharded layout states where its parts begin."""
    parts = {"a": {"saved_offsets": [0, 0]}, "b": {"saved_offsets": [0]}}
    path, metadata = folder / "x.safetensors", {"DCP_SHARDING_INFO": json.dumps(parts)}
    tensorfile.write(path, {"a": torch.zeros(2, 3), "b": torch.ones(4)}, metadata)

    def of_places(data: bytes, chance: random.Random) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        stated = of_json(json.dumps(parts).encode(), chance).decode(errors="replace")
        header["__metadata__"] = {"DCP_SHARDING_INFO": stated}
        damaged = json.dumps(header).encode()
        return len(damaged).to_bytes(8, "little") + damaged + data[8 + size :]

    return Target(path, path.read_bytes(), of_places, lambda data: sharded_checkpoint.parts(folder))


def tokenizer(folder: Path) -> Target:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    document = json.loads(inner.to_str())
    from tokenizers import decoders

    inner.decoder = decoders.ByteLevel()
    document = json.loads(inner.to_str())

    def read(data: bytes) -> object:
        made = load_tokenizer(path)
        return made.decode(made.encode("ab <|endoftext|> ü").ids)

    return Target(path, json.dumps(document).encode(), of_json, read)


def own_tokenizer(folder: Path) -> Target:
    path = folder / "tokenizer.json"
    valid = b'{"stackproof_tokenizer": "char", "symbols": "abc \\u00fc"}'
    return Target(path, valid, of_json, lambda data: load_tokenizer(path))


def their_config(folder: Path) -> Target:
    cfg = pocket().model
    kind = hugging_face.kind_for(cfg)
    document = hugging_face.config_document(kind, cfg, 384, 0, "float32")
    tensorfile.write(folder / "model.safetensors", {"w": torch.zeros(2)}, {})
    path = folder / "config.json"
    read = lambda data: reading.open_folder(folder)  # noqa: E731
    return Target(path, json.dumps(document).encode(), of_json, read)


def their_index(folder: Path) -> Target:
    document = hugging_face.config_document(
        hugging_face.kind_for(pocket().model), pocket().model, 384, 0, "float32"
    )
    (folder / "config.json").write_text(json.dumps(document))
    tensorfile.write(folder / "a.safetensors", {"w": torch.zeros(2)}, {})
    valid = json.dumps(hugging_face.index_document({"w": "a.safetensors"}, 8)).encode()
    path = folder / hugging_face.INDEX
    return Target(path, valid, of_json, lambda data: reading.open_folder(folder))


def their_settings(folder: Path) -> Target:
    path = folder / "tokenizer_config.json"
    valid = b'{"eos_token": {"content": "</s>"}, "bos_token": null, "add_bos_token": true}'

    def read(data: bytes) -> object:
        found = vocabulary.settings(folder)
        return hugging_face.end_of_text({"eos_token_id": 0}, found)

    return Target(path, valid, of_json, read)


def gguf_header(folder: Path) -> Target:
    text = lambda t: struct.pack("<Q", len(t)) + t  # noqa: E731
    number = text(b"llama.block_count") + struct.pack("<II", 4, 2)
    name = text(b"general.name") + struct.pack("<I", 8) + text(b"small")
    words = text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc")
    tensor = text(b"w") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    valid = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + number + name + words + tensor + bytes(64)
    path = folder / "model.gguf"
    return Target(path, valid, of_bytes, lambda data: gguf.read_header(path))


def suite(folder: Path) -> Target:
    path = folder / "suite.toml"
    valid = (SUITES / "domains.toml").read_bytes()
    return Target(path, valid, of_toml, lambda data: load_suite(path))


def mixture(folder: Path) -> Target:
    path = folder / "mixture.toml"
    text = (ROOT / "docs/mixtures.md").read_text("utf-8").split("```toml\n")[1].split("```")[0]
    return Target(path, text.encode(), of_toml, lambda data: load_mixture(path))


def run_file(folder: Path) -> Target:
    path = folder / "run.toml"
    valid = b"[optim]\nlr = 1e-3\n[train]\nlog_every = 20\n[data.corpus]\nkind = 'pangram'\n"
    read = lambda data: load_config(pocket(), run_file=path)  # noqa: E731
    return Target(path, valid, of_toml, read)


def settings(folder: Path) -> Target:
    texts = [b"optim.lr=1e-3", b'data.corpus.paths=["a"]', b"model.ffn.kind=moe", b"seed=3"]

    def mutate(data: bytes, random: random.Random) -> bytes:
        return of_bytes(random.choice(texts), random)

    def read(data: bytes) -> object:
        return load_config(pocket(), sets=(data.decode("utf-8", "surrogateescape"),))

    return Target(folder / "x", texts[0], mutate, read)


def gates(folder: Path) -> Target:
    path = folder / "loss.toml"
    valid = (ROOT / "spec/gates/loss.toml").read_bytes()
    return Target(path, valid, of_toml, lambda data: read_tables(path, "gate", Gate))


def plants(folder: Path) -> Target:
    valid = (PLANTS / "loss.toml").read_bytes()
    return Target(folder / "loss.toml", valid, of_toml, lambda data: read_plants(folder))


def failures(folder: Path) -> Target:
    (folder / "spec/failures").mkdir(parents=True)
    path = folder / "spec/failures/loss.toml"

    def read(data: bytes) -> object:
        load_catalogue.__globals__["_load"].cache_clear()
        return load_catalogue(folder)

    return Target(path, (ROOT / "spec/failures/loss.toml").read_bytes(), of_toml, read)


def findings(folder: Path) -> Target:
    path = folder / "findings.toml"
    valid = (EVIDENCE / "findings.toml").read_bytes()
    return Target(path, valid, of_toml, lambda data: read_findings(path))


def registry(folder: Path) -> Target:
    small_repository.write_repository(folder / "r")
    small_repository.add_release(folder / "r", [])
    path = folder / "registry.toml"
    valid = (folder / "r/evidence/registry.toml").read_bytes()
    return Target(path, valid, of_toml, lambda data: read_registry(path))


def answers(folder: Path) -> Target:
    path = folder / "audits.jsonl"
    line = {"step": 1, "domain": "d", "prompt": "p", "text": "t", "passed": True, "grade": 0.5}
    valid = canonical_json(line) + b"\n" + canonical_json(line | {"grade": None}) + b"\n"
    answer = Answer(1, "d", "p", "asked", (7,), "t", True, (), 0, 0)
    return Target(path, valid, of_lines, lambda data: graded([answer], path))


def bundle(folder: Path) -> Target:
    """The document of a repro bundle, with every key."""
    found, gate = parse_record(_record(), origin="x"), "runtime.finite"
    plan = dict.fromkeys(repro.Plan.model_fields, 1) | {"peak_lrs": {"all": 1}, "untrained": True}
    plan |= {"schedule": {}, "order": "", "drawn": [1], "warmup_sources": ["a"]}
    plan |= {"sources": [{"name": "a", "first": 0, "n_windows": 9, "cap": 1, "floor": 0}]}
    plan |= {"intervals": {"Saved": [1, "checkpoint.every"]}, "expert_layers": 0}
    batch = dict.fromkeys(("epoch", "cursor_before", "cursor_after"), 1)
    batch |= {key: [0] for key in ("sample_ids", "sources", "epochs")}
    path, tensors = folder / repro.DOCUMENT, folder / repro.TENSORS
    tensorfile.write(tensors, {"step-00000001.0.input_ids": torch.zeros(1, 8)}, {})
    document = dict.fromkeys(repro.Bundle.model_fields, "") | found.model_dump(
        include={"code", "environment", "config"}
    )
    document.pop("schema_")
    document |= dict.fromkeys(
        ("step", "threads", "vocab_size", "peak_flops", "flops_per_step", "n_held_out"), 1
    )
    state = {"checks": 1, "heartbeat": 1, "watcher": {"recent": []}, "outcome": "fail"}
    document |= {"schema": repro.SCHEMA, "gate": gate, "fingerprint": "0" * 64, "device": "cpu"}
    document |= {"measured": {"loss_nats": "nan", "found_frac": 0.5}, "limits": {"nan_max": 0}}
    document |= {"nonfinite": {"parameters": ["w"]}, "record": found.id, "continued": False}
    document |= {"base": {"kind": "seed", "step": 0}, "plan": plan, "gates": {gate: state}}
    document |= {"steps": [{"step": 1, "cursor": 1, "batches": [batch]}], "command": ["stack"]}
    document |= {"files": {tensors.name: {"sha256": sha256_file(tensors), "bytes": 9}}}
    read = lambda data: repro.read_bundle(folder)  # noqa: E731
    return Target(path, canonical_json(document), of_json, read)


def log(folder: Path) -> Target:
    path = folder / "metrics.jsonl"
    line = {"loss_nats": 2.5, "val_loss_nats": 2.6, "ema_loss_nats": "NaN", "grad_norm": 0.5}
    line |= {"tokens_per_s": 9.5, "text": "so it is " * 9, "language": "en"}
    line |= {"lr": 0.1, "parts": {"words": 1}}
    valid = canonical_lines(line | {"step": n, "tokens_seen": 8 * n} for n in range(9))

    def read(data: bytes) -> object:
        gates = list(backtest.REPLAYABLE)
        return backtest.replay(gates[len(data) % len(gates)], path)

    return Target(path, valid, of_lines, read)


def _data_set(folder: Path) -> tuple[Path, DataConfig]:
    text = folder / "t.txt"
    text.write_text("".join(f"document number {n} says something\n" for n in range(200)))
    cfg = DataConfig(corpus=Files(paths=(str(text),), documents="line"), tokenizer=ByteTokenizer())
    return prepare(cfg, cache_dir=folder / "cache").directory, cfg


def data_set(folder: Path) -> Target:
    made, cfg = _data_set(folder)
    path = made / "manifest.json"

    def read(data: bytes) -> None:
        depth.corpus_of(made)
        found = open_folder(made, cfg)
        for split in (found.train, found.validation):
            split.token_range(0, split.n_tokens)

    return Target(path, path.read_bytes(), of_json, read)


def shard(folder: Path) -> Target:
    """A shard of which the manifest states the hash."""
    made, cfg = _data_set(folder)
    manifest = json.loads((made / "manifest.json").read_bytes())
    entry = manifest["splits"]["train"]["shards"][0]
    path = made / entry["path"]

    def read(data: bytes) -> None:
        entry.update(bytes=len(data), sha256=sha256_bytes(data))
        (made / "manifest.json").write_bytes(canonical_json(manifest))
        for how in (Concatenated(), BestFit()):
            found = open_folder(made, cfg.model_copy(update={"packing": how}))
            found.train.rows([0, 1], 16), found.train.document_hashes
            list(found.sample_documents(0.1, 3))

    return Target(path, path.read_bytes(), of_header, read)


def block(folder: Path) -> Target:
    """A block of shards of which the manifest states the hash."""
    made, cfg = _data_set(folder)
    manifest = json.loads((made / "manifest.json").read_bytes())
    split = manifest["splits"]["train"]
    split["shards"] = write_blocks(made, "train", split["shards"])
    path = made / split["shards"][0]["path"]

    def read(data: bytes) -> None:
        split["shards"][0].update(bytes=len(data), sha256=sha256_bytes(data))
        (made / "manifest.json").write_bytes(canonical_json(manifest))
        found = open_folder(made, cfg.model_copy(update={"verify": "drawn"}))
        found.train.rows([0, 1], 16), found.train.document_hashes

    return Target(path, path.read_bytes(), of_bytes, read)


def kernels(folder: Path) -> Target:
    path = folder / measured.FILE
    one = {"device": "cpu", "made_at": "x", "versions": {"torch": "2"}, "sha256": {"a": {"b": "c"}}}
    document = {"schema": "stackproof.kernels/1", "devices": {"cpu": one | {"winners": {}}}}

    def read(data: bytes) -> None:
        if measured.read(folder, "cpu") is None:  # as without a file: it is measured again
            raise StackproofError("unreadable")

    return Target(path, canonical_json(document), of_json, read)


def kernel_parity(folder: Path) -> Target:
    path = folder / "parity.json"
    valid = parity.FILE.read_bytes() if parity.FILE.is_file() else b"{}"

    def read(data: bytes) -> None:
        parity.why_not.cache_clear()
        parity.why_not(next(iter(parity.SOURCES)), file=path)

    return Target(path, valid, of_json, read)


TARGETS = (
    *(strict, lines, record, ledger, archive, releases, carried, run_json, run_lines, rewound),
    *(
        manifest,
        state,
        pointer,
        tensors,
        places,
        tokenizer,
        own_tokenizer,
        their_config,
        their_index,
    ),
    *(
        their_settings,
        gguf_header,
        suite,
        mixture,
        run_file,
        settings,
        gates,
        plants,
        failures,
        findings,
    ),
    *(registry, answers, bundle, log, data_set, shard, block, kernels, kernel_parity),
)


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_every_damage_is_a_documented_error(make, tmp_path):
    target, random = make(tmp_path), chance(make.__name__)
    target(target.valid)
    read = 0
    for number in range(scaled(300, 100_000)):
        data = target.mutate(target.valid, random)
        try:
            target(data)
            read += 1
        except DOCUMENTED as e:
            str(e).encode("utf-8", "backslashreplace")
        except BaseException as e:
            shown = f"round {number} with SEED={SEED}: {type(e).__name__}: {e}"
            raise AssertionError(f"{shown}\n{make.__name__}({data!r})") from e
    assert read < scaled(300, 100_000), "no mutation damages anything"


def test_the_panic_of_the_tokenizers_library_is_a_documented_error(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(data, document, eos_token):
        raise PanicException("range end index 18446744073709551614 out of range")

    target = own_tokenizer(tmp_path)
    monkeypatch.setattr("stackproof.data.tokenizer._parse", panic)
    with pytest.raises(StackproofError, match="range end index"):
        target(target.valid)
