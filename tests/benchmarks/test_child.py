"""Processes of contestants: their answers, their endings, and the allocator they are given."""

import platform
import sys
from pathlib import Path

import child
import pytest

HERE = str(Path(child.__file__).parent)
ECHO = f"""
import sys
sys.path.insert(0, {HERE!r})
import child

def make_ready():
    print("a library speaks")
    def answer(question):
        print("and speaks again")
        return {{"double": 2 * question["n"]}}
    return {{"ready": True}}, answer

child.serve(make_ready)
"""
# A block of 64 MiB is written, freed and taken again, several times:
# how much memory came fresh the last time?
AGAIN = f"""
import sys
sys.path.insert(0, {HERE!r})
import child

def make_ready():
    for _ in range(4):
        before = child.fresh_bytes()
        block = b"x" * (64 << 20)
        fresh = child.fresh_bytes() - before
        del block
    return {{"fresh_frac": fresh / (64 << 20), "peak": child.status_bytes("VmHWM"), "now": child.status_bytes("VmRSS")}}, lambda q: {{}}

child.serve(make_ready)
"""  # noqa: E501
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_a_process_answers_in_turn_whatever_its_libraries_print():
    process = child.Child([sys.executable, "-c", ECHO])
    assert process.ready == {"ready": True}
    assert [process.ask(n=n)["double"] for n in (1, 7)] == [2, 14]
    process.close()
    assert process.process.returncode == 0


def test_a_process_that_ends_instead_of_answering_stops_the_benchmark():
    with pytest.raises(SystemExit, match="code 3"):
        child.Child([sys.executable, "-c", "import sys; sys.exit(3)"])


@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_the_allocator_keeps_its_heap_or_gives_it_back():
    fresh = {}
    for name, env in child.ALLOCATORS.items():
        process = child.Child([sys.executable, "-c", AGAIN], env=env)
        process.close()
        fresh[name] = process.ready
        # the kernel counts pages in batches per core
        assert process.ready["peak"] >= max(64 << 20, process.ready["now"] - (1 << 20))
    # Measured 1.00 as shipped and 0.00 kept.
    assert fresh["shipped"]["fresh_frac"] > 0.9
    assert fresh["heap-kept"]["fresh_frac"] < 0.1
