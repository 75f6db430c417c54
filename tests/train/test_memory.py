"""The heap of a run: kept, and advised to lie in large pages."""

import json
import platform
import subprocess
import sys

import pytest

from stackproof.train import memory

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.system() != "Linux",
    reason="the settings are those of glibc on Linux",
)

# What is allocated after the advice must lie in the range it was given for: the flag "hg" of its
# mapping is the system's own word for it.
LAID = """
import json, re, sys, torch
from stackproof.train import memory
said = memory.lay_in_huge_pages(int(sys.argv[1])) if sys.argv[1] != "none" else memory.keep_heap()
block = torch.ones(40 * 2**18)  # 40 MiB
address, flags = block.data_ptr() + 20 * 2**20, None
for line in open("/proc/self/smaps"):
    if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(span[1], 16) <= address < int(span[2], 16)
    elif inside and line.startswith("VmFlags:"):
        flags = line.split()[1:]
print(json.dumps({"said": said, "advised": "hg" in flags}))
"""


def laid(n_bytes) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", LAID, str(n_bytes)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@glibc
def test_the_next_blocks_lie_in_large_pages():
    found = laid(200 * 2**20)
    assert found["advised"] and int(
        found["said"].removesuffix(" MiB advised to lie in huge pages")
    ) in (198, 200)
    assert laid("none")["advised"] is False


@glibc
def test_more_than_trimming_would_leave_is_advised_too():
    """The range is above 2 GiB, the largest threshold that an int can name."""
    found = laid(3 * 2**30)
    assert found["advised"] and int(found["said"].split()[0]) in range(3060, 3073)


@glibc
def test_what_there_is_no_room_for_is_said():
    found = laid(2**62)
    assert found == {"said": f"pages as shipped: no room for {2**62} bytes", "advised": False}


def test_a_system_that_grants_none_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "keep_heap", lambda: memory.KEPT)
    monkeypatch.setattr(memory.platform, "system", lambda: "Linux")
    monkeypatch.setattr(memory, "SWITCH", tmp_path / "enabled")
    assert memory.lay_in_huge_pages(2**20).endswith("grants no large ones")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert memory.lay_in_huge_pages(2**20).endswith("grants no large ones")


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    memory.keep_heap.cache_clear()
    try:
        assert (
            memory.keep_heap() == "as shipped"
            and memory.lay_in_huge_pages(2**20) == "pages as shipped"
        )
    finally:
        memory.keep_heap.cache_clear()
