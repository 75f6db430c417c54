"""The C allocator, told to keep what it has: fresh pages cost more than the arithmetic done on them."""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library
NEVER = 2**31 - 1


@cache
def keep_heap() -> str:
    """Make freed memory of a size that training uses again and again stay with the process. Returns what was done, for the record.

    As shipped, the GNU C library maps every block above 32 MiB anew and gives the top of the heap back, so each step pays for zeroed
    pages again. Peak memory stays that of the step; only afterwards less is returned. Elsewhere nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as shipped"
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)
    return "glibc, heap kept" if done else "as shipped: mallopt refused"
