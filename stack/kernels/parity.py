"""Which Triton kernels have passed their parity tests with their current source.

python -m stackproof.kernels.parity [--write]

Without --write it prints the state of each kernel. With --write it runs the parity tests, on a GPU
or in Triton's interpreter, and writes the source hash of each kernel that passes to `parity.json`.
`dispatch` refuses all other kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from stackproof.kernels.table import FOLDER, OPERATIONS, TRITON, source_hash
from stackproof.spec import ROOT
from stackproof.spec.canonical import read_json
from stackproof.spec.errors import IntegrityError
from stackproof.spec.visible import print_visible

FILE = FOLDER / "parity.json"
# The files of every operation's Triton kernel.
SOURCES = {
    op.name: op.kernels[TRITON].sources for op in OPERATIONS.values() if TRITON in op.kernels
}
NEXT_STEP = "python -m stackproof.kernels.parity --write"


def passed(file: Path = FILE) -> dict[str, dict]:
    """The content of `parity.json`: kernel -> sha256, device of the tests, versions, and the worst
    relative error per dtype. Raises IntegrityError if it is damaged, OSError.
    """
    if not file.exists():
        return {}
    document = read_json(file)
    if not isinstance(document, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        for entry in document.values()
    ):
        raise IntegrityError(
            f"{file} does not hold an entry with a sha256 for each kernel", next_step=NEXT_STEP
        )
    return document


@cache
def why_not(kernel: str, folder: Path = FOLDER, file: Path = FILE) -> str:
    """Why the source of a kernel does not count as passed; empty if it does. Read once per
    process.
    """
    entry = passed(file).get(kernel)
    if entry is None:
        return "its parity tests have not been passed yet"
    if entry["sha256"] != source_hash(SOURCES[kernel], folder):
        return "its source has changed since it passed its parity tests"
    return ""


def require(kernel: str) -> None:
    """Raise IntegrityError for a kernel whose current source has not passed its parity tests."""
    if reason := why_not(kernel):
        raise IntegrityError(
            f"the Triton kernel {kernel} is not used: {reason}",
            value=source_hash(SOURCES[kernel]),
            next_step=NEXT_STEP,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stackproof.kernels.parity", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="run the parity tests and write down which kernels passed",
    )
    if not parser.parse_args().write:
        for kernel in SOURCES:
            print_visible(
                f"{kernel:22}{why_not(kernel) or 'passed on ' + passed()[kernel]['passed_on']}"
            )
        return 0
    tests = ROOT / "tests" / "kernels"
    if not tests.is_dir():
        raise IntegrityError(
            "the parity tests are not here",
            value=tests,
            next_step="run this in a checkout of the repository",
        )
    entries = {kernel: run(kernel, tests) for kernel in SOURCES}
    good = {kernel: entry for kernel, entry in entries.items() if entry}
    FILE.write_text(json.dumps(good, indent=1, sort_keys=True) + "\n", "utf-8")
    print_visible(f"{len(good)} of {len(entries)} kernels passed; {FILE}")
    return 0 if len(good) == len(entries) else IntegrityError.exit_code


def run(kernel: str, tests: Path) -> dict | None:
    """Run a kernel's tests in a new process. Returns its entry, with the source hash before the
    run, or None after a failure.
    """
    import torch

    before = source_hash(SOURCES[kernel])
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "Triton's interpreter on the CPU"
    )
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "worst.json"
        command = [sys.executable, "-m", "pytest", "-q", str(tests / f"test_{kernel}.py")]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"STACKPROOF_PARITY_OUT": str(errors)}
        )
        if done.returncode != 0:
            return None
        worst = {dtype: float(f"{error:.1e}") for dtype, error in read_json(errors).items()}
    return {
        "sha256": before,
        "passed_on": where,
        "torch": version("torch"),
        "triton": version("triton"),
        "worst": worst,
    }


if __name__ == "__main__":
    sys.exit(main())
