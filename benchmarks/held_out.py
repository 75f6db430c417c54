"""A text cut into what is trained on and what is held out, and the bits per byte of a run's
checkpoints on the latter.
"""

import os
from dataclasses import dataclass
from pathlib import Path

TAIL_FRAC = 0.1


@dataclass(frozen=True)
class Cut:
    """The two parts of a text."""

    head: str
    tail: str

    @property
    def tail_bytes(self) -> int:
        return len(self.tail.encode())


def cut(text: Path | None, held_out: Path | None) -> Cut:
    """The last tenth of the characters is held out, or all of another file.
    Without a text, the standard library's documentation.

    Raises SystemExit if a part is empty.
    """
    whole = text.read_text("utf-8") if text else standard_library()
    if held_out is None:
        at = int(len(whole) * (1 - TAIL_FRAC))
        parts = Cut(whole[:at], whole[at:])
    else:
        parts = Cut(whole, held_out.read_text("utf-8"))
    if not parts.head or not parts.tail:
        raise SystemExit(
            f"nothing to train on or nothing held out: {len(parts.head)} and {len(parts.tail)} "
            f"characters of {text}"
        )
    return parts


def standard_library() -> str:
    """The documentation of the running Python, in a fixed order."""
    from stackproof.config import StdlibDocs
    from stackproof.data.corpus import read_documents

    return "\n\n".join(document.text for document in read_documents(StdlibDocs()))


def use_threads(n: int) -> None:
    """Give torch `n` threads, here and in what this process starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(n)
    torch.set_num_threads(n)


def bits_per_byte_of(step_folder: Path, text: str) -> float:
    """Bits per byte of a checkpoint of ours on a text: every byte scored once, with at least half
    of the model's context before it.
    """
    from stackproof.cli.load_model import open_model
    from stackproof.evaluate.bits_per_byte import evaluate_text

    opened = open_model(step_folder)
    return evaluate_text(
        opened.model, opened.tokenizer, [text], seq_len=opened.cfg.model.max_seq_len
    ).bits_per_byte
