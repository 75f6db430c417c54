"""Gate of opened checkpoints: a command uses the weights of the checkpoint that it names.

Read with nothing but the format's definition; the loader of the trainer takes no part.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.gate import Verdict, decide_all, decides, first_of
from stackproof.contracts.model import table_error
from stackproof.contracts.subject import OpenedCheckpoint, Subject, offered

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHTS = "model.safetensors"


@decides("checkpoint.opened")
def opened(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The model in memory holds every tensor of the named step folder, bit for bit, in evaluation
    mode; of a run the folder is that of `latest`; the stated step is that of the folder. Rotary
    tables, which no file holds, are those of the definition.
    """
    found = subject.opened
    live = {name: t.detach().cpu() for name, t in found.model.state_dict().items()}
    differing, names = [], set()
    for name, stored in _stored(found):
        names.add(name)
        if name not in live or not _equal(live[name], stored):
            differing.append(name)
    differing += sorted(live.keys() - names)
    state = json.loads((found.folder / "state.json").read_bytes())
    tables_off = table_error(found.rotary_tables, found.architecture)
    named, training = _named(found.asked), [n for n, m in found.model.named_modules() if m.training]
    return decide_all(
        [
            len(differing) > limits.differing_max
            and f"{len(differing)} tensors are not those of the files: {first_of(differing)}",
            not names and "no tensor was compared",
            not tables_off <= limits.table_abs_error_max
            and "rotary tables differ from the definition",
            bool(training) and f"{len(training)} modules are in training mode",
            named != found.folder.name
            and f"the checkpoint is {found.folder.name}, `latest` names {named}",
            found.stated_step != state["step"]
            and f"step {found.stated_step} is stated, the weights are of step {state['step']}",
            found.folder.name != f"step-{state['step']:08d}"
            and f"{found.folder.name} holds step {state['step']}",
            found.tokenizer_sha256 != state["tokenizer_sha256"]
            and "the tokenizer is not that of the checkpoint",
        ],
        f"{found.folder}: ",
        differing=len(differing),
        table_abs_error=tables_off,
        compared=len(names),
    )


def _named(asked: Path) -> str:
    """The step folder that a path stands for: itself, that of `latest`, or else the newest."""
    if (asked / "manifest.json").is_file():
        return asked.resolve().name
    root = asked / "checkpoints" if (asked / "checkpoints").is_dir() else asked
    if (root / "latest").is_file():
        return (root / "latest").read_text("ascii").strip()
    return max(p.name for p in root.glob("step-*") if (p / "manifest.json").is_file())


def _stored(found: OpenedCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, one at a time. Those that several files divide are assembled by the
    adapter.
    """
    assembled: Mapping[str, Tensor] | None = offered(lambda: found.assembled)
    if assembled is not None:
        yield from assembled.items()
        return
    path = found.folder / WEIGHTS
    manifest = json.loads((found.folder / "manifest.json").read_bytes())["files"]
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if hashlib.sha256(data).hexdigest() != manifest[WEIGHTS]["sha256"]:
            yield f"{WEIGHTS}, by its hash", torch.empty(0)
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                flat = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]])
                yield name, flat.view(entry["shape"])


def _equal(live: Tensor, stored: Tensor) -> bool:
    """Whether two tensors are equal in every bit."""
    same = live.dtype == stored.dtype and live.shape == stored.shape
    return same and bool((_bits(live) == _bits(stored)).all())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
