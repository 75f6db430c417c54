"""Gates of exports and imports: a folder is complete, computes what the model computes, and its
bytes are those that were compared.

B batch, T tokens, V vocab
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.gate import Verdict, decide, decides, failed, passed

DOCUMENTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
BYTES = {"F32": 4, "BF16": 2}
# of a long row the last ones are compared: memory of logits stays bounded,
# and every length has its own row
SHOWN_POSITIONS = 512
CONTINUED_TOKENS = 16


def _header(path: Path) -> dict[str, dict]:
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


@decides("export.complete")
def complete(
    limits: SimpleNamespace, *, export_dir: Path, live_shapes: Sequence[Sequence[int]], dtype: str
) -> Verdict:
    """All documents, every weight once and of the declared type, an index that says what is there,
    and nothing else.

    `live_shapes` are those of the model's tensors in memory,
    `dtype` the declared one as safetensors writes it.
    """
    if missing := [name for name in DOCUMENTS if not (export_dir / name).is_file()]:
        return failed(f"the folder lacks {', '.join(missing)}", missing_files=len(missing))
    shards = {p.name: _header(p) for p in sorted(export_dir.glob("*.safetensors"))}
    indices = sorted(export_dir.glob("*.index.json"))
    strangers = {p.name for p in export_dir.iterdir()} - {
        *DOCUMENTS,
        *shards,
        *(p.name for p in indices),
        "README.md",
    }
    if strangers:
        return failed(
            f"the folder holds files nobody declared: {', '.join(sorted(strangers))}",
            strangers=len(strangers),
        )
    if problem := _index_problem(shards, indices):
        return failed(problem, shards=len(shards))
    entries = [entry for header in shards.values() for entry in header.values()]
    if other := sorted({e["dtype"] for e in entries} - {dtype}):
        return failed(f"weights are {', '.join(other)}, declared is {dtype}", dtypes=len(other))
    stored, live = sum(_numel(e["shape"]) for e in entries), sum(map(_numel, live_shapes))
    return decide(
        stored == live,
        f"the files hold {stored} weights, the model {live}",
        stored_weights=stored,
        shards=len(shards),
    )


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _index_problem(shards: Mapping[str, Mapping], indices: Sequence[Path]) -> str:
    """What an index says that the files do not, or the other way round; empty if they agree."""
    if not indices:
        return "" if len(shards) == 1 else f"{len(shards)} weight files and no index"
    document = json.loads(indices[0].read_bytes())
    told = {(name, file) for name, file in document["weight_map"].items()}
    held = {(name, file) for file, header in shards.items() for name in header}
    if odd := sorted(told ^ held):
        return f"index and files disagree on {len(odd)} tensors, first {odd[0][0]} in {odd[0][1]}"
    n_bytes = sum(
        BYTES.get(e["dtype"], 0) * _numel(e["shape"])
        for header in shards.values()
        for e in header.values()
    )
    return (
        ""
        if document["metadata"]["total_size"] == n_bytes
        else f"the index counts {document['metadata']['total_size']} bytes"
    )


@decides("export.logit-parity")
def logit_parity(
    limits: SimpleNamespace,
    *,
    our_logits: Callable[[Tensor, int], Tensor],
    their_logits: Callable[[Tensor, int], Tensor],
    our_continuation: Callable[[list[int], int], list[int]],
    their_continuation: Callable[[list[int], int], list[int]],
    their_complaints: str,
    max_seq_len: int,
    vocab_size: int,
) -> Verdict:
    """The other library, reading the folder, gives the model's logits at five lengths up to the
    longest, and the same greedy text.

    `*_logits(ids_BT, last)` return the logits of the last positions, (B, ≤ last, V) float32.
    `their_complaints` is what the other library says it could not place.
    """
    if their_complaints:
        return failed(f"the other library complains: {their_complaints}")
    worst, scaled, flips, compared = 0.0, 0.0, 0, 0
    lengths = sorted({max(1, max_seq_len * part // 40) for part in (1, 5, 10, 20, 40)})
    for length in lengths:
        ids_1T = torch.randint(
            0, vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
        )
        ours_TV, theirs_TV = (
            our_logits(ids_1T, SHOWN_POSITIONS)[0].float(),
            their_logits(ids_1T, SHOWN_POSITIONS)[0].float(),
        )
        if ours_TV.shape != theirs_TV.shape or not theirs_TV.isfinite().all():
            return failed(
                f"at length {length} the logits cannot be compared: {tuple(ours_TV.shape)} and "
                f"{tuple(theirs_TV.shape)}"
            )
        error = float((ours_TV - theirs_TV).abs().max())
        worst = max(worst, error)
        scaled = max(
            scaled,
            error
            / max(1.0, float(ours_TV.abs().max()))
            / max(1.0, length / limits.float32_positions),
        )
        flips += int((ours_TV.argmax(-1) != theirs_TV.argmax(-1)).sum())
        compared += len(ours_TV)
    prompt = ids_1T[0, : max(1, max_seq_len // 4)].tolist()
    n_new = min(CONTINUED_TOKENS, max_seq_len - len(prompt))
    same = our_continuation(prompt, n_new) == their_continuation(prompt, n_new)
    return decide(
        scaled <= limits.scaled_error_max and flips <= limits.argmax_differences_max and same,
        f"logits differ by {worst:.3g}, {flips} of {compared} next tokens differ, greedy text "
        f"{'is equal' if same else 'differs'}",
        logit_abs_error=worst,
        scaled_error=scaled,
        argmax_differences=flips,
        lengths=" ".join(map(str, lengths)),
        positions=compared,
        greedy_equal=same,
    )


@decides("export.compared-bytes")
def compared_bytes(
    limits: SimpleNamespace, *, export_dir: Path, compared_sha256: Mapping[str, str]
) -> Verdict:
    """The weight files that are released are, byte for byte, those that the other library had
    read when it was compared.
    """
    now = _weights_sha256(export_dir)
    if odd := sorted(
        n for n in now.keys() | compared_sha256.keys() if now.get(n) != compared_sha256.get(n)
    ):
        return failed(f"{', '.join(odd)} is not what was compared", changed_files=len(odd))
    return passed("", changed_files=0, files=len(now))
