"""How many fresh processes compute other cosines than the rest, beside other work on the machine.

    python benchmarks/first_calls.py [--processes 200] [--busy 2] [--selected] [--run-dir DIR]

Each process computes the float64 cosines of the rotary embedding, 256 positions by 16 pairs, which
torch splits over its threads, and prints their hash. `--selected`: the process first selects the
vector functions in one thread, as the stack does. `--busy` processes load the machine meanwhile.
"""

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stackproof.spec.building import RecordBuilder
from stackproof.spec.gates import load_spec
from stackproof.spec.provenance import environment

SELECT = "from stackproof.contracts.vector_math import select_vector_functions as select; select()"
COSINES = """
import hashlib, os, torch
pair_J = torch.arange(16, dtype=torch.float64) / 16
angle_TJ = torch.outer(torch.arange(256, dtype=torch.float64), 10000**-pair_J)
print(hashlib.sha256(angle_TJ.cos().numpy().tobytes()).hexdigest(), flush=True)
os._exit(0)
"""
# Short bursts: the threads of a computation start at different moments.
BUSY = """
import random, time
while True:
    until = time.monotonic() + random.random() / 20
    while time.monotonic() < until:
        pass
    time.sleep(random.random() / 20)
"""


@contextmanager
def loaded(n_processes: int) -> Iterator[None]:
    """Processes that load the machine until the block ends."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def hash_of_cosines(selected: bool) -> str:
    """The hash that one fresh process prints."""
    code = (SELECT if selected else "") + COSINES
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=200)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--selected", action="store_true")
    parser.add_argument("--run-dir", type=Path, help="leave a record of kind benchmark here")
    options = parser.parse_args()
    record = RecordBuilder(
        kind="benchmark",
        spec=load_spec(),
        config={
            "benchmark": "first calls of vector functions",
            "processes": options.processes,
            "busy": options.busy,
            "selected": options.selected,
        },
        command=("python", "benchmarks/first_calls.py", *sys.argv[1:]),
        claim="Of this many fresh processes, so many computed other cosines than most.",
        not_covered=("other processors, builds of torch and loads of the machine",),
        environment=environment(),
    )
    with loaded(options.busy):
        hashes = Counter(hash_of_cosines(options.selected) for _ in range(options.processes))
    n_other = options.processes - max(hashes.values())
    print(f"{n_other} of {options.processes} processes computed other cosines: {dict(hashes)}")
    if options.run_dir:
        record.metric("processes", options.processes, "1")
        record.metric("processes_with_other_cosines", n_other, "1", better="lower")
        options.run_dir.mkdir(parents=True, exist_ok=True)
        record.finish(options.run_dir, status="completed", end_reason="measured", exit_code=0)
        print(f"record {options.run_dir / 'metadata.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
