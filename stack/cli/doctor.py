"""`stack doctor`: the environment against the requirements, and the kernels of this device."""

import importlib.util
import shutil
import sys
from typing import Annotated, Any

import typer

from stackproof.cli.output import Json, emit, stdout, table
from stackproof.spec.errors import EnvironmentUnfit

OPTIONAL = {
    "tiktoken": "faster batches, the extra data",
    "pyarrow": "parquet and .zst files, the extra data",
    "datatrove": "builds on many machines, the extra scale",
    "transformers": "compares exports and imports, the extra hf",
}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compare all kernels on this device; train.kernels=auto then takes the fastest.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Compare this machine with the requirements of training. Exit code 7 if training cannot run
    here.
    """
    findings = list(_findings())
    ok = all(f["ok"] or not f["required"] for f in findings)
    document: dict[str, Any] = {"ok": ok, "findings": findings}
    if importlib.util.find_spec("torch"):
        if kernels:
            document |= _comparison(quiet=json)
        document["kernels"] = _chosen()
    if not emit(document, json):
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
        if chosen := document.get("kernels"):
            rows = [
                [c["operation"], c["dtype"], c["kernel"], c["origin"], c["reason"]] for c in chosen
            ]
            stdout.print(
                table(
                    "Kernels of train.kernels = auto",
                    ["operation", "precision", "kernel", "from", "reason"],
                    rows,
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


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chosen() -> list[dict[str, str]]:
    """The choice of train.kernels = auto on this device, by operation; another precision only where
    its choice differs.
    """
    from stackproof.data.prepare import cache_directory
    from stackproof.kernels import choice, measured
    from stackproof.kernels.table import FLOATS

    device = _device()
    found = measured.read(cache_directory(), choice.device_name(device))
    by_dtype = {d: choice.of_config("auto", device, dtype=d, measurement=found) for d in FLOATS}
    rows = []
    for op, usual in by_dtype["float32"].items():
        for dtype, choices in by_dtype.items():
            chosen = choices[op]
            if dtype == "float32" or chosen.kernel != usual.kernel:
                row = {"operation": op, "dtype": dtype, "kernel": chosen.kernel}
                rows.append(row | {"origin": chosen.origin, "reason": chosen.reason})
    return rows


def _comparison(*, quiet: bool) -> dict[str, Any]:
    """Compare all kernels on this device and write the result to the user's cache."""
    from stackproof.data.prepare import cache_directory
    from stackproof.kernels import compare, measured
    from stackproof.spec.gates import load_spec

    limits = load_spec().gates["kernel.parity"].limits
    found = compare.measure(
        _device(),
        lambda case: limits["half_rel_error_max" if case.half else "rel_error_max"].value,
        on_case=lambda raced: None if quiet else _tell(raced),
    )
    path = measured.write(cache_directory(), found)
    if not quiet:
        stdout.print(f"written to {path}", markup=False)
    return {
        "comparison": {
            "file": str(path),
            "device": found.device,
            "winners": found.winners,
            "rows": found.rows,
        }
    }


def _tell(raced: list) -> None:
    """One line for each kernel of a case."""
    base = next(r for r in raced if r.kernel == "torch").seconds
    for row in (r.row(base) for r in raced):
        said = row["missing"] or (
            (
                f"{row['milliseconds']:.3g} ms, {row['times_torch']:.2f} times as fast as torch, "
                f"error {row['rel_error']:.1e}"
            )
            if row["milliseconds"] and row["times_torch"]
            else "torch's own kernel does not run here"
        )
        stdout.print(
            f"{row['operation']} by {row['kernel']}, {row['shapes']}: {said}", markup=False
        )
