"""`stack doctor`: environment against what is needed."""

import importlib.util
import shutil
import sys

import typer

from stackproof.cli.output import Json, emit, stdout, table
from stackproof.spec.errors import EnvironmentUnfit

OPTIONAL = {
    "tiktoken": "faster batches, the extra data",
    "pyarrow": "parquet files, the extra data",
    "zstandard": ".zst files, the extra data",
    "datatrove": "builds on many machines, the extra scale",
    "transformers": "compares exports and imports, the extra hf",
}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(json: Json = False) -> None:
    """Compare this machine with what training needs. Exit code 7 if training cannot run here."""
    findings = list(_findings())
    ok = all(f["ok"] or not f["required"] for f in findings)
    if not emit({"ok": ok, "findings": findings}, json):
        stdout.print(
            table(
                "Environment",
                ["what", "found", "needed", "ok"],
                [
                    [f["what"], f["found"], f["needed"], "yes" if f["ok"] else "NO"]
                    for f in findings
                ],
            )
        )
    if not ok:
        missing = [f["what"] for f in findings if f["required"] and not f["ok"]]
        raise EnvironmentUnfit(
            f"training cannot run here: {', '.join(missing)}",
            next_step="pip install 'stackproof[train]'",
        )


def _findings():
    def finding(what: str, found: object, needed: str, ok: bool, required: bool = True) -> dict:
        return {
            "what": what,
            "found": str(found),
            "needed": needed,
            "ok": bool(ok),
            "required": required,
        }

    version = sys.version_info
    yield finding("python", ".".join(map(str, version[:3])), "3.11 or later", version >= (3, 11))
    for package in ("torch", "numpy", "safetensors", "tokenizers", "rensa"):
        found = importlib.util.find_spec(package) is not None
        yield finding(package, "installed" if found else "absent", "the extra train", found)
    for package, use in OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        yield finding(package, "installed" if found else "absent", use, found, required=False)
    yield finding(
        "git",
        shutil.which("git") or "absent",
        "for records that name their commit",
        shutil.which("git"),
        required=False,
    )
    free = shutil.disk_usage(".").free
    yield finding("free disk", f"{free / 2**30:.1f} GiB", "1 GiB for a pocket run", free > 2**30)
    if importlib.util.find_spec("torch"):
        yield from _torch_findings(finding)


def _torch_findings(finding):
    import torch

    short = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    yield finding("torch version", torch.__version__, "2.11 – 2.13", (2, 11) <= short <= (2, 13))
    cuda = torch.cuda.is_available()
    yield finding(
        "CUDA device",
        torch.cuda.get_device_name(0) if cuda else "none",
        "optional",
        True,
        required=False,
    )
    bf16 = (
        torch.cpu._is_avx512_bf16_supported()
        if hasattr(torch.cpu, "_is_avx512_bf16_supported")
        else False
    )
    yield finding(
        "bfloat16 units",
        cuda or bf16,
        "else train.dtype=float32 is faster",
        cuda or bf16,
        required=False,
    )
