"""The end of a process with the one that has started it. Imported before anything else of a rank:
a launcher may end at any moment.
"""

import ctypes
import os
import signal
import sys

LAUNCHER = "STACKPROOF_LAUNCHER"  # process number, set for the ranks of `stack train --nproc`
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def end_with_launcher(launcher: int | None = None) -> None:
    """Let the kernel send SIGTERM to this process when the one that started it ends, and send it
    now if that is not the process `launcher` any more. Elsewhere than on Linux, the next operation
    with the other ranks fails.
    """
    if sys.platform != "linux":
        return
    # Agents of torchrun do not state their number: one that has ended by now is not noticed here.
    launcher = launcher or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        signal.raise_signal(signal.SIGTERM)
