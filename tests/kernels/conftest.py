"""Without a CUDA device the kernels run in Triton's interpreter.
It must be asked for before anybody imports triton.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before tests/kernels could ask for its interpreter; set "
            "TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")

from tests.kernels import support

if not torch.cuda.is_available():
    support.mend_interpreter()


@pytest.fixture(autouse=True)
def one_draw():
    torch.manual_seed(20240607)


@pytest.fixture
def guard(monkeypatch):
    """Everything that kernels allocate lies between margins; leaving the test
    checks that nobody wrote there.
    """
    margins = support.Margins()
    margins.install(monkeypatch)
    yield margins
    margins.check()


def pytest_sessionfinish():
    """Hand the worst errors to whoever asked for them."""
    if path := os.environ.get("STACKPROOF_PARITY_OUT"):
        Path(path).write_text(json.dumps(support.WORST), "utf-8")
