"""Wall time until a command has printed its help: ours, bare Python, and installed peers, in turn.

    python benchmarks/startup.py [--rounds 20] [--json PATH]

Each round starts a fresh process of the interpreter that runs this, files in the page cache.
Seconds are shown as commands per second, so that a ratio above 1 says that ours is faster. Peers
that cannot be imported are left out, and their rows say so.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from side_by_side import (
    Row,
    against,
    alternate,
    as_json,
    close_record,
    facts,
    metric_key,
    open_record,
    show,
    spread,
    why_not,
    write_json,
)

OURS = "stack --help"
COMMANDS = {
    OURS: ("", ("-m", "stackproof", "--help")),
    "stack train --help": ("", ("-m", "stackproof", "train", "--help")),
    "python -c pass": ("", ("-c", "pass")),
    "import torch": ("torch", ("-c", "import torch")),
    "litgpt --help": ("litgpt", ("-m", "litgpt", "--help")),
    "transformers --help": ("transformers", ("-m", "transformers.cli.transformers", "--help")),
}
PACKAGES = ("torch", "transformers", "litgpt", "typer")


def command_rate(name: str, arguments: tuple[str, ...]) -> Callable[[], float]:
    """What one round does: run the command once; returns commands/s. Stops if the command fails."""

    def once() -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        taken = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return 1 / taken

    return once


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--run-dir", type=Path, help="leave a record of kind benchmark in this folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = open_record(options, "start-up")
    missing = {name: why_not(package) for name, (package, _) in COMMANDS.items()}
    work = {
        name: command_rate(name, arguments)
        for name, (_, arguments) in COMMANDS.items()
        if not missing[name]
    }
    rates = alternate(work, options.rounds)
    rows = against(
        OURS, [Row(n, "per second", rates.get(n, ()), reason) for n, reason in missing.items()]
    )
    show(f"start-up, {options.rounds} rounds in turn", rows)
    seconds = {
        f"seconds_{metric_key(r.name)}": (1 / spread(r.rates)[0], "s") for r in rows if r.rates
    }
    print(
        "\n"
        + "\n".join(
            f"{name.removeprefix('seconds_'):34}{value * 1e3:8.0f} ms"
            for name, (value, _) in seconds.items()
        )
    )
    machine = facts(PACKAGES)
    print(machine)
    write_json(options.json, {"machine": machine, "rows": as_json(rows)})
    close_record(record, options.run_dir, rows, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
