"""The example in docs/trace.md does what the page says."""

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
    assert guilty.startswith("['up projection'] ") and int(guilty.split()[-1]) == names["guilty"].runs <= 9
    assert not torch.equal(names["without"], names["good"](names["ids"]))
