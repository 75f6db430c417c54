"""Gates of exports and imports: a folder is complete, computes what the model computes, and its
bytes are those that were compared.

B batch, T tokens, V vocab
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from stackproof.contracts.export_documents import DOCUMENTS, wrong_settings
from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run, worst
from stackproof.contracts.subject import Subject, offered

BYTES = {"F32": 4, "BF16": 2}
# of a long row the last ones are compared: memory of logits stays bounded,
# and every length has its own row
SHOWN_POSITIONS = 512
CONTINUED_TOKENS = 16


def header_of(path: Path) -> dict[str, dict]:
    """Declarations of a safetensors file, read with nothing but the format's definition."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _weights_sha256(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as f:
            hashes[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return hashes


@decides("export.logit-parity")
def logit_parity(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The other library, reading the folder, gives the model's logits at five lengths up to the
    longest, and the same greedy text.
    """
    exported = subject.exported
    their_complaints, max_seq_len = exported.their_complaints, exported.max_length
    if their_complaints:
        return failed(f"the other library complains: {their_complaints}")
    ours, theirs = exported.ours, exported.theirs
    largest, scaled, flips, compared = 0.0, 0.0, 0, 0
    lengths = sorted({max(1, max_seq_len * part // 40) for part in (1, 5, 10, 20, 40)})
    for length in lengths:
        ids_1T = torch.randint(
            0, exported.vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
        )
        ours_TV, theirs_TV = (
            ours.logits(ids_1T, SHOWN_POSITIONS)[0].float(),
            theirs.logits(ids_1T, SHOWN_POSITIONS)[0].float(),
        )
        if ours_TV.shape != theirs_TV.shape or not theirs_TV.isfinite().all():
            return failed(
                f"at length {length} the logits cannot be compared: {tuple(ours_TV.shape)} and "
                f"{tuple(theirs_TV.shape)}"
            )
        error = float((ours_TV - theirs_TV).abs().max())
        largest = worst((largest, error))
        rel_error = error / max(1.0, float(ours_TV.abs().max()))
        scaled = worst((scaled, rel_error / max(1.0, length / limits.float32_positions)))
        flips += int((ours_TV.argmax(-1) != theirs_TV.argmax(-1)).sum())
        compared += len(ours_TV)
    prompt = ids_1T[0, : max(1, max_seq_len // 4)].tolist()
    n_new = min(CONTINUED_TOKENS, max_seq_len - len(prompt))
    same = ours.continuation(prompt, n_new) == theirs.continuation(prompt, n_new)
    return decide(
        scaled <= limits.scaled_error_max and flips <= limits.argmax_differences_max and same,
        f"logits differ by {largest:.3g}, {flips} of {compared} next tokens differ, greedy text "
        f"{'is equal' if same else 'differs'}",
        logit_abs_error=largest,
        scaled_error=scaled,
        argmax_differences=flips,
        lengths=" ".join(map(str, lengths)),
        positions=compared,
        greedy_equal=same,
    )


@decides("export.folder")
def folder(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """All documents with the settings of the model and its tokenizer, every weight once and of the
    declared dtype, an index that agrees with the files, and nothing else; every weight file is,
    byte for byte, the one that the other library had read when it was compared.

    Without the other library a complete folder is `not_run`, since nothing was compared.
    """
    exported, path = subject.exported, subject.exported.folder
    if missing := [name for name in DOCUMENTS if not (path / name).is_file()]:
        return failed(f"the folder lacks {', '.join(missing)}", missing_files=len(missing))
    shards = {p.name: header_of(p) for p in sorted(path.glob("*.safetensors"))}
    indices = sorted(path.glob("*.index.json"))
    declared = {*DOCUMENTS, *shards, *(p.name for p in indices), "README.md"}
    if strangers := sorted({p.name for p in path.iterdir()} - declared):
        return failed(
            f"the folder holds undeclared files: {', '.join(strangers)}", strangers=len(strangers)
        )
    if problem := _index_problem(shards, indices):
        return failed(problem, shards=len(shards))
    entries = [entry for header in shards.values() for entry in header.values()]
    if other := sorted({e["dtype"] for e in entries} - {exported.dtype}):
        return failed(
            f"weights are {', '.join(other)}, declared is {exported.dtype}", dtypes=len(other)
        )
    if wrong := wrong_settings(path, exported):
        return failed(f"{wrong[0]} (of {len(wrong)})", wrong_settings=len(wrong))
    compared = offered(lambda: exported.compared_sha256)
    changed = [] if compared is None else _changed(_weights_sha256(path), compared)
    stored = sum(n_entries(e["shape"]) for e in entries)
    live = sum(map(n_entries, exported.live_shapes))
    verdict = decide(
        stored == live and not changed,
        f"{', '.join(changed)} is not what was compared"
        if changed
        else f"the files hold {stored} weights, the model {live}",
        stored_weights=stored,
        shards=len(shards),
        compared=compared is not None,
        changed_files=len(changed),
    )
    if verdict.passed and compared is None:
        return not_run(
            "the folder is complete; it was not compared: the other library is not installed"
        )
    return verdict


def _changed(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Names of files whose hashes differ, or that are on one side only."""
    return sorted(n for n in now.keys() | then.keys() if now.get(n) != then.get(n))


def n_entries(shape: Sequence[int]) -> int:
    """Number of entries of a tensor."""
    n = 1
    for size in shape:
        n *= size
    return n


def _index_problem(shards: Mapping[str, Mapping], indices: Sequence[Path]) -> str:
    """How an index and the files differ; empty if they agree."""
    if not indices:
        return "" if len(shards) == 1 else f"{len(shards)} weight files and no index"
    document = json.loads(indices[0].read_bytes())
    indexed = {(name, file) for name, file in document["weight_map"].items()}
    held = {(name, file) for file, header in shards.items() for name in header}
    if odd := sorted(indexed ^ held):
        return f"index and files disagree on {len(odd)} tensors, first {odd[0][0]} in {odd[0][1]}"
    n_bytes = sum(
        BYTES.get(e["dtype"], 0) * n_entries(e["shape"])
        for header in shards.values()
        for e in header.values()
    )
    return (
        ""
        if document["metadata"]["total_size"] == n_bytes
        else f"the index counts {document['metadata']['total_size']} bytes"
    )
