"""A process of its own for every contestant.
It makes ready, says so in a line of JSON, and answers each line with another.

A process that is kept alive waits while the others are timed.
Its memory and its allocator are its own.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# glibc's malloc: take large blocks from the heap instead of fresh mappings,
# and never give the heap back.
HEAP_KEPT = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=9223372036854775807:"
    "glibc.malloc.top_pad=67108864"
)
ALLOCATORS = {"shipped": {}, "heap-kept": {"GLIBC_TUNABLES": HEAP_KEPT}}


class Child:
    """A started process that has said it is ready; `ready` is what it said."""

    def __init__(self, command: list[str], *, env: dict[str, str] | None = None):
        self.command = command
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | (env or {}),
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SystemExit(
                f"a contestant ended with code {self.process.returncode}, see above: "
                f"{' '.join(self.command)}"
            )
        return json.loads(line)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send one question, wait for its answer.
        Raises SystemExit if the process ended instead.
        """
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process: it reads the end of its input and leaves."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Team:
    """Processes of one contestant, each a rank of one process group. `ready` and the answers are
    those of rank 0.
    """

    def __init__(self, command: list[str], n_ranks: int, *, env: dict[str, str] | None = None):
        import torch.distributed as dist

        # As torchrun's agent does: the store outlives the ranks.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = (env or {}) | {
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        # Each waits for the others while it makes ready, so all are started together.
        self.threads = ThreadPoolExecutor(n_ranks)
        own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)]
        self.ranks = list(self.threads.map(lambda env: Child(command, env=env), own))
        self.ready = self.ranks[0].ready

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send one question to all ranks, wait for all answers.
        Raises SystemExit if a process ended instead.
        """
        first, *_ = self.threads.map(lambda rank: rank.ask(**question), self.ranks)
        return first

    def close(self) -> None:
        """End the processes."""
        list(self.threads.map(Child.close, self.ranks))
        self.threads.shutdown()


def itself(*arguments: str) -> list[str]:
    """The command that runs the benchmark that runs now, with other arguments."""
    return [sys.executable, sys.argv[0], *arguments]


def serve(make_ready: Callable[[], tuple[dict, Callable[[dict], dict]]]) -> int:
    """What the process of a contestant does: make ready, say so,
    then answer every question until there is none.

    Standard output belongs to the answers alone; whatever libraries print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(document: dict) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    ready, answer = make_ready()
    send(ready)
    for line in sys.stdin:
        send(answer(json.loads(line)))
    return 0


def status_bytes(field: str) -> int:
    """VmHWM (most memory ever resident) or VmRSS (resident now) of this process, bytes; Linux only.

    Not ru_maxrss: that one begins with the size of the process this was started from.
    """
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")
    )


def fresh_bytes() -> int:
    """Memory that this process was given anew so far, page by page, bytes: what an allocator
    returns to the system comes again here.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()
