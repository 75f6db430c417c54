"""Largest difference of logits between this stack and transformers, per kind and length,
as the table of docs/export.md.

python benchmarks/hf_parity.py            prints the table
python benchmarks/hf_parity.py --write    writes it into docs/export.md
"""

import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from stackproof.data.tokenizer import Bytes
from stackproof.export import huggingface, reading
from stackproof.model import hugging_face
from tests.export import models

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
MARKS = ("<!-- measured: benchmarks/hf_parity.py -->\n", "<!-- /measured -->")


def compared(model, other) -> dict[int, float]:
    """Worst difference by length. Ends the program where next tokens or greedy text differ."""
    if not models.same_greedy_text(model, other):
        sys.exit(f"the greedy text of {type(other).__name__} differs")
    return models.differences(model, other)


def rows():
    """(direction, model, kind, worst difference by length) of every model of the tests."""
    for name in models.THEIRS:
        with tempfile.TemporaryDirectory() as folder:
            other = models.theirs(name)
            other.save_pretrained(folder)
            source = reading.open_folder(Path(folder))
            yield (
                "import",
                name,
                source.kind.architecture,
                compared(reading.load_weights(source), other),
            )
    for name in models.OURS:
        with tempfile.TemporaryDirectory() as folder:
            model = models.ours(name, Bytes().vocab_size)
            kind = hugging_face.kind_for(model.cfg)
            huggingface.write_documents(Path(folder), kind, model, Bytes(), "float32")
            huggingface.write_weights(Path(folder), kind, model, "float32", 2**30)
            other = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
            yield "export", name, kind.architecture, compared(model, other)


def table() -> str:
    """Markdown, with the versions it was measured with."""
    lengths = models.LENGTHS
    lines = [
        "| | model | kind | " + " | ".join(f"{n} tokens" for n in lengths) + " |",
        "|---" * (3 + len(lengths)) + "|",
    ]
    for direction, name, kind, worst in rows():
        lines.append(
            f"| {direction} | {name} | `{kind}` | "
            + " | ".join(f"{worst[n]:.1e}" for n in lengths)
            + " |"
        )
    versions = (
        f"Measured with torch {torch.__version__} and transformers {transformers.__version__}, "
        "float32 on a CPU, one thread."
    )
    return f"\n{versions}\n\n" + "\n".join(lines) + "\n\n"


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    made = table()
    if "--write" not in sys.argv[1:]:
        print(made)
        return
    pattern = re.compile(f"({re.escape(MARKS[0])}).*?({re.escape(MARKS[1])})", re.S)
    PAGE.write_text(pattern.sub(lambda m: m[1] + made + m[2], PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
