"""What each process of a rendezvous of two nodes runs: a sum over all of them in the second start.
In the first one rank 1 is killed, and rank 0 waits until its agent notices the other node.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from stackproof.distributed.process_group import joined
from stackproof.recipes import recipe

if __name__ == "__main__":
    with joined(recipe("pocket"), torch.device("cpu")) as ranks:
        if not ranks.restarted:
            if ranks.rank == 1:
                ranks.store.wait(["waits"])
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.store.set("waits", b"1")
            signal.pause()
        counted = os.environ["TORCHELASTIC_RESTART_COUNT"]
        text = f"{ranks.total(1 + ranks.rank)[0]}, {counted} counted"
        Path(sys.argv[1], str(ranks.rank)).write_text(text)
