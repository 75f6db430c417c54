"""The C allocator, told to keep what it has and to lie in large pages: fresh pages cost more than
the arithmetic done on them.
"""

import ctypes
import platform
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1  # malloc.h of the GNU C library
MADV_HUGEPAGE, HUGE_PAGE_BYTES = 14, 2 * 2**20  # sys/mman.h of Linux
KEPT = "glibc, heap kept"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def keep_heap() -> str:
    """Make freed memory of a size that training uses again and again stay with the process.
    Returns what was done, for the record.

    As shipped, the GNU C library maps every block above 32 MiB anew and gives the top of the heap
    back, so each step pays for zeroed pages again. Peak memory stays that of the step; only
    afterwards less is returned. Elsewhere nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as shipped"
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)
    return KEPT if done else "as shipped: mallopt refused"


def lay_in_huge_pages(n_bytes: int) -> str:
    """Ask for pages of 2 MiB under the next `n_bytes` of a heap that is kept.
    Returns what was done, for the record.

    A step walks through all its activations, and with pages of 4 KiB many of its reads first wait
    for the address. Only address space is taken here; memory comes at its first use. Where the
    system grants no large pages, nothing changes.
    """
    if keep_heap() != KEPT or platform.system() != "Linux":
        return "pages as shipped"
    if not SWITCH.exists() or "[never]" in SWITCH.read_text():
        return "pages as shipped: the system grants no large ones"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    )
    block = libc.malloc(n_bytes)
    if not block:
        return f"pages as shipped: no room for {n_bytes} bytes"
    first = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = max(0, block + n_bytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    refused = libc.madvise(first, size, MADV_HUGEPAGE)
    libc.free(block)  # it stays on top of the heap, whose next blocks are cut from it
    return (
        "pages as shipped: madvise refused"
        if refused
        else f"{size // 2**20} MiB advised to lie in huge pages"
    )
