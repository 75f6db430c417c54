"""`stack doctor`: the environment against the requirements, and the kernels of this device."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from typing import Annotated, Any

from typer import Option, Typer

from stackproof.cli.options import Json
from stackproof.cli.output import emit, print_line, print_table
from stackproof.spec.errors import EnvironmentUnfit

OPTIONAL = {
    "tiktoken": "faster batches, the extra data",
    "pyarrow": "parquet and .zst files, the extra data",
    "datatrove": "builds on many machines, the extra scale",
    "transformers": "compares exports and imports, the extra hf",
}


app = Typer()


@app.command()
def doctor(
    kernels: Annotated[
        bool,
        Option(
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
        heads = ("what", "found", "needed")
        rows = [[*(f[k] for k in heads), "yes" if f["ok"] else "NO"] for f in findings]
        print_table("Environment", (*heads, "ok"), rows)
        if chosen := document.get("kernels"):
            heads = ("operation", "precision", "kernel", "from", "reason")
            print_table("Kernels of train.kernels = auto", heads, (c.values() for c in chosen))
    if not ok:
        missing = [f["what"] for f in findings if f["required"] and not f["ok"]]
        raise EnvironmentUnfit(
            f"training cannot run here: {', '.join(missing)}",
            next_step="pip install 'stackproof[train]'",
        )


def _findings() -> Iterator[dict[str, Any]]:
    version = sys.version_info
    yield _finding("python", ".".join(map(str, version[:3])), "3.11 or later", version >= (3, 11))
    for package in ("torch", "numpy", "safetensors", "tokenizers", "rensa"):
        found = importlib.util.find_spec(package) is not None
        yield _finding(package, "installed" if found else "absent", "the extra train", found)
    for package, use in OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        yield _finding(package, "installed" if found else "absent", use, found, required=False)
    yield _finding(
        "git",
        shutil.which("git") or "absent",
        "for records that name their commit",
        shutil.which("git"),
        required=False,
    )
    free = shutil.disk_usage(".").free
    yield _finding("free disk", f"{free / 2**30:.1f} GiB", "1 GiB for a pocket run", free > 2**30)
    if importlib.util.find_spec("torch"):
        yield from _torch_findings()


def _finding(
    what: str, found: object, needed: str, ok: object, *, required: bool = True
) -> dict[str, Any]:
    facts = {"what": what, "found": str(found), "needed": needed}
    return facts | {"ok": bool(ok), "required": required}


def _torch_findings() -> Iterator[dict[str, Any]]:
    import torch

    short = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    yield _finding("torch version", torch.__version__, "2.11 – 2.13", (2, 11) <= short <= (2, 13))
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if cuda else "none"
    yield _finding("CUDA device", name, "optional", True, required=False)
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    bf16 = cuda or probe()
    needed = "else train.dtype=float32 is faster"
    yield _finding("bfloat16 units", bf16, needed, bf16, required=False)


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
        on_case=lambda raced: None if quiet else _print_case(raced),
    )
    path = measured.write(cache_directory(), found)
    if not quiet:
        print_line(f"written to {path}")
    facts = {"device": found.device, "winners": found.winners, "rows": found.rows}
    return {"comparison": {"file": str(path)} | facts}


def _print_case(raced: list) -> None:
    """One line for each kernel of a case."""
    base = next(r for r in raced if r.kernel == "torch").seconds
    for row in (r.row(base) for r in raced):
        result = row["missing"] or "torch's own kernel does not run here"
        if row["milliseconds"] and row["times_torch"]:
            ratio = f"{row['times_torch']:.2f} times as fast as torch"
            result = f"{row['milliseconds']:.3g} ms, {ratio}, error {row['rel_error']:.1e}"
        print_line(f"{row['operation']} by {row['kernel']}, {row['shapes']}: {result}")
