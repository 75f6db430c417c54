"""The list of kernels that have passed: which source it lists,
and that a change makes it void.
"""

import json
import shutil

import pytest

from stackproof.kernels import dispatch, parity
from stackproof.kernels.table import OPERATIONS, TRITON
from stackproof.spec import ROOT
from stackproof.spec.errors import IntegrityError

KERNELS = ROOT / "stack" / "kernels"


def test_every_kernel_has_passed_as_it_stands():
    assert {kernel: parity.why_not(kernel) for kernel in parity.SOURCES} == dict.fromkeys(
        parity.SOURCES, ""
    )
    assert set(parity.SOURCES) == {op.name for op in OPERATIONS.values() if TRITON in op.kernels}


def test_every_source_that_imports_triton_is_bound_to_a_kernel():
    written_in_triton = {
        f"triton/{p.name}"
        for p in (KERNELS / "triton").glob("*.py")
        if "\nimport triton" in p.read_text("utf-8")
    }
    assert written_in_triton == {name for names in parity.SOURCES.values() for name in names} - {
        "triton/launch.py"
    }
    assert not [p.name for p in KERNELS.glob("*.py") if "\nimport triton" in p.read_text("utf-8")]


@pytest.mark.parametrize("kernel", sorted(parity.SOURCES))
def test_one_more_blank_in_any_of_its_files_is_another_source(kernel, tmp_path):
    for name in parity.SOURCES[kernel]:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        assert parity.why_not(kernel, folder, folder / "parity.json") == ""
        (folder / name).write_text((folder / name).read_text("utf-8") + "\n", "utf-8")
        parity.why_not.cache_clear()
        assert "has changed" in parity.why_not(kernel, folder, folder / "parity.json")


def test_a_kernel_that_never_passed_is_refused(tmp_path):
    assert "not been passed" in parity.why_not("rope", KERNELS, tmp_path / "none.json")


def test_dispatch_refuses_a_kernel_whose_source_has_changed(monkeypatch):
    monkeypatch.setattr(parity, "source_hash", lambda names, folder=KERNELS: "0" * 64)
    parity.why_not.cache_clear()
    try:
        with (
            pytest.raises(IntegrityError, match="has changed") as caught,
            dispatch.using(swiglu="triton"),
        ):
            pass
        assert caught.value.next_step == "python -m stackproof.kernels.parity --write"
    finally:
        parity.why_not.cache_clear()


def test_the_page_states_what_the_list_holds():
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for kernel, entry in json.loads(parity.FILE.read_text("utf-8")).items():
        row = next(
            line
            for line in page.splitlines()
            if line.startswith(f"| `{kernel}` |") and "e-" in line
        )
        assert [f"{x:.1e}" for x in entry["worst"].values()] == [
            c.strip() for c in row.split("|")[2:-1] if c.strip() not in ("", "–")
        ]
        assert entry["passed_on"] in page
