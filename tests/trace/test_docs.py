"""The examples in docs/trace.md and docs/probing.md do what the pages say."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trace.md"


def test_the_example_of_the_page_runs_and_prints_what_the_page_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    spread, first, guilty = capsys.readouterr().out.splitlines()
    assert float(spread) > 0
    point, added, bound = first.split()
    assert point == "layers.1.ffn.up" and float(added) > float(bound)
    assert (
        guilty.startswith("['up projection'] ")
        and int(guilty.split()[-1]) == names["guilty"].runs <= 9
    )
    assert not torch.equal(names["without"], names["good"](names["ids"]))


def test_the_example_of_the_probes_runs_and_prints_what_the_page_says(capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", (PAGE.parent / "probing.md").read_text("utf-8"), flags=re.DOTALL
    )
    exec(compile(block, "probing.md", "exec"), {})
    ablated, patched, lens, found = (
        (lines := capsys.readouterr().out.splitlines())[:2],
        lines[2:4],
        lines[4],
        lines[5],
    )
    assert [line.split()[0] for line in ablated + patched] == [
        f"layers.{i}.{s}" for s in ("ffn.out", "resid_out@-1") for i in (0, 1)
    ]
    assert (
        all(float(line.split()[1]) != 0.0 for line in ablated)
        and float(patched[1].split()[1]) == 1.0
    )
    assert lens == "layers.1.resid_out 0.0"
    assert (
        found.startswith(
            "aten.mul_.Tensor layers.1.ffn layers.1.ffn.swiglu stack/kernels/eager.py:"
        )
        and len(lines) == 6
    )
